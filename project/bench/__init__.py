"""The benchmarks: each program writes the page of its name in `project/results`.

    attention_cpu.py      FlashAttention against PyTorch's on the CPU
    attention_cuda.py     the same on a GPU (contestants, parts and page in `attention_*.py`)
    attention_profile.py  what holds a kernel back, by NVIDIA's profiler
    ops_cuda.py           bandwidth of elementwise operations, softmax and layer norm
    transformer_cpu.py    a training step against PyTorch's on the CPU
    training_cuda.py      the same on a GPU
    tune_attention.py     the fastest sizes of tiles, written into the library

`results.py` makes all pages anew from what was measured, and puts their tables into the READMEs.
Two programs compare versions of the code: `same_bits.py` what it computes, `machine_code.py` what
GPUs are given. What they share: `machine`, `pages`, `timing`, `processes`, `networks`.
"""
