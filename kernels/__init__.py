"""Fused kernels, one operation a file. They know arrays and nothing of `minitorch`."""
