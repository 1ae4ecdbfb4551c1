"""`transformer`, under the misspelt name that the transformer course imports it by."""

from __future__ import annotations

from .transformer import DecoderLM, FeedForward, MultiHeadAttention, TransformerLayer

__all__ = ["DecoderLM", "FeedForward", "MultiHeadAttention", "TransformerLayer"]
