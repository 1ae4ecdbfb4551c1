"""FlashAttention on CPUs: launch, forward, backward."""
