"""FlashAttention on any CUDA GPU, with ordinary (SIMT) arithmetic."""
