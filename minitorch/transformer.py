"""A decoder-only transformer: attention, feed-forward, layer, language model.

Pre-norm, as in GPT-2 (Radford et al. 2019, section 2.3); attention after Vaswani et al. 2017,
section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .arguments import as_size, check_tensor, type_name
from .block_mask import BlockMask
from .dtypes import check_dtype, get_default_dtype
from .factories import tensor_from_numpy, zeros
from .mask_functions import MaskMod
from .module import Module
from .modules_basic import Dropout, Embedding, LayerNorm1d, Linear
from .nn import GELU, softmax
from .score_mods import ScoreMod
from .tensor import Tensor
from .tensor_ops import SimpleBackend, TensorBackend


class KeyValueCache:
    """Keys and values of the positions that one attention layer has seen, for generating text token
    by token.

    Args:
        batch: number of sequences.
        n_head: number of heads.
        max_positions: how many positions there is room for.
        head_dim: size of a head.
        dtype: of keys and values.

    """

    def __init__(
        self,
        batch: int,
        n_head: int,
        max_positions: int,
        head_dim: int,
        dtype: np.dtype[np.floating],
    ) -> None:
        self.length = 0
        self._shape = (batch, n_head, max_positions, head_dim)
        self._dtype = np.dtype(dtype)
        self._kept: tuple[Tensor, Tensor] | None = None  # keys and values, where they are computed

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add new positions, (batch, n_head, new, head_dim) each, and return views of all of them.

        Raises:
            ValueError: the cache is full.

        """
        end = self.length + key.shape[2]
        if end > self._shape[2]:
            raise ValueError(f"the cache has room for {self._shape[2]} positions, {end} are wanted")
        ops = key.f.ops
        if self._kept is None:
            keys = key._new(ops.full(self._shape, 0.0, self._dtype))
            self._kept = keys, value._new(ops.full(self._shape, 0.0, self._dtype))
        new = (slice(None), slice(None), slice(self.length, end))
        for kept, given in zip(self._kept, (key, value), strict=True):
            ops.copy_into(ops.slice(kept, new), given.detach().to(self._dtype))
        self.length = end
        seen = (slice(None), slice(None), slice(0, end))
        return ops.slice(self._kept[0], seen), ops.slice(self._kept[1], seen)


class MultiHeadAttention(Module):
    """Attention of a sequence over itself in several heads.

    A `score_mod` or a `block_mask` sees the positions of the sequence, and `b` is the number of the
    sequence in the batch. With a cache, too, the queries have the positions that follow those that
    it holds, so text is generated with the network that was trained. A Parameter that a
    score function closes over is trained if a Module has it::

        class Biased(Module):
            def __init__(self, n_embd, n_head, reach, backend):
                super().__init__()
                self.bias = Parameter(zeros((n_head, reach + 1), backend))
                bias = self.bias

                def mod(score, b, h, q_idx, kv_idx):
                    return score + bias[h, np.clip(q_idx - kv_idx, 0, reach)]

                self.attention = MultiHeadAttention(
                    n_embd, n_head, causal=True, backend=backend, use_flash_attention=True,
                    score_mod=mod,
                )

    Args:
        n_embd: size of the embedding.
        n_head: number of heads; divides n_embd.
        causal: whether a position sees only itself and what is before it.
        p_dropout: dropout on the attention weights and on the output.
        bias: whether the projections have one.
        backend: where the weights live.
        use_fused_kernel: softmax and mask in one operation (`attn_softmax`).
        use_flash_attention: the whole attention in one operation, without a score matrix.
        score_mod: a function (score, b, h, q_idx, kv_idx) -> score, see `flash_attention`.
        block_mask: a function (b, h, q_idx, kv_idx) -> truth value, or a BlockMask, of the longest
            sequence: a shorter one has its first rows and columns. With `causal` both must let a
            position be seen.

    Raises:
        ValueError: n_head does not divide n_embd.
        TypeError: score_mod or block_mask is neither.

    """

    def __init__(
        self,
        n_embd: int,
        n_head: int,
        causal: bool = False,
        p_dropout: float = 0.1,
        bias: bool = True,
        backend: TensorBackend | None = None,
        use_fused_kernel: bool = False,
        use_flash_attention: bool = False,
        score_mod: ScoreMod | None = None,
        block_mask: BlockMask | MaskMod | None = None,
    ) -> None:
        super().__init__()
        n_embd, n_head = as_size(n_embd, "n_embd"), as_size(n_head, "n_head")
        if n_head < 1 or n_embd % n_head:
            raise ValueError(f"n_head must divide n_embd = {n_embd}, got {n_head}")
        backend = SimpleBackend if backend is None else backend
        self.backend = backend
        self.n_embd = n_embd
        self.n_head = n_head
        self.causal = causal
        self.attn_hidden_dim = n_embd // n_head
        self.use_fused_kernel = use_fused_kernel
        self.use_flash_attention = use_flash_attention
        self.score_mod, self.block_mask = _checked_variant(score_mod, block_mask)
        self.q_projection = Linear(n_embd, n_embd, bias, backend)
        self.k_projection = Linear(n_embd, n_embd, bias, backend)
        self.v_projection = Linear(n_embd, n_embd, bias, backend)
        self.out_projection = Linear(n_embd, n_embd, bias, backend)
        self.dropout = Dropout(p_dropout)

    def create_causal_mask(self, *sizes: int) -> Tensor:
        """Additive mask (1, 1, T, T), -inf above the diagonal; T is the last of `sizes`."""
        seq_len = sizes[-1]
        mask = zeros((1, 1, seq_len, seq_len), self.backend)
        return mask.f.ops.band_fill(mask, -seq_len, 1, -np.inf)

    def _split_heads(self, x: Tensor) -> Tensor:
        """(B, T, E) -> (B, H, T, E / H), a view."""
        batch, seq_len, _ = x.shape
        return x.view(batch, seq_len, self.n_head, self.attn_hidden_dim).permute(0, 2, 1, 3)

    def project_to_query_key_value(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, E) -> query (B, H, T, E / H), key transposed (B, H, E / H, T), value (B, H, T, E
        / H).
        """
        q = self._split_heads(self.q_projection(x))
        k = self._split_heads(self.k_projection(x))
        v = self._split_heads(self.v_projection(x))
        return q, k.permute(0, 1, 3, 2), v

    def self_attention(self, q: Tensor, kT: Tensor, v: Tensor) -> Tensor:
        """softmax(q @ kT / sqrt(head size) + mask) @ v, heads joined again: (B, T, E)."""
        batch, _, seq_len, head_dim = q.shape
        if self.use_flash_attention or self.score_mod or self.block_mask is not None:
            out = self._one_operation(q, kT, v)
        else:
            scores = (q @ kT) / float(np.sqrt(head_dim))  # (B, H, T, T_k)
            if self.use_fused_kernel:
                mask = self._mask(seq_len, kT.shape[-1])
                weights = scores.attn_softmax(mask)
            else:
                if self.causal:
                    scores = scores + self._mask(seq_len, kT.shape[-1])
                weights = softmax(scores, 3)
            out = self.dropout(weights) @ v
        joined = out.permute(0, 2, 1, 3).contiguous()  # (B, T, H, E / H)
        return joined.view(batch, seq_len, self.n_embd)

    def _one_operation(self, q: Tensor, kT: Tensor, v: Tensor) -> Tensor:
        """Fused, or with the score matrix; queries are the last positions of the keys."""
        attention = q.flash_attention if self.use_flash_attention else q.attention
        seqlen_q, seqlen_k = q.shape[2], kT.shape[3]
        out: Tensor = attention(
            kT.transpose(-2, -1),
            v,
            is_causal="bottom-right" if self.causal else False,
            dropout_p=self.dropout.p_dropout if self.training else 0.0,
            score_mod=_from_position(self.score_mod, seqlen_k - seqlen_q),
            block_mask=_last_rows(self.block_mask, seqlen_q, seqlen_k),
        )
        return out

    def _mask(self, seqlen_q: int, seqlen_k: int) -> Tensor:
        """The causal mask's last `seqlen_q` rows, or zeros: (1, 1, seqlen_q, seqlen_k)."""
        if self.causal:
            rows: Tensor = self.create_causal_mask(seqlen_k)[:, :, seqlen_k - seqlen_q :]
            return rows
        return zeros((1, 1, 1, seqlen_k), self.backend)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """(B, T, E) -> (B, T, E); with a cache, x continues the positions that the cache holds."""
        check_tensor(x, "x")
        if x.dims != 3:
            raise ValueError(f"x must be (batch, seq_len, {self.n_embd}), got {x.shape}")
        q, kT, v = self.project_to_query_key_value(x)
        if cache is not None:
            k, v = cache.append(kT.permute(0, 1, 3, 2), v)
            kT = k.permute(0, 1, 3, 2)
        out: Tensor = self.out_projection(self.self_attention(q, kT, v))
        return out


def _checked_variant(
    score_mod: Any, block_mask: Any
) -> tuple[ScoreMod | None, BlockMask | MaskMod | None]:
    if score_mod is not None and not callable(score_mod):
        raise TypeError(
            f"score_mod must be a function (score, b, h, q_idx, kv_idx), got {type_name(score_mod)}"
        )
    if not (block_mask is None or callable(block_mask) or isinstance(block_mask, BlockMask)):
        raise TypeError(
            "block_mask must be a BlockMask or a function (b, h, q_idx, kv_idx), got "
            f"{type_name(block_mask)}"
        )
    return score_mod, block_mask


def _from_position(score_mod: ScoreMod | None, start: int) -> ScoreMod | None:
    """The function of queries that are numbered from `start` on."""
    if score_mod is None or start == 0:
        return score_mod

    def moved(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score_mod(score, b, h, q_idx + start, kv_idx)

    return moved


def _last_rows(
    block_mask: BlockMask | MaskMod | None, seqlen_q: int, seqlen_k: int
) -> BlockMask | MaskMod | None:
    """The mask of the last queries of a sequence of `seqlen_k` tokens."""
    start = seqlen_k - seqlen_q
    if isinstance(block_mask, BlockMask):
        return block_mask.rows(start, seqlen_q, seqlen_k)
    if block_mask is None or start == 0:
        return block_mask
    mask_mod = block_mask

    def moved(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return mask_mod(b, h, q_idx + start, kv_idx)

    return moved


class FeedForward(Module):
    """linear_out(GELU(linear_in(x))), with dropout.

    Args:
        n_embd: size of the embedding.
        middle_dim: size in between.
        p_dropout: dropout on the output.
        bias: whether the layers have one.
        backend: where the weights live.

    """

    def __init__(
        self,
        n_embd: int,
        middle_dim: int = 256,
        p_dropout: float = 0.1,
        bias: bool = True,
        backend: TensorBackend | None = None,
    ) -> None:
        super().__init__()
        backend = SimpleBackend if backend is None else backend
        self.linear_in = Linear(n_embd, middle_dim, bias, backend)
        self.linear_out = Linear(middle_dim, n_embd, bias, backend)
        self.dropout = Dropout(p_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., E) -> (..., E)"""
        out: Tensor = self.dropout(self.linear_out(GELU(self.linear_in(x))))
        return out


class TransformerLayer(Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); causal.

    Args:
        n_embd: size of the embedding.
        n_head: number of heads.
        p_dropout: everywhere.
        ln_eps: of the layer norms.
        bias: of the linear layers.
        backend: where the weights live.
        use_fused_kernel: see `MultiHeadAttention`.
        use_flash_attention: see `MultiHeadAttention`.
        middle_dim: of the feed-forward layer, 256 as in the course if not given.
        score_mod: see `MultiHeadAttention`.
        block_mask: see `MultiHeadAttention`.

    """

    def __init__(
        self,
        n_embd: int,
        n_head: int,
        p_dropout: float = 0.1,
        ln_eps: float = 1e-5,
        bias: bool = True,
        backend: TensorBackend | None = None,
        use_fused_kernel: bool = False,
        use_flash_attention: bool = False,
        middle_dim: int = 256,
        score_mod: ScoreMod | None = None,
        block_mask: BlockMask | MaskMod | None = None,
    ) -> None:
        super().__init__()
        backend = SimpleBackend if backend is None else backend
        self.ln_1 = LayerNorm1d(n_embd, ln_eps, backend)
        self.ln_2 = LayerNorm1d(n_embd, ln_eps, backend)
        self.attention = MultiHeadAttention(
            n_embd, n_head, True, p_dropout, bias, backend, use_fused_kernel, use_flash_attention,
            score_mod, block_mask,
        )  # fmt: skip
        self.ff = FeedForward(n_embd, middle_dim, p_dropout, bias, backend)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """(B, T, E) -> (B, T, E)"""
        x = x + self.attention(self.ln_1(x), cache)
        x = x + self.ff(self.ln_2(x))
        return x


def _of_layers(given: Any, name: str, n_layer: int) -> list[Any]:
    """One for each layer, of one for all or of a sequence."""
    if not isinstance(given, list | tuple):
        return [given] * n_layer
    if len(given) != n_layer:
        raise ValueError(f"{name} is a sequence of {len(given)}, the model has {n_layer} layers")
    return list(given)


class DecoderLM(Module):
    """A language model: embeddings, `n_layer` transformer layers, layer norm, scores for the next
    token.

    Args:
        n_vocab: number of tokens.
        n_embd: size of the embedding.
        n_head: number of heads.
        n_positions: longest sequence.
        p_dropout: everywhere.
        ln_eps: of the layer norms.
        bias: of the linear layers.
        backend: where the weights live.
        use_fused_kernel: see `MultiHeadAttention`.
        use_flash_attention: see `MultiHeadAttention`.
        n_layer: number of layers, `t_layer_1` and so on; 4 in the course.
        middle_dim: of the feed-forward layers, 256 as in the course if not given.
        compute_dtype: what the layers compute with, on the GPU "bfloat16" or "float16"; the weights
            stay as they are (master weights), and so does their gradient. None: as the weights.
        score_mod: of attention, one for all layers, or a sequence with one, or None, for each; see
            `MultiHeadAttention`.
        block_mask: likewise; layers that look near may take turns with layers that look far. A
            position sees itself and what is before it, whatever the mask says. A BlockMask is for
            n_positions queries and keys.

    Raises:
        ValueError: sizes that do not fit together.
        TypeError: score_mod or block_mask is neither.

    """

    def __init__(
        self,
        n_vocab: int,
        n_embd: int,
        n_head: int,
        n_positions: int,
        p_dropout: float = 0.1,
        ln_eps: float = 1e-5,
        bias: bool = True,
        backend: TensorBackend | None = None,
        use_fused_kernel: bool = False,
        use_flash_attention: bool = False,
        n_layer: int = 4,
        middle_dim: int = 256,
        compute_dtype: npt.DTypeLike | None = None,
        score_mod: ScoreMod | Sequence[ScoreMod | None] | None = None,
        block_mask: BlockMask | MaskMod | Sequence[BlockMask | MaskMod | None] | None = None,
    ) -> None:
        super().__init__()
        backend = SimpleBackend if backend is None else backend
        self.backend = backend
        self.compute_dtype = (
            None if compute_dtype is None else check_dtype(compute_dtype, backend.cuda)
        )
        self.n_vocab = as_size(n_vocab, "n_vocab")
        self.n_embd = as_size(n_embd, "n_embd")
        self.n_head = as_size(n_head, "n_head")
        self.n_positions = as_size(n_positions, "n_positions")
        self.n_layer = as_size(n_layer, "n_layer")
        self._positions: Tensor | None = None
        self.token_embeddings = Embedding(n_vocab, n_embd, backend)
        self.position_embeddings = Embedding(n_positions, n_embd, backend)
        score_mods = _of_layers(score_mod, "score_mod", self.n_layer)
        block_masks = _of_layers(block_mask, "block_mask", self.n_layer)
        for mask in block_masks:
            if isinstance(mask, BlockMask) and mask.seq_lengths != (n_positions, n_positions):
                raise ValueError(
                    f"block_mask is for {mask.seq_lengths} queries and keys, the model has "
                    f"n_positions = {n_positions}"
                )
        for number in range(1, self.n_layer + 1):
            layer = TransformerLayer(
                n_embd,
                n_head,
                p_dropout,
                ln_eps,
                bias,
                backend,
                use_fused_kernel,
                use_flash_attention,
                middle_dim,
                score_mods[number - 1],
                block_masks[number - 1],
            )
            setattr(self, f"t_layer_{number}", layer)
        self.dropout = Dropout(p_dropout)
        self.ln = LayerNorm1d(n_embd, ln_eps, backend)
        self.lm_head = Linear(n_embd, n_vocab, bias, backend)

    def layers(self) -> list[TransformerLayer]:
        """The transformer layers, first to last."""
        return [getattr(self, f"t_layer_{number}") for number in range(1, self.n_layer + 1)]

    def _all_positions(self) -> Tensor:
        """0 ... n_positions - 1, of shape (1, n_positions); made once, where the weights are."""
        backend = self.position_embeddings.weights.value.backend
        if self._positions is None or self._positions.backend is not backend:
            numbers = np.arange(self.n_positions, dtype=get_default_dtype()).reshape(1, -1)
            self._positions = tensor_from_numpy(numbers, backend)
        made: Tensor = self._positions
        return made

    def init_cache(self, batch: int = 1) -> list[KeyValueCache]:
        """An empty cache for each layer, with room for n_positions."""
        dtype = self.compute_dtype or self.token_embeddings.weights.value.dtype
        head_dim = self.n_embd // self.n_head
        return [
            KeyValueCache(batch, self.n_head, self.n_positions, head_dim, dtype)
            for _ in range(self.n_layer)
        ]

    def forward(self, idx: Tensor, cache: list[KeyValueCache] | None = None) -> Tensor:
        """Token numbers (B, T), stored as floats -> scores (B, T, n_vocab), in the compute dtype.

        Args:
            idx: the tokens; with a cache, those that follow what it holds.
            cache: from `init_cache`; it is extended.

        Raises:
            ValueError: more than n_positions tokens, or a token outside the vocabulary.

        """
        check_tensor(idx, "idx")
        if idx.dims != 2:
            raise ValueError(f"idx must have shape (batch, seq_len), got {idx.shape}")
        start = 0 if cache is None else cache[0].length
        end = start + idx.shape[1]
        if end > self.n_positions:
            raise ValueError(f"the model has {self.n_positions} positions, {end} are wanted")
        positions = self._all_positions()[:, start:end]
        x = self.token_embeddings(idx) + self.position_embeddings(positions)
        if self.compute_dtype is not None:
            x = x.to(self.compute_dtype)  # all layers compute in the dtype of their input
        x = self.dropout(x)
        for number, layer in enumerate(self.layers()):
            x = layer(x, None if cache is None else cache[number])
        logits: Tensor = self.lm_head(self.ln(x))
        return logits


__all__ = ["DecoderLM", "FeedForward", "KeyValueCache", "MultiHeadAttention", "TransformerLayer"]
