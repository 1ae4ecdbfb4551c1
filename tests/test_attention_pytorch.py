"""FlashAttention, argument by argument, against PyTorch's `scaled_dot_product_attention`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

import minitorch
from minitorch.kernels.flash_attention.problem import AttentionProblem
from minitorch.testing import AttentionInputs, attention_inputs

torch = pytest.importorskip("torch")

FAST = minitorch.TensorBackend(minitorch.FastOps)


def additive_mask(inputs: AttentionInputs, problem: AttentionProblem) -> np.ndarray[Any, Any]:
    """Every rule of the call as one mask (..., H, Nq, Nk), as PyTorch takes no two at once."""
    mask = np.where(problem.allowed_positions(), 0.0, -np.inf)
    given_mask = inputs.options["attn_mask"]
    if given_mask is not None:
        array = np.asarray(given_mask)
        mask = mask + (np.where(array, 0.0, -np.inf) if array.dtype == np.bool_ else array)
    return np.broadcast_to(mask, (*problem.logsumexp_shape, problem.seqlen_k)).copy()


@settings(max_examples=80, deadline=None)
@given(inputs=attention_inputs(FAST, dtypes=(np.float64,), min_seqlen=1, dropout=False))
def test_value_and_gradients_are_those_of_pytorch(inputs: AttentionInputs) -> None:
    leaves = [x.detach() for x in (inputs.query, inputs.key, inputs.value)]
    for x in leaves:
        x.requires_grad_(True)
    query, key, value = leaves
    out = query.flash_attention(key, value, **inputs.options)
    arguments = {k: v for k, v in inputs.options.items() if k != "attn_mask"}
    problem = AttentionProblem.of(query.shape, key.shape, value.shape, np.float64, **arguments)
    mask = additive_mask(inputs, problem)
    seen = np.isfinite(mask.max(-1))  # (..., H, Nq): rows that see a key; PyTorch has NaN elsewhere
    theirs = [torch.from_numpy(x.to_numpy()).requires_grad_() for x in leaves]
    q, k, v = theirs
    if inputs.options["enable_gqa"]:
        group = q.shape[-3] // k.shape[-3]
        k, v = k.repeat_interleave(group, -3), v.repeat_interleave(group, -3)
    q, k, v = (x.expand(*mask.shape[:-2], *x.shape[-2:]) for x in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=torch.from_numpy(mask), scale=problem.scale
    )
    np.testing.assert_allclose(
        out.to_numpy()[seen], expected.detach().numpy()[seen], rtol=1e-9, atol=1e-9
    )
    assert (out.to_numpy()[~seen] == 0).all()
    if not seen.all():
        return
    weights = np.random.default_rng(0).normal(size=out.shape)
    out.backward(minitorch.tensor(weights, FAST, False))
    expected.backward(torch.from_numpy(weights))
    for ours, reference in zip(leaves, theirs, strict=True):
        assert ours.grad is not None
        np.testing.assert_allclose(
            ours.grad.to_numpy(), reference.grad.numpy(), rtol=1e-8, atol=1e-9
        )
