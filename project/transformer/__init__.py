"""The parts of `project/run_transformer.py`, one idea to a file.

`data` and `tokenizer` turn text into batches, `model` builds the network, `training` is the loop,
`cuda_step` its step on the GPU, `run_files` what a run keeps on disk, `sampling` writes text,
`compare` sets flash beside standard attention, `ngram` is the yardstick, `report` is what the
terminal and the picture show, `options` holds the defaults, `cli` reads the command line.
"""
