"""What the GPU's kernels are built of: the compiler, instructions, tiles in registers, layouts."""
