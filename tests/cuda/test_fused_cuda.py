"""The fused kernels of the GPU against plain numpy in float64, on small shapes of every kind."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitorch.kernels import (
    cross_entropy_cuda,
    dropout_cuda,
    embedding_cuda,
    gelu_cuda,
    layernorm_cuda,
    reduce_cuda,
    softmax_cuda,
)
from minitorch.kernels.gpu import rows as rows_cuda
from minitorch.kernels.gpu import runtime
from minitorch.kernels.gpu.runtime import SIMULATED
from minitorch.kernels.philox import vector_dropout_mask
from tests.cuda.kernel_arrays import (
    DTYPES,
    NAMES,
    Array,
    assert_close,
    empty,
    exact,
    few,
    names,
    random,
    real_name,
    seeds,
    to_device,
    to_host,
)


def softmax_reference(x: Array) -> Array:
    top = x.max(-1, keepdims=True)
    e = np.exp(x - np.where(np.isneginf(top), 0, top))
    total = e.sum(-1, keepdims=True)
    return np.asarray(e / np.where(total == 0, 1, total))


# Rows of one warp, of several values to a thread, of a block; what no vector divides.
COLUMNS = st.sampled_from([1, 3, 8, 31, 64, 100, 130, 256])
LONG = [1100] if SIMULATED else [1100, 2048, 4100, 16384, 33000, 70001]


# ----- softmax -----


@few
@given(seeds, names, st.integers(1, 6), COLUMNS)
def test_softmax(seed: int, name: str, rows: int, columns: int) -> None:
    check_softmax(seed, name, rows, columns)


@pytest.mark.parametrize("columns", LONG)
@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_softmax_of_long_rows(name: str, columns: int) -> None:
    check_softmax(3, name, 2, columns)


def test_rows_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    layernorm_cuda.backward_shape.cache_clear()
    layernorm_cuda.backward_blocks.cache_clear()
    for module in (softmax_cuda, layernorm_cuda, cross_entropy_cuda):
        monkeypatch.setattr(module, "row_shape", short_teams)
    check_softmax(5, "float32", 3, 1300)
    check_cross_entropy(5, "float32", 3, 1300)
    check_cross_entropy(5, "float32", 3, 1300, large=1e8)
    check_logsumexp_of_large_numbers("float32", 1300, 1e8)
    check_layernorm(5, "float32", "float32", 3, 1300)
    layernorm_cuda.backward_shape.cache_clear()
    layernorm_cuda.backward_blocks.cache_clear()


def short_teams(
    name: str, columns: int, kept: int, rows: int = 4, most_threads: int = 32
) -> rows_cuda.RowShape:
    shape = rows_cuda.row_shape(name, columns, kept, rows, min(most_threads, 32))
    assert shape.tiled
    return shape


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("columns", [3, 70, 1100])
def test_logsumexp_of_infinities(name: str, columns: int) -> None:
    """inf where an element is, NaN where one is NaN, and as ever beside such a row."""
    x = random(2, name, 6, columns)
    x[0, -1] = x[1, 0] = x[1, -1] = x[2, 0] = np.inf
    x[1, 1] = -np.inf
    x[2, -1] = x[3, 0] = np.nan
    x[4] = -np.inf
    total = empty(name, 6)
    softmax_cuda.logsumexp_forward(name, to_device(x), total, 6, columns)
    expected = [np.inf, np.inf, np.nan, np.nan, -np.inf, np.log(np.exp(exact(x[5])).sum())]
    assert_close(to_host(total, name, 6), np.array(expected), name)

    dx = empty(name, 6, columns)
    dtotal = np.ones(6, x.dtype)
    softmax_cuda.logsumexp_backward(name, to_device(dtotal), to_device(x), total, dx, 6, columns)
    got = to_host(dx, name, 6, columns).astype(np.float64)
    assert np.array_equal(np.isnan(got[:2]), np.isposinf(exact(x[:2])))
    assert not np.nan_to_num(got[:2]).any()  # as in PyTorch
    assert np.isnan(got[2:4]).all() and not got[4].any() and got[5].sum() == pytest.approx(1, 0.02)


def check_softmax(seed: int, name: str, rows: int, columns: int) -> None:
    x = random(seed, name, rows, columns)
    x[0, columns // 2 :] = -np.inf
    x[-1] = -np.inf  # nothing to attend to
    grad = random(seed + 1, name, rows, columns)
    y, dx = empty(name, rows, columns), empty(name, rows, columns)
    softmax_cuda.forward(name, to_device(x), y, rows, columns)
    expected = softmax_reference(exact(x))
    assert_close(to_host(y, name, rows, columns), expected, name)

    kept = exact(to_host(y, name, rows, columns))
    softmax_cuda.backward(name, to_device(grad), y, dx, rows, columns)
    dot = (exact(grad) * kept).sum(-1, keepdims=True)
    assert_close(to_host(dx, name, rows, columns), kept * (exact(grad) - dot), name)

    total = empty(name, rows)
    softmax_cuda.logsumexp_forward(name, to_device(x), total, rows, columns)
    with np.errstate(divide="ignore"):
        logsumexp = np.log(np.exp(exact(x)).sum(-1))
    assert_close(to_host(total, name, rows), logsumexp, name)

    dtotal = random(seed + 2, name, rows)
    dx = empty(name, rows, columns)
    softmax_cuda.logsumexp_backward(name, to_device(dtotal), to_device(x), total, dx, rows, columns)
    assert_close(to_host(dx, name, rows, columns), exact(dtotal)[:, None] * expected, name)


@pytest.mark.parametrize("large", [-1e4, 1e4])
@pytest.mark.parametrize("name", NAMES)
def test_logsumexp_of_large_numbers(name: str, large: float) -> None:
    check_logsumexp_of_large_numbers(name, 40, large)


def check_logsumexp_of_large_numbers(name: str, columns: int, large: float) -> None:
    """Gradients are right though the logsumexp has no room for the logarithm."""
    x = random(3, name, 2, columns) + DTYPES[name].type(large)
    total, dx = empty(name, 2), empty(name, 2, columns)
    softmax_cuda.logsumexp_forward(name, to_device(x), total, 2, columns)
    dtotal = random(4, name, 2)
    softmax_cuda.logsumexp_backward(name, to_device(dtotal), to_device(x), total, dx, 2, columns)
    expected = exact(dtotal)[:, None] * softmax_reference(exact(x))
    assert_close(to_host(dx, name, 2, columns), expected, name)


@few
@given(
    seeds,
    names,
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 7, 40])),
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_masked_softmax(
    seed: int, name: str, shape: tuple[int, int, int, int], broadcast: tuple[bool, bool, bool]
) -> None:
    x = random(seed, name, *shape)
    sizes = tuple(1 if one else n for one, n in zip(broadcast, shape[:3], strict=True))
    mask = random(seed + 1, name, *sizes, shape[3])
    mask[..., shape[3] // 2 :] = -np.inf
    elements = [s // mask.itemsize for s in mask.strides]
    strides = [0 if n == 1 else s for n, s in zip(sizes, elements, strict=False)]
    y = empty(name, *shape)
    softmax_cuda.forward(
        name, to_device(x), y, math.prod(shape[:3]), shape[3],
        to_device(mask), (shape[1], shape[2]), (strides[0], strides[1], strides[2]),
    )  # fmt: skip
    assert_close(to_host(y, name, *shape), softmax_reference(exact(x) + exact(mask)), name)


# ----- layer norm -----


@few
@given(seeds, names, st.booleans(), st.integers(1, 7), COLUMNS)
def test_layernorm(seed: int, name: str, wide_weight: bool, rows: int, columns: int) -> None:
    check_layernorm(seed, name, real_name(name) if wide_weight else name, rows, columns)


@pytest.mark.parametrize("columns", LONG)
@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_layernorm_of_long_rows(name: str, columns: int) -> None:
    """Several rows for each team of each block."""
    rows = 9 if SIMULATED else max(150, min(2000, 2**22 // columns))
    check_layernorm(3, name, "float32", rows, columns)


def check_layernorm(seed: int, name: str, weight_name: str, rows: int, columns: int) -> None:
    real, eps = real_name(name), 1e-5
    x = random(seed, name, rows, columns) + DTYPES[name].type(3)
    dy = random(seed + 1, name, rows, columns)
    gamma, beta = random(seed + 2, weight_name, 2, columns)
    y, var, mean = empty(name, rows, columns), empty(real, rows), empty(real, rows)
    layernorm_cuda.forward(
        name, weight_name, to_device(x), to_device(gamma), to_device(beta), eps,
        y, var, mean, rows, columns,
    )  # fmt: skip
    a, g, scale = exact(x), exact(dy), exact(gamma)
    centre, variance = a.mean(-1, keepdims=True), a.var(-1, keepdims=True)
    rstd = 1 / np.sqrt(variance + eps)
    xhat = (a - centre) * rstd
    assert_close(to_host(mean, real, rows), centre[:, 0], real)
    assert_close(to_host(var, real, rows), variance[:, 0], real)
    # A constant row's few last digits are magnified by 1 / sqrt(eps).
    weaker = name if columns > 1 else "bfloat16"
    assert_close(to_host(y, name, rows, columns), xhat * scale + exact(beta), weaker)

    blocks = layernorm_cuda.backward_blocks(name, rows, columns)
    dx, dgamma = empty(name, rows, columns), empty(weight_name, columns)
    dbeta, partials = empty(weight_name, columns), empty(real, blocks, 2, columns)
    layernorm_cuda.backward(
        name, weight_name, to_device(dy), to_device(x), to_device(gamma), var, mean, eps,
        dx, partials, dgamma, dbeta, rows, columns,
    )  # fmt: skip
    gx = g * scale
    expected = rstd * (gx - gx.mean(-1, keepdims=True) - xhat * (gx * xhat).mean(-1, keepdims=True))
    if columns > 1:
        # In a row far from 0, by its own measure, the mean's last digits are magnified.
        far = np.maximum(1.0, np.abs(centre) * rstd)
        assert_close(to_host(dx, name, rows, columns) / far, expected / far, name)
    assert_close(to_host(dgamma, weight_name, columns), (g * xhat).sum(0), weight_name)
    assert_close(to_host(dbeta, weight_name, columns), g.sum(0), weight_name)


@pytest.mark.parametrize(("rows", "columns"), [(2, 5), (2, 33), (3, 128)])
def test_layernorm_of_huge_constant_rows(rows: int, columns: int) -> None:
    """What stands beside a row, and beside the rows, must not become 0 times infinity."""
    x, dy = np.full((rows, columns), 2.0**120, np.float32), random(1, "float32", rows, columns)
    gamma, zeros = random(2, "float32", columns), np.zeros(rows, np.float32)
    mean = np.full(rows, 2.0**120, np.float32)
    blocks = layernorm_cuda.backward_blocks("float32", rows, columns)
    dx, dgamma, dbeta = (empty("float32", *s) for s in ((rows, columns), (columns,), (columns,)))
    layernorm_cuda.backward(
        "float32", "float32", to_device(dy), to_device(x), to_device(gamma), to_device(zeros),
        to_device(mean), 1e-5, dx, empty("float32", blocks, 2, columns), dgamma, dbeta, rows,
        columns,
    )  # fmt: skip
    g = exact(dy) * exact(gamma)
    assert_close(
        to_host(dx, "float32", rows, columns),
        (g - g.mean(-1, keepdims=True)) / 1e-5**0.5,
        "float32",
    )
    assert not to_host(dgamma, "float32", columns).any()
    assert_close(to_host(dbeta, "float32", columns), exact(dy).sum(0), "float32")


def test_layernorm_of_many_rows() -> None:
    """More rows than blocks: each block goes round several times."""
    check_layernorm(7, "float32", "float32", 40 if SIMULATED else 10_000, 48)


def test_layernorm_without_rows() -> None:
    dgamma, dbeta = empty("float32", 5), empty("float32", 5)
    none = empty("float32", 1)
    layernorm_cuda.backward(
        "float32", "float32", none, none, none, none, none, 1e-5,
        none, none, dgamma, dbeta, 0, 5,
    )  # fmt: skip
    assert not dgamma.copy_to_host().any() and not dbeta.copy_to_host().any()


# ----- element by element -----

SIZES = st.integers(1, 300 if SIMULATED else 5000)


@few
@given(seeds, names, SIZES)
def test_gelu(seed: int, name: str, size: int) -> None:
    x, dy = random(seed, name, size) * DTYPES[name].type(3), random(seed + 1, name, size)
    y, dx = empty(name, size), empty(name, size)
    gelu_cuda.forward(name, to_device(x), y, size)
    gelu_cuda.backward(name, to_device(dy), to_device(x), dx, size)
    a, c = exact(x), math.sqrt(2 / math.pi)
    t = np.tanh(c * (a + 0.044715 * a**3))
    assert_close(to_host(y, name, size), 0.5 * a * (1 + t), name)
    slope = 0.5 * (1 + t) + 0.5 * a * (1 - t * t) * c * (1 + 3 * 0.044715 * a**2)
    assert_close(to_host(dx, name, size), exact(dy) * slope, name)


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_gelu_far_from_zero(name: str) -> None:
    x = np.array([-1e38, -1e19, -2e13, -1e4, 1e4, 2e13, 1e19, 1e38], DTYPES[name])
    y, dx = empty(name, 8), empty(name, 8)
    gelu_cuda.forward(name, to_device(x), y, 8)
    np.testing.assert_array_equal(exact(to_host(y, name, 8)), np.maximum(exact(x), 0))
    gelu_cuda.backward(name, to_device(np.ones_like(x)), to_device(x), dx, 8)
    np.testing.assert_array_equal(exact(to_host(dx, name, 8)), exact(x) > 0)


@few
@given(seeds, names, SIZES, st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.integers(0, 2**64 - 1))
def test_dropout(seed: int, name: str, size: int, dropout_p: float, dropout_seed: int) -> None:
    x, offset = random(seed, name, size), seed
    y = empty(name, size)
    device_offset = runtime.cuda.to_device(np.array([offset], np.uint64))
    dropout_cuda.forward(name, to_device(x), y, size, dropout_p, dropout_seed, device_offset)
    key = (dropout_seed + offset) % 2**64
    kept = vector_dropout_mask(size, dropout_p, key)
    factor = 0 if dropout_p == 1 else 1 / (1 - dropout_p)
    assert_close(to_host(y, name, size), np.where(kept, exact(x) * factor, 0), name)


# ----- embedding -----


@few
@given(seeds, names, st.integers(1, 100), st.integers(1, 12), st.sampled_from([1, 6, 8, 40, 150]))
def test_embedding(seed: int, name: str, tokens: int, table: int, width: int) -> None:
    check_embedding(seed, name, tokens, table, width)


@pytest.mark.gpu
@pytest.mark.parametrize("table", [100, 5_000, 50_257])
def test_embedding_of_many_tokens(table: int) -> None:
    check_embedding(2, "float32", 16_384, table, 384)


def check_embedding(seed: int, name: str, tokens: int, table: int, width: int) -> None:
    generator = np.random.default_rng(seed)
    weight = random(seed, name, table, width)
    dy = random(seed + 1, name, tokens, width)
    # Most of the time small: some ids are common, some do not occur.
    ids = np.minimum(generator.geometric(0.4, tokens) - 1, table - 1)
    ids[::3] = generator.integers(0, table, len(ids[::3]))
    device_ids = to_device(ids.astype(np.float32))
    error = runtime.cuda.to_device(np.zeros(1, np.int32))
    y = empty(name, tokens, width)
    embedding_cuda.forward(
        name, "float32", device_ids, to_device(weight), y, error, tokens, width, table
    )
    np.testing.assert_array_equal(to_host(y, name, tokens, width), weight[ids])
    assert error.copy_to_host()[0] == 0

    expected = np.zeros((table, width))
    np.add.at(expected, ids, exact(dy))
    results = []
    for _ in range(2):
        parts = embedding_cuda.workspace(tokens, table)
        work = np.full(parts.size, -1, np.int32)
        work[: parts.starts] = 0
        dweight, partials = empty(name, table, width), empty(real_name(name), parts.tiles, 2, width)
        embedding_cuda.backward(
            name, "float32", to_device(dy), device_ids, runtime.cuda.to_device(work), partials,
            dweight, tokens, width, table,
        )  # fmt: skip
        results.append(to_host(dweight, name, table, width))
    assert_close(results[0], expected, name)
    np.testing.assert_array_equal(results[0], results[1])  # the second run gives the same bits


@pytest.mark.parametrize("wrong", [-1.0, 3.0, 0.5, np.nan, 1e30])
def test_embedding_notes_an_id_that_is_no_row(wrong: float) -> None:
    ids = to_device(np.array([2, wrong, 0], np.float32))
    error = runtime.cuda.to_device(np.zeros(1, np.int32))
    y, weight = empty("float32", 3, 2), random(0, "float32", 3, 2)
    embedding_cuda.forward("float32", "float32", ids, to_device(weight), y, error, 3, 2, 3)
    assert error.copy_to_host()[0] == embedding_cuda.ERROR_BIT
    np.testing.assert_array_equal(to_host(y, "float32", 3, 2)[[0, 2]], weight[[2, 0]])

    parts = embedding_cuda.workspace(3, 3)
    work = runtime.cuda.to_device(np.zeros(parts.size, np.int32))
    dweight, partials = empty("float32", 3, 2), empty("float32", parts.tiles, 2, 2)
    dy = to_device(np.ones((3, 2), np.float32))
    embedding_cuda.backward("float32", "float32", dy, ids, work, partials, dweight, 3, 2, 3)
    np.testing.assert_array_equal(to_host(dweight, "float32", 3, 2), [[1, 1], [0, 0], [1, 1]])


# ----- cross entropy -----


@few
@given(seeds, names, st.integers(1, 6), COLUMNS)
def test_cross_entropy(seed: int, name: str, rows: int, classes: int) -> None:
    check_cross_entropy(seed, name, rows, classes)


@pytest.mark.parametrize("classes", LONG)
@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_cross_entropy_of_many_classes(name: str, classes: int) -> None:
    check_cross_entropy(4, name, 2, classes)


@pytest.mark.parametrize("large", [-1e4, 1e4])
@pytest.mark.parametrize("name", NAMES)
def test_cross_entropy_of_large_logits(name: str, large: float) -> None:
    check_cross_entropy(6, name, 3, 70, large)


def test_cross_entropy_of_a_row_of_minus_infinity() -> None:
    """Loss and gradient are NaN, as in PyTorch; the row beside it is as ever."""
    x = np.array([[-np.inf, -np.inf], [0, 0]], np.float32)
    target, error = to_device(np.zeros(2, np.float32)), to_device(np.zeros(1, np.int32))
    loss, logsumexp, dx = empty("float32", 2), empty("float32", 2), empty("float32", 2, 2)
    kind, device = ("float32", "float32"), to_device(x)
    cross_entropy_cuda.forward(*kind, device, target, loss, logsumexp, error, 2, 2)
    assert_close(to_host(loss, "float32", 2), np.array([np.nan, np.log(2)]), "float32")
    dloss = to_device(np.ones(2, np.float32))
    cross_entropy_cuda.backward(*kind, dloss, device, target, logsumexp, dx, 2, 2)
    expected = np.array([[np.nan, np.nan], [-0.5, 0.5]])
    assert_close(to_host(dx, "float32", 2, 2), expected, "float32")


def check_cross_entropy(seed: int, name: str, rows: int, classes: int, large: float = 0.0) -> None:
    real = real_name(name)
    x = random(seed, name, rows, classes) * DTYPES[name].type(4) + DTYPES[name].type(large)
    target = np.random.default_rng(seed).integers(0, classes, rows)
    dloss = random(seed + 1, real, rows)
    loss, logsumexp = empty(real, rows), empty(real, rows)
    error = runtime.cuda.to_device(np.zeros(1, np.int32))
    device_target = to_device(target.astype(np.float32))
    cross_entropy_cuda.forward(
        name, "float32", to_device(x), device_target, loss, logsumexp, error, rows, classes
    )
    a, every = exact(x), np.arange(rows)
    below = a - a.max(-1, keepdims=True)
    log_sum = np.log(np.exp(below).sum(-1))
    assert_close(to_host(logsumexp, real, rows), a.max(-1) + log_sum, real)
    assert_close(to_host(loss, real, rows), log_sum - below[every, target], real)
    assert error.copy_to_host()[0] == 0

    dx = empty(name, rows, classes)
    cross_entropy_cuda.backward(
        name, "float32", to_device(dloss), to_device(x), device_target, logsumexp, dx, rows, classes
    )
    share = np.exp(below - log_sum[:, None])
    share[every, target] -= 1
    assert_close(to_host(dx, name, rows, classes), exact(dloss)[:, None] * share, name)


@pytest.mark.parametrize("wrong", [-1.0, 3.0, 0.5, np.nan])
def test_cross_entropy_notes_a_target_that_is_no_class(wrong: float) -> None:
    x = random(0, "float32", 2, 3)
    error = runtime.cuda.to_device(np.zeros(1, np.int32))
    loss, logsumexp = empty("float32", 2), empty("float32", 2)
    target = to_device(np.array([wrong, 1], np.float32))
    cross_entropy_cuda.forward(
        "float32", "float32", to_device(x), target, loss, logsumexp, error, 2, 3
    )
    assert error.copy_to_host()[0] == cross_entropy_cuda.ERROR_BIT
    losses = loss.copy_to_host()
    assert np.isnan(losses[0]) and np.isfinite(losses[1])


# ----- races -----


@pytest.mark.parametrize("columns", [40, 1100])
def test_rows_have_no_races(columns: int) -> None:
    check_softmax(1, "float32", 3, columns)
    check_layernorm(1, "float32", "float32", 3, columns)
    check_cross_entropy(1, "float32", 3, columns)


def test_embedding_and_sums_have_no_races() -> None:
    check_embedding(1, "float32", 70, 5, 8)
    x, out = random(1, "float32", 70, 40), empty("float32", 40)
    partials = empty("float32", reduce_cuda.column_parts("float32", 70, 40), 40)
    reduce_cuda.column_sums("float32", "float32", to_device(x), partials, out, 70, 40)
    assert_close(to_host(out, "float32", 40), exact(x).sum(0), "float32")
