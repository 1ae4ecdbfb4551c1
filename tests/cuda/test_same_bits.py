"""Calls that compare two versions, by one family of kernels: they are right, and repeatable."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import minitorch
from project.bench import same_bits


@pytest.mark.parametrize("name", ["simt", "decode"])
def test_a_call_by_one_family(name: str) -> None:
    family = replace(same_bits.FAMILIES[name], **same_bits.SIMULATED[name], dtypes=("float32",))
    call = same_bits.draw(np.random.default_rng(2), family)
    call.options.pop("dropout_p", None)
    with same_bits.only(name) as backend:
        assert [m.NAME for m in minitorch.cuda.attention.FLASH_ATTENTION] == [name]
        found = same_bits.computed(call, backend, backward=not family.few)
        again = same_bits.computed(call, backend, backward=not family.few)
    assert same_bits.digest(found) == same_bits.digest(again)
    assert len(minitorch.cuda.attention.FLASH_ATTENTION) > 1
    cpu = minitorch.TensorBackend(minitorch.FastOps)
    wanted = same_bits.computed(call, cpu, backward=not family.few)
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
