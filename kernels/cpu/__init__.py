"""What the CPU's kernels are built of: SIMD, threads, rows, BLAS, and how they are compiled."""
