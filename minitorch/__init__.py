"""MiniTorch with FlashAttention."""
