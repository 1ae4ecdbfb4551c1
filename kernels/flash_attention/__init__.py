"""FlashAttention: one problem description, one file an implementation."""
