"""FlashAttention on tensor cores, one warp at a time (`mma.sync`)."""
