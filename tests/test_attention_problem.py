"""What an attention call may not ask for: errors of `AttentionProblem.of`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from minitorch.kernels.flash_attention.problem import AttentionProblem


@pytest.mark.parametrize(
    "shapes, arguments, error, message",
    [
        (((5, 4), (6, 3), (6, 4)), {}, ValueError, "head size"),
        (((5, 4), (6, 4), (7, 4)), {}, ValueError, "number of keys"),
        (((4,), (6, 4), (6, 4)), {}, ValueError, "query has shape"),
        (((2, 5, 4), (3, 6, 4), (3, 6, 4)), {}, ValueError, "do not broadcast.*enable_gqa"),
        (
            ((5, 5, 4), (3, 6, 4), (3, 6, 4)),
            {"enable_gqa": True},
            ValueError,
            "5 heads and key has 3",
        ),
        (((5, 4), (6, 4), (6, 4)), {"enable_gqa": True}, ValueError, "dimension of heads"),
        (((5, 4), (6, 4), (6, 4)), {"is_causal": "left"}, ValueError, "is_causal is 'left'"),
        (((5, 4), (6, 4), (6, 4)), {"window": (1, -2)}, ValueError, "window is"),
        (((5, 4), (6, 4), (6, 4)), {"window": 3}, ValueError, "a pair"),
        (((5, 4), (6, 4), (6, 4)), {"dropout_p": 1.5}, ValueError, "dropout_p is 1.5"),
        (((5, 4), (6, 4), (6, 4)), {"scale": float("nan")}, ValueError, "scale is nan"),
        (((5, 4), (6, 4), (6, 4)), {"seed": -1}, ValueError, "seed is -1"),
        (
            ((5, 4), (6, 4), (6, 4)),
            {"attn_mask": np.ones((2, 6), bool)},
            ValueError,
            "broadcasts to",
        ),
        (
            ((5, 4), (6, 4), (6, 4)),
            {"attn_mask": np.ones((5, 6), int)},
            TypeError,
            "attn_mask has dtype",
        ),
    ],
)
def test_errors_name_the_argument(shapes: Any, arguments: Any, error: Any, message: Any) -> None:
    with pytest.raises(error, match=message):
        AttentionProblem.of(shapes[0], shapes[1], shapes[2], np.float32, **arguments)


def test_dtypes_that_are_no_floats() -> None:
    with pytest.raises(TypeError, match="int32"):
        AttentionProblem.of((5, 4), (6, 4), (6, 4), np.int32)
