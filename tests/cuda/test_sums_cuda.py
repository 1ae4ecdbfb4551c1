"""The GPU's sums of columns and of squares against plain numpy in float64."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from minitorch.kernels import reduce_cuda
from tests.cuda.kernel_arrays import (
    DTYPES,
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


@few
@given(seeds, names, st.booleans(), st.integers(0, 200), st.sampled_from([1, 6, 40, 136]))
def test_column_sums(seed: int, name: str, wide: bool, rows: int, columns: int) -> None:
    x = random(seed, name, rows, columns)
    out_name = real_name(name) if wide else name
    out = empty(out_name, columns)
    parts = reduce_cuda.column_parts(name, rows, columns)
    partials = empty(real_name(name), parts, columns)
    device = to_device(x) if rows else empty(name, 1)
    reduce_cuda.column_sums(name, out_name, device, partials, out, rows, columns)
    assert_close(to_host(out, out_name, columns), exact(x).sum(0), out_name)


@few
@given(seeds, names, st.integers(1, 2000), st.sampled_from([0.0, np.nan, np.inf, -np.inf]))
def test_sum_of_squares(seed: int, name: str, size: int, special: float) -> None:
    x, real = random(seed, name, size), real_name(name)
    if special:
        x[seed % size] = special
    blocks = reduce_cuda.square_blocks(size)
    partials, total = empty(real, blocks + 1), empty(real, 1)
    partials[:1] = np.zeros(1, DTYPES[real])
    found = to_device(np.zeros(1, np.float32))
    reduce_cuda.sum_of_squares(name, to_device(x), size, partials, 1, found)
    assert found.copy_to_host()[0] == (1 if special else 0)
    if not special:
        reduce_cuda.total(real, partials, blocks + 1, total)
        assert_close(to_host(total, real, 1), np.array([np.square(exact(x)).sum()]), real)
