"""Score functions and block masks on PyTorch's tensors: against dense attention by PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import minitorch
from minitorch import attention_masks, score_mods

torch = pytest.importorskip("torch")
flex = pytest.importorskip("torch.nn.attention.flex_attention")

B, H, N, D = 2, 4, 12, 8


def drawn(*shape: int, seed: int = 0, dtype: Any = None) -> Any:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=dtype or torch.float64)
    return x.requires_grad_()


def inputs() -> list[Any]:
    return [drawn(B, H, N, D, seed=n) for n in range(3)]


def dense(q: Any, k: Any, v: Any, change: Any, allowed: Any = None) -> Any:
    """Attention of a changed matrix of scores."""
    scores = change(q @ k.transpose(-2, -1) / D**0.5)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    return scores.softmax(-1) @ v


def agree(out: Any, wanted: Any, leaves: list[Any], tolerance: float = 1e-9) -> None:
    weights = torch.cos(torch.arange(out.numel(), dtype=out.dtype)).reshape(out.shape)
    found = torch.autograd.grad((out * weights).sum(), leaves)
    expected = torch.autograd.grad((wanted * weights).sum(), leaves)
    torch.testing.assert_close(out, wanted, rtol=tolerance, atol=tolerance)
    for g, e in zip(found, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=tolerance, atol=tolerance)


POSITIONS = torch.arange(N)[:, None], torch.arange(N)
DISTANCE = POSITIONS[0] - POSITIONS[1]


def test_captured_tensors_get_gradients() -> None:
    """A table, slopes, a number without dimensions, and one of whole numbers beside them."""
    q, k, v = inputs()
    table, slopes, power = drawn(H, 2 * N - 1, seed=4), drawn(H, seed=5), drawn(seed=6)
    near = torch.randint(2 * N - 1, (N, N), generator=torch.Generator().manual_seed(1))
    ids = torch.arange(N) // 5

    def mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        bias = table[h, near[q_idx, kv_idx]] - slopes[h] * abs(q_idx - kv_idx)
        return score * power + bias * (b + 1) + table[h, q_idx - kv_idx + N - 1]

    def same_document(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return ids[q_idx] == ids[kv_idx]

    def change(s: Any) -> Any:
        bias = table[:, near] - slopes[:, None, None] * DISTANCE.abs()
        batch = torch.arange(1, B + 1)[:, None, None, None]
        return s * power + bias * batch + table[:, DISTANCE + N - 1]

    out = minitorch.flash_attention(q, k, v, score_mod=mod, block_mask=same_document)
    wanted = dense(q, k, v, change, ids[:, None] == ids)
    agree(out, wanted, [q, k, v, table, slopes, power])


def test_a_query_that_the_function_also_reads() -> None:
    q, k, v = inputs()

    def mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score + q[b, h, q_idx, 0] * k[b, h, kv_idx, 1]

    out = minitorch.flash_attention(q, k, v, score_mod=mod)
    wanted = dense(q, k, v, lambda s: s + q[..., :1] * k[..., 1][..., None, :])
    agree(out, wanted, [q, k, v])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_gradients_have_the_dtype_of_the_tensor(dtype: str) -> None:
    q, k, v = (x.detach().float().requires_grad_() for x in inputs())
    slopes = drawn(H, seed=5, dtype=torch.float32).detach().to(getattr(torch, dtype))
    slopes.requires_grad_()
    out = minitorch.flash_attention(q, k, v, score_mod=score_mods.alibi(slopes))
    wanted = dense(q, k, v, lambda s: s - slopes.float()[:, None, None] * DISTANCE.abs())
    agree(out, wanted, [q, k, v, slopes], 1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_functions_written_for_flex_attention_give_its_result() -> None:
    q, k, v = (x.detach().float() for x in inputs())
    table = drawn(H, 2 * N - 1, seed=4).detach().float()
    ids = torch.arange(N) // 5

    def mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score + table[h, q_idx - kv_idx + N - 1] * (1 + b)

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (ids[q_idx] == ids[kv_idx]) & (q_idx >= kv_idx)

    blocks = flex.create_block_mask(mask, None, None, N, N, device="cpu", BLOCK_SIZE=4)
    wanted = flex.flex_attention(q, k, v, score_mod=mod, block_mask=blocks)
    for block_mask in (mask, blocks, minitorch.create_block_mask(mask, None, None, N, N, 4)):
        found = minitorch.flash_attention(q, k, v, score_mod=mod, block_mask=block_mask)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_pytorchs_masks_of_blocks_alone() -> None:
    q, k, v = (x.detach().float() for x in inputs())
    counts = torch.tensor([[[1, 2, 0]]], dtype=torch.int32)
    columns = torch.tensor([[[[0, 1, 2], [0, 2, 1], [0, 1, 2]]]], dtype=torch.int32)
    blocks = flex.BlockMask.from_kv_blocks(counts, columns, BLOCK_SIZE=4)
    found = minitorch.flash_attention(q, k, v, block_mask=blocks)
    allowed = torch.zeros(N, N, dtype=torch.bool)
    for row, column in ((0, 0), (1, 0), (1, 2)):
        allowed[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = True
    wanted = dense(q, k, v, lambda s: s, allowed).nan_to_num()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


# ----- PyTorch's autograd -----


def of_slopes(q: Any, k: Any, v: Any, slopes: Any, **options: Any) -> Any:
    def mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score * (1 + b) - slopes[h] * abs(q_idx - kv_idx)

    return minitorch.flash_attention(q, k, v, score_mod=mod, **options)


def test_gradcheck() -> None:
    leaves = [drawn(2, 2, 4, 3, seed=n) for n in range(3)] + [drawn(2, seed=3)]
    assert torch.autograd.gradcheck(of_slopes, leaves)


def test_checkpoints_and_hooks_on_saved_tensors() -> None:
    leaves = [*inputs(), drawn(H, seed=3)]
    wanted = torch.autograd.grad(of_slopes(*leaves).square().sum(), leaves)
    out = torch.utils.checkpoint.checkpoint(of_slopes, *leaves, use_reentrant=False)
    for found, expected in zip(
        torch.autograd.grad(out.square().sum(), leaves), wanted, strict=True
    ):
        assert torch.equal(found, expected)
    seen: list[Any] = []

    def pack(x: Any) -> Any:
        seen.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        of_slopes(*leaves)
    assert any(x is leaves[3] or x.shape == (H,) for x in seen)


def test_a_captured_tensor_that_is_written_to_before_backward_is_noticed() -> None:
    q, k, v = inputs()
    slopes = torch.ones(H, dtype=torch.float64)
    out = of_slopes(q, k, v, slopes)
    slopes += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_an_array_that_is_written_to_before_backward_changes_nothing() -> None:
    (q, k, v), slopes = inputs(), np.ones(H)
    wanted = torch.autograd.grad(of_slopes(q, k, v, slopes.copy()).square().sum(), q)
    out = of_slopes(q, k, v, slopes)
    slopes += 5
    assert torch.equal(torch.autograd.grad(out.square().sum(), q)[0], wanted[0])


def test_functional_gradients_and_vmap_over_captured_tensors() -> None:
    q, k, v = (x.detach() for x in inputs())
    many = drawn(3, H, seed=3).detach()

    def loss(slopes: Any) -> Any:
        return of_slopes(q, k, v, slopes).square().sum()

    wanted = torch.stack([torch.func.grad(loss)(slopes) for slopes in many])
    leaf = many[1].clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(loss(leaf), leaf)[0], wanted[1])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(many), wanted)
    torch.testing.assert_close(torch.func.vmap(loss)(many), torch.stack([*map(loss, many)]))


def test_vmap_over_queries_does_not_move_the_batch() -> None:
    """Within vmap `b` is still the number within the sample."""
    (q, k, v), slopes = (x.detach() for x in inputs()), drawn(H, seed=3).detach()
    many = torch.stack([q, q + 1, q * 2], 2)
    found = torch.func.vmap(of_slopes, in_dims=(2, None, None, None))(many, k, v, slopes)
    for n in range(3):
        torch.testing.assert_close(found[n], of_slopes(many[:, :, n], k, v, slopes))


def test_vmap_with_dropout_draws_for_each_sample_and_backward_drops_the_same() -> None:
    q, k, v = (x.detach().expand(3, -1, -1, -1, -1) for x in inputs())
    slopes = drawn(H, seed=3).detach()

    def out(q: Any, k: Any, v: Any) -> Any:
        return of_slopes(q, k, v, slopes, dropout_p=0.5, seed=11)

    def loss(v: Any) -> Any:
        return (out(q[0], k[0], v) * torch.cos(v)).sum()

    alone = torch.stack(
        [of_slopes(q[0], k[0], v[0], slopes, dropout_p=0.5, seed=11 + n) for n in range(3)]
    )
    mapped = torch.func.vmap(out, randomness="different")(q, k, v)
    torch.testing.assert_close(mapped, alone)
    found = torch.func.vmap(torch.func.grad(loss), randomness="different")(v)
    for n in range(3):
        leaf = v[n].clone().requires_grad_()
        one = of_slopes(q[0], k[0], leaf, slopes, dropout_p=0.5, seed=11 + n)
        expected = torch.autograd.grad((one * torch.cos(leaf)).sum(), leaf)[0]
        torch.testing.assert_close(found[n], expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_callers_break_the_graph_around_it() -> None:
    q, k, v = (x.detach() for x in inputs())
    slopes = drawn(H, seed=3)

    def double(slopes: Any) -> Any:
        return of_slopes(q, k, v, slopes * 2).square().sum()

    compiled = torch.compile(double, backend="eager")
    wanted = torch.autograd.grad(double(slopes), slopes)
    torch.testing.assert_close(torch.autograd.grad(compiled(slopes), slopes), wanted)


# ----- what is told -----


def torch_tanh(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return 2 * torch.tanh(score / 2)


def torch_where(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return torch.where(q_idx > 3, kv_idx > 3, kv_idx < 3)


def clamp(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return score.clamp(-1, 1)


TABLE = torch.zeros(H, 5)


def outside(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return score + TABLE[h, q_idx]


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"score_mod": torch_tanh}, TypeError, r"in `torch_tanh`: torch.tanh .* write np.tanh"),
        ({"block_mask": torch_where}, TypeError, r"in `torch_where`: torch.where .* np.where"),
        ({"score_mod": clamp}, TypeError, r"in `clamp`: `.clamp`: .*numpy's functions"),
        ({"score_mod": outside}, ValueError, "`TABLE` runs from 0 to 11, its size is 5"),
        ({"block_mask": torch.ones(N, N)}, TypeError, "block_mask must be a BlockMask or a func"),
        ({"block_mask": attention_masks.bigbird(9, 3)}, ValueError, "block_mask has shape"),
    ],
)
def test_what_is_wrong_is_told_before_a_seed_is_drawn(options: Any, error: Any, told: str) -> None:
    q, k, v = inputs()
    before = torch.random.get_rng_state()
    with pytest.raises(error, match=told):
        minitorch.flash_attention(q, k, v, dropout_p=0.5, **options)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_tensors_of_two_libraries() -> None:
    q, k, v = inputs()
    ours = minitorch.rand((H,))
    wanted = minitorch.flash_attention(q, k, v, score_mod=score_mods.alibi(ours.to_numpy()))
    ours = ours.detach()
    assert torch.equal(minitorch.flash_attention(q, k, v, score_mod=score_mods.alibi(ours)), wanted)
    ours.requires_grad_(True)
    with pytest.raises(TypeError, match=r"`of_head` of score_mod must be a torch.Tensor"):
        minitorch.flash_attention(q, k, v, score_mod=score_mods.alibi(ours))
    x = minitorch.rand((1, H, 4, 4), minitorch.TensorBackend(minitorch.FastOps))
    for attention in (x.flash_attention, x.attention):
        with pytest.raises(TypeError, match=r"minitorch.as_tensor.of_head.detach"):
            attention(x, x, score_mod=score_mods.alibi(torch.ones(H)))
