"""Attention in PyTorch's autograd: derivatives, random numbers, errors that stay what they are."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

import minitorch
from tests.torch_calls import draw, gradients, inputs, reference, torch

flash_attention = minitorch.flash_attention
NOT_TWICE = "a first derivative and no second"
NOT_FORWARD = "no forward-mode derivative"


# ----- derivatives -----


def test_gradcheck() -> None:
    mask = draw(3, 5, seed=7)
    torch.autograd.gradcheck(
        lambda q, k, v, m: flash_attention(q, k, v, attn_mask=m, return_lse=True), (*inputs(), mask)
    )
    for n in range(2):  # the other gets no gradient at all

        def one(q: Any, k: Any, v: Any, m: Any, n: int = n) -> Any:
            return flash_attention(q, k, v, attn_mask=m, return_lse=True)[n]

        torch.autograd.gradcheck(one, (*inputs(), mask))


def second_derivatives() -> list[Callable[[], Any]]:
    q, k, v = inputs()
    mask = draw(3, 5, seed=7)

    def f(*x: Any) -> Any:
        return flash_attention(*x[:3], attn_mask=x[3])

    def again(number: int) -> Any:
        leaves = (q, k, v, mask)
        (g,) = torch.autograd.grad((f(*leaves) ** 2).sum(), leaves[number], create_graph=True)
        return (g.sum() + 0 * sum(x.sum() for x in leaves)).backward()

    return [
        *(partial(again, n) for n in range(4)),
        lambda: torch.autograd.gradgradcheck(f, (q, k, v, mask)),
        lambda: torch.autograd.functional.hessian(lambda x: f(x, k, v, mask).sum(), q),
        lambda: torch.autograd.functional.jvp(lambda x: f(x, k, v, mask), q, q),
        lambda: torch.func.jacrev(torch.func.jacrev(lambda x: f(x, k, v, mask)))(q),
    ]


@pytest.mark.parametrize("number", range(8))
def test_second_derivatives_are_refused(number: int) -> None:
    call = second_derivatives()[number]
    with pytest.raises(RuntimeError, match=NOT_TWICE):
        call()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # of torch itself
def test_forward_mode_is_refused() -> None:
    q, k, v = inputs(grad=False)
    calls: list[Callable[[], Any]] = [
        lambda: torch.func.jvp(lambda x: flash_attention(x, k, v), (q,), (q,)),
        lambda: torch.func.hessian(lambda x: flash_attention(x, k, v).sum())(q),
        lambda: torch.func.jacfwd(lambda x: flash_attention(x, k, v))(q),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=NOT_FORWARD):
            call()
    forward = torch.autograd.forward_ad
    with forward.dual_level(), pytest.raises(RuntimeError, match=NOT_FORWARD):
        flash_attention(forward.make_dual(q, q), k, v)


def test_first_derivatives_with_create_graph() -> None:
    leaves = inputs()
    found = [
        torch.autograd.grad((f(*leaves) ** 2).sum(), leaves, create_graph=True)
        for f in (flash_attention, reference)
    ]
    for ours, theirs in zip(*found, strict=True):
        assert ours.requires_grad
        torch.testing.assert_close(ours, theirs)


def test_graphs_are_kept_or_freed() -> None:
    q, k, v = inputs()
    out = flash_attention(q, k, v).sum()
    out.backward(retain_graph=True)
    once = q.grad.clone()
    out.backward()
    torch.testing.assert_close(q.grad, 2 * once)
    with pytest.raises(RuntimeError, match="a second time"):
        out.backward()


@pytest.mark.parametrize("written", ["query", "key", "value", "mask", "out", "logsumexp"])
@pytest.mark.parametrize("return_lse", [False, True])
def test_writes_in_place_are_noticed(written: str, return_lse: bool) -> None:
    q, k, v = inputs()
    mask = draw(3, 5, grad=False)
    tensors = {"query": q * 1, "key": k * 1, "value": v * 1}
    found = flash_attention(*tensors.values(), attn_mask=mask, return_lse=True)
    if not return_lse and written in ("out", "logsumexp"):
        written, found = "out", (flash_attention(*tensors.values(), attn_mask=mask),)
    tensors |= {"mask": mask} | dict(zip(("out", "logsumexp"), found, strict=False))
    tensors[written].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(x.sum() for x in found).backward()


def test_hooks_on_saved_tensors() -> None:
    """All that backward needs passes through them: here it comes back from numpy."""
    leaves = [*inputs(), draw(3, 5, seed=7)]

    def call(*x: Any) -> Any:
        return flash_attention(*x[:3], attn_mask=x[3], dropout_p=0.3, seed=2**64 - 1)

    expected = gradients(call, *leaves)
    seen: list[Any] = []

    def pack(x: Any) -> Any:
        seen.append(x.shape)
        return x.numpy(force=True).copy()

    with torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy):
        out = call(*leaves)
    assert len(seen) >= 7
    weights = torch.linspace(-1, 2, out.numel()).view(out.shape).double()
    for a, b in zip(torch.autograd.grad(out, leaves, weights), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_without_a_graph() -> None:
    q, k, v = inputs()
    with torch.no_grad():
        assert not flash_attention(q, k, v).requires_grad
    with torch.inference_mode():
        out = flash_attention(q, k, v)
        assert out.is_inference()
        flash_attention(out, out, out)
    assert flash_attention(q.detach(), k, v.detach()).requires_grad
    assert not flash_attention(*(x.detach() for x in (q, k, v))).requires_grad


# ----- random numbers -----


def test_seeds_come_from_torchs_generator() -> None:
    q, k, v = inputs(grad=False)
    torch.manual_seed(1)
    first, second = (flash_attention(q, k, v, dropout_p=0.5) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    assert torch.equal(flash_attention(*leaves, dropout_p=0.5), first)
    state, ours = torch.get_rng_state(), str(minitorch.get_rng_state())
    explicit = [flash_attention(q, k, v, dropout_p=0.5, seed=3) for _ in range(2)]
    assert torch.equal(*explicit)
    with pytest.raises(ValueError, match="window"):
        flash_attention(q, k, v, dropout_p=0.5, window=3)
    flash_attention(q, k, v)
    assert torch.equal(torch.get_rng_state(), state) and str(minitorch.get_rng_state()) == ours
    with torch.random.fork_rng():
        flash_attention(q, k, v, dropout_p=0.5)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_draw_the_same_mask(use_reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    leaves = inputs()

    def call(*x: Any) -> Any:
        return flash_attention(*x, dropout_p=0.5)

    torch.manual_seed(5)
    call(*leaves).sum().backward()
    expected = [x.grad.clone() for x in leaves]
    after = torch.rand(1)
    for x in leaves:
        x.grad = None
    torch.manual_seed(5)
    checkpoint(call, *leaves, use_reentrant=use_reentrant).sum().backward()
    for x, grad in zip(leaves, expected, strict=True):
        assert torch.equal(x.grad, grad)
    assert torch.equal(torch.rand(1), after)


def test_a_checkpoint_that_forgets_random_numbers() -> None:
    """Then backward is that of the pass computed anew, mask and output of one draw."""
    from torch.utils.checkpoint import checkpoint

    leaves, states = inputs(), []

    def call(*x: Any) -> Any:
        states.append(torch.get_rng_state())
        return flash_attention(*x, dropout_p=0.5)

    out = checkpoint(call, *leaves, use_reentrant=False, preserve_rng_state=False)
    ours = torch.autograd.grad(out.sum(), leaves)
    torch.set_rng_state(states[1])
    for a, b in zip(ours, torch.autograd.grad(call(*leaves).sum(), leaves), strict=True):
        assert torch.equal(a, b)


# ----- errors of others -----


def test_errors_of_torch_stay_what_they_are() -> None:
    """The result dies while an error is on its way: our memory goes back and the error is kept."""
    q, k, v = inputs(grad=False)
    gc.collect()
    with pytest.raises(RuntimeError, match=r"shape '.* is invalid"):
        flash_attention(q, k, v).view(99, 99)
    with pytest.raises(IndexError, match="out of range"):
        flash_attention(q, k, v).sum(9)
    with pytest.raises(TypeError):
        flash_attention(q, k, v) + "text"
    with pytest.raises(RuntimeError, match=r"shape '.* is invalid"):
        torch.from_dlpack(minitorch.tensor([1.0, 2.0])).view(3, 3)


def test_errors_inside_a_checkpoint() -> None:
    from torch.utils.checkpoint import checkpoint

    def call(q: Any, k: Any, v: Any) -> Any:
        try:
            flash_attention(q, k, v).view(99, 99)
        except RuntimeError:
            return flash_attention(q, k, v) * 2
        raise AssertionError

    for use_reentrant in (True, False):
        leaves = inputs()
        checkpoint(call, *leaves, use_reentrant=use_reentrant).sum().backward()
        (expected,) = torch.autograd.grad(2 * flash_attention(*leaves).sum(), leaves[0])
        torch.testing.assert_close(leaves[0].grad, expected)
