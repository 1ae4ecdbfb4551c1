"""Packaging. `kernels/` stands at the top level for readers and is imported as `minitorch.kernels`.

A top-level import name `kernels` would collide with a published package of that name, hence the
`package_dir` below together with the committed link `minitorch/kernels -> ../kernels`, which lets
type checkers, editors and a plain `pytest` in the checkout find the same files.

Lower bounds are versions the tests were run with:
- numpy 2.0 is the oldest numpy that numba 0.68 and this code work with.
- numba 0.68 needs Python 3.10 or later; we need 3.11.
- ml_dtypes 0.5 is the oldest that numpy 2.3 works with; it gives numpy bfloat16.
- numba-cuda 0.30.4 refers to `np.row_stack`, which numpy 2.5 removed. No version of numpy is
  excluded for it: `kernels/gpu/runtime.py` lends it the name while it is imported. The tests were
  run with numpy 2.4.6 on Python 3.11 and 2.5.5 on 3.13.
- The extra `cuda` brings numba-cuda with CUDA 13's compiler, which needs a driver of version 580 or
  later, and cuBLAS with NVIDIA's Python bindings to it; `cuda12` is the same for drivers of version
  525 or later. No CUDA toolkit is needed beside them.
- `dev` compiles the GPU kernels without a GPU, hence numba-cuda (185 MB), but calls no cuBLAS
  (1 GB on disk). There are no wheels of it for macOS, where those tests are skipped.
- safetensors 0.8.0 writes wrong bytes for arrays that are not contiguous; `minitorch.checkpoint`
  makes them contiguous first, so that no version is excluded for it.
- matplotlib before 3.11 calls names that pyparsing 3.3 warns of.
- ruff and mypy are pinned: a new release of either may find new faults in unchanged code.
"""

from pathlib import Path

from setuptools import find_packages, setup

TRAIN = [
    "matplotlib>=3.11",
    "rich>=13.7",
    "safetensors>=0.4.3",
    "tokenizers>=0.20",
]

NUMBA_CUDA = "numba-cuda[{}]>=0.30.4"
CUBLAS = "nvmath-python>=1.0"  # NVIDIA's Python bindings

setup(
    name="minitorch",
    version="0.4.0",
    description="A small deep-learning library to read, with FlashAttention and its kernels",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=[
        "minitorch",
        "minitorch.cuda",
        "minitorch.interop",
        "minitorch.kernels",
        *(f"minitorch.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"minitorch.kernels": "kernels"},
    package_data={"minitorch": ["py.typed"]},
    license="MIT",
    license_files=["LICENSE"],
    keywords=["autodiff", "tensors", "flash attention", "numba", "cuda", "education"],
    project_urls={
        "MiniTorch": "https://minitorch.github.io",
        "FlashAttention": "https://arxiv.org/abs/2205.14135",
        "FlashAttention-2": "https://arxiv.org/abs/2307.08691",
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Education",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    install_requires=["ml_dtypes>=0.5", "numpy>=2.0", "numba>=0.68"],
    extras_require={
        "cuda": [NUMBA_CUDA.format("cu13"), CUBLAS, "cuda-toolkit[cublas]==13.*"],
        "cuda12": [NUMBA_CUDA.format("cu12"), CUBLAS, "cuda-toolkit[cublas]==12.*"],
        "train": TRAIN,
        "bench": ["torch==2.13.0", "threadpoolctl>=3.5"],
        "dev": [
            *TRAIN,
            "hypothesis>=6.115",
            "mypy==2.4.1",
            NUMBA_CUDA.format("cu13") + "; sys_platform != 'darwin'",
            "pytest>=8.3",
            "pytest-xdist>=3.6",
            "ruff==0.17.5",
            "scikit-learn>=1.5",
            "setuptools>=77",
        ],
    },
)
