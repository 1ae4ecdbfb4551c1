"""FlashAttention on Hopper GPUs: the copy engine (TMA) and `wgmma`."""
