"""The strategies give what they promise, and the checks built on them can fail."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

from minitorch import testing
from minitorch.tensor import Tensor
from minitorch.testing import AttentionInputs, MathTest, MathTestVariable, Shape

quick = settings(max_examples=50)
no_shrinking = settings(max_examples=1000, phases=[Phase.generate], database=None)


def test_the_kinds_of_math_tests() -> None:
    one, two, red = MathTest._tests()
    assert [name for name, _ in two] == ["add2", "div2", "eq2", "gt2", "lt2", "mul2"]
    assert [name for name, _ in red] == ["mean_full_red", "mean_red", "sum_red"]
    assert len(one) == 14
    for kind, compared in zip((one, two, red), MathTestVariable._comp_testing(), strict=True):
        assert [entry[0] for entry in compared] == [name for name, _ in kind]


def test_no_constant_that_hypothesis_would_mine() -> None:
    """hypothesis tries float literals of the source: a jump must not be among them."""
    import ast
    import inspect

    literals = {
        node.value
        for node in ast.walk(ast.parse(inspect.getsource(MathTest)))
        if isinstance(node, ast.Constant) and isinstance(node.value, float)
    }
    assert literals == set()


@quick
@given(testing.broadcastable_shapes(3, min_size=0))
def test_broadcastable_shapes(shapes: tuple[Shape, ...]) -> None:
    assert len(shapes) == 3
    np.broadcast_shapes(*shapes)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(layout: str) -> None:
    values = np.arange(24.0).reshape(2, 3, 4)
    array = testing.with_layout(values, layout)
    assert array.shape == values.shape and array is not values
    if layout == "expanded":
        assert array.strides[0] == 0
        assert np.array_equal(array, np.broadcast_to(values[:1], values.shape))
    else:
        assert np.array_equal(array, values)
        assert array.flags.c_contiguous == (layout == "contiguous")


def test_an_unknown_layout() -> None:
    with pytest.raises(ValueError, match="layout must be one of contiguous"):
        testing.with_layout(np.zeros(3), "diagonal")


@quick
@given(testing.tensors(testing.shapes(min_dims=0, min_size=0), low=-1.0, high=3.0))
def test_tensors_hold_the_numbers_asked_for(x: Tensor) -> None:
    array = x.to_numpy()
    assert array.dtype in (np.float32, np.float64)
    assert array.shape == x.shape and x.requires_grad()
    assert np.all((array >= -1) & (array <= 3))


@pytest.mark.parametrize(
    "wanted",
    [
        lambda x: x.dims == 3 and x._tensor.strides[0] == 0 and x.shape[0] > 1,
        lambda x: x.size == 0,
        lambda x: not x._tensor.is_contiguous() and 0 not in x._tensor.strides,
        lambda x: x.dtype == np.float32,
    ],
)
def test_tensors_come_in_every_kind(wanted: Any) -> None:
    find(testing.tensors(testing.shapes(min_size=0)), wanted, settings=no_shrinking)


@quick
@given(testing.attention_inputs())
def test_attention_inputs_are_valid(inputs: AttentionInputs) -> None:
    out, logsumexp = inputs.query.flash_attention(
        inputs.key, inputs.value, **inputs.options, return_lse=True
    )
    assert out.shape[-2:] == (inputs.query.shape[-2], inputs.value.shape[-1])
    assert logsumexp.shape == out.shape[:-1]


@pytest.mark.parametrize(
    "wanted",
    [
        lambda o: o["attn_mask"] is not None and o["attn_mask"].dtype == np.bool_,
        lambda o: o["attn_mask"] is not None and np.isneginf(o["attn_mask"]).any(),
        lambda o: o["enable_gqa"] and o["is_causal"] == "bottom-right",
        lambda o: o["window"] is not None and o["dropout_p"] > 0,
    ],
)
def test_attention_inputs_come_in_every_kind(wanted: Any) -> None:
    found = find(
        testing.attention_inputs(), lambda inputs: wanted(inputs.options), settings=no_shrinking
    )
    assert wanted(found.options)


@quick
@given(st.data())
def test_without_dropout(data: st.DataObject) -> None:
    inputs = data.draw(testing.attention_inputs(dropout=False, min_seqlen=1))
    assert inputs.options["dropout_p"] == 0.0
    assert inputs.query.size > 0


def test_hypothesis_is_not_needed_to_import() -> None:
    code = "import sys; sys.modules['hypothesis'] = None; import minitorch.testing"
    subprocess.run([sys.executable, "-c", code], check=True)
