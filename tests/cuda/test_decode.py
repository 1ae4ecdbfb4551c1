"""Flash-Decoding (few queries, many keys): the rules of tests/attention.py, and its splits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from minitorch.kernels.flash_attention.decode import launch as decode
from minitorch.kernels.flash_attention.decode.forward import MOST_SPLITS
from minitorch.kernels.flash_attention.launch import heads_of
from minitorch.kernels.flash_attention.problem import AttentionProblem
from minitorch.kernels.gpu.runtime import SIMULATED
from tests.attention import Rules
from tests.attention_calls import TOLERANCE, call_of, check, random
from tests.attention_families import DECODE
from tests.cuda.attention import forward_by_cuda


class TestDecode(Rules):
    family = DECODE

    def test_splits_and_rows_of_several_blocks(self) -> None:
        """Five heads of queries to one of keys: two blocks of rows, several splits."""
        keys = 4 * decode.KEYS_OF_A_SPLIT + 5
        shapes = [(1, 5, 1, 8), (1, 1, keys, 8), (1, 1, keys, 8)]
        problem = described(shapes)
        assert decode.cuts_of(problem, heads_of(problem)).splits > 1
        check(DECODE, shapes, "float64", enable_gqa=True, window=(None, keys // 2))

    def test_splits_that_a_row_sees_nothing_of(self) -> None:
        """A mask may hide all keys of a split, or of a row: output 0, logsumexp -inf."""
        keys = 3 * decode.KEYS_OF_A_SPLIT
        allowed = np.ones((3, keys), bool)
        allowed[0, : 2 * decode.KEYS_OF_A_SPLIT] = False
        allowed[1] = False
        check(DECODE, [(3, 8), (keys, 8), (keys, 8)], "float32", mask=allowed)

    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    def test_what_is_not_seen_is_not_read(self, dtype: str) -> None:
        """NaN in the cache before the window, and beyond its end."""
        used, room = (11, 16) if SIMULATED else (700, 1024)
        begin = used // 2
        caches = [random(1, 2, room, 8, seed=n) for n in (1, 2)]
        for cache in caches:
            cache[:, :, used:] = np.nan
            cache[:, :, :begin] = np.nan
        q, window = random(1, 2, 1, 8), (used - 1 - begin, None)
        call = call_of(DECODE, [q, *caches], dtype)
        tensors = [call.tensors[0], *(x[:, :, :used].detach() for x in call.tensors[1:3])]
        options: dict[str, Any] = {"is_causal": "bottom-right", "window": window}
        q_shape, k_shape, v_shape = (t.shape for t in tensors)
        problem = AttentionProblem.of(q_shape, k_shape, v_shape, tensors[0].dtype, **options)
        tensors.append(call.tensors[3])
        call = call._replace(tensors=tensors, options=options, problem=problem)
        seen = call_of(DECODE, [q, *(cache[:, :, begin:used] for cache in caches)], dtype)
        out, want = (np.asarray(forward_by_cuda(x)[0]).astype(float) for x in (call, seen))
        np.testing.assert_allclose(out, want, atol=TOLERANCE[dtype])


def described(shapes: Any, **arguments: Any) -> AttentionProblem:
    q, k, v = shapes
    return AttentionProblem.of(q, k, v, "float32", enable_gqa=True, **arguments)


def test_the_number_of_splits() -> None:
    """Enough for a large GPU from one head on, but none that is short; one for many heads."""

    def cuts(heads: int, keys: int, **arguments: Any) -> decode.Cuts:
        problem = described([(1, heads, 1, 64), *[(1, heads, keys, 64)] * 2], **arguments)
        return decode.cuts_of(problem, heads_of(problem))

    least = decode.KEYS_OF_A_SPLIT
    assert cuts(1, least - 1).splits == 1
    assert cuts(1, 1 << 17).splits == MOST_SPLITS
    assert cuts(decode.BLOCKS, 1 << 17).splits == 1
    assert cuts(1, 0) == decode.Cuts(0, 0, 0, 1)
    for keys in (least * 3 + 1, least * 7, 1 << 16):
        found = cuts(4, keys)
        assert found.split_keys * (found.splits - 1) < keys <= found.split_keys * found.splits
    window = cuts(1, 1 << 16, is_causal="bottom-right", window=(99, 0))
    assert (window.begin, window.end) == ((1 << 16) - 100, 1 << 16)
