"""What each fused operation asks of its arguments, on every backend: one check for each, under its
name and with its parameters.

No backend calls a check, and none can forget it: `guard` puts it before each operation of a class,
and `FusedOps` has every class guarded that is derived from it. So kernels, which compute addresses
from shapes, only meet shapes that fit, and all backends refuse the same calls by the same sentence.
What a check does not say is the same for all dtypes: a tensor has one of ours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from .kernels.flash_attention.variant import NO_VARIANT, VariantInputs

if TYPE_CHECKING:
    from .kernels.flash_attention.problem import AttentionProblem
    from .tensor import Tensor

    Shape = tuple[int, ...]

CHECKS: dict[str, Callable[..., None]] = {}


def check(function: Callable[..., None]) -> Callable[..., None]:
    """Make a function the check of the operation that has its name."""
    CHECKS[function.__name__] = function
    return function


def guard(ops: type) -> None:
    """Let each operation that a class or one of its bases defines begin with its check."""
    for base in ops.__mro__:
        for name in vars(base).keys() & CHECKS.keys():
            method = vars(base)[name]
            if not hasattr(getattr(method, "__func__", method), "check"):
                setattr(base, name, _guarded(method, CHECKS[name]))


def _guarded(method: Any, check: Callable[..., None]) -> Any:
    """A static method or class method that begins with a check, at its attribute `check`."""
    operation = getattr(method, "__func__", method)  # a plain function is called as a static one
    skipped = 1 if isinstance(method, classmethod) else 0  # the class is no argument of the check

    @functools.wraps(operation)
    def checked(*args: Any, **options: Any) -> Any:
        check(*args[skipped:], **options)
        return operation(*args, **options)

    checked.check = check  # type: ignore[attr-defined]
    return classmethod(checked) if skipped else staticmethod(checked)


# ----- what the checks are made of -----


def _same_shape(name: str, given: Tensor, of: str, wanted: Shape) -> None:
    if given.shape != wanted:
        raise ValueError(f"{name} must have the shape of {of}, {wanted}, got {given.shape}")


def check_axis(x: Tensor, dim: int) -> None:
    """Raise IndexError unless a tensor has dimension `dim`; negative ones count from the end."""
    if not -x.dims <= dim < x.dims:
        raise IndexError(
            f"dim must be in [{-x.dims}, {x.dims - 1}] for {x.dims} dimensions, got {dim}"
        )


def _one_row(name: str, given: Tensor, size: int, dims: int) -> None:
    """A weight or bias for each column: (size,), perhaps with dimensions of size 1 before it."""
    shape = given.shape
    if not (shape and shape[-1] == size and prod(shape[:-1]) == 1 and len(shape) <= dims):
        raise ValueError(f"{name} must have shape ({size},) or (1, {size}), got {shape}")


def broadcasts_to(shape: Shape, wanted: Shape) -> bool:
    """Whether `shape` can be repeated to `wanted`, which then stays as it is."""
    return len(shape) <= len(wanted) and all(
        n in (1, size) for n, size in zip(shape[::-1], wanted[::-1], strict=False)
    )


# ----- softmax -----


@check
def softmax_forward(x: Tensor, dim: int) -> None:
    check_axis(x, dim)


@check
def softmax_backward(grad: Tensor, y: Tensor, dim: int) -> None:
    _same_shape("grad", grad, "y", y.shape)
    check_axis(y, dim)


@check
def logsumexp_forward(x: Tensor, dim: int) -> None:
    check_axis(x, dim)


@check
def logsumexp_backward(grad: Tensor, x: Tensor, logsumexp: Tensor) -> None:
    shape, kept = x.shape, logsumexp.shape
    if not any((*shape[:dim], 1, *shape[dim + 1 :]) == kept for dim in range(x.dims)):
        raise ValueError(
            f"logsumexp must have the shape of x, {shape}, with size 1 in one dimension, got {kept}"
        )
    _same_shape("grad", grad, "logsumexp", logsumexp.shape)


@check
def attn_softmax_fw(inp: Tensor, mask: Tensor) -> None:
    check_axis(inp, -1)
    if not mask.shape or not broadcasts_to(mask.shape, inp.shape):
        raise ValueError(f"mask must broadcast to inp, {inp.shape}, got {mask.shape}")


@check
def attn_softmax_bw(out_grad: Tensor, soft_inp: Tensor) -> None:
    _same_shape("out_grad", out_grad, "soft_inp", soft_inp.shape)


# ----- layer norm -----


@check
def layernorm_fw(inp: Tensor, gamma: Tensor, beta: Tensor, eps: float = 1e-8) -> None:
    if not inp.shape:
        raise ValueError("inp must have at least one dimension, got shape ()")
    _one_row("gamma", gamma, inp.shape[-1], inp.dims)
    _one_row("beta", beta, inp.shape[-1], inp.dims)


@check
def layernorm_bw(
    out_grad: Tensor,
    inp: Tensor,
    gamma: Tensor,
    beta: Tensor,
    var: Tensor,
    mean: Tensor,
    eps: float = 1e-8,
) -> None:
    layernorm_fw(inp, gamma, beta)
    _same_shape("out_grad", out_grad, "inp", inp.shape)
    rows = (prod(inp.shape[:-1]),)
    _same_shape("var", var, "the rows of inp", rows)
    _same_shape("mean", mean, "the rows of inp", rows)


# ----- GELU -----


@check
def gelu_backward(grad: Tensor, x: Tensor) -> None:
    _same_shape("grad", grad, "x", x.shape)


# ----- linear layer -----


@check
def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.dims != 2 or x.dims < 1 or x.shape[-1] != weight.shape[0]:
        raise ValueError(
            f"linear: x must be (..., in) and weight (in, out), got {x.shape} and {weight.shape}"
        )
    if bias is not None:
        _one_row("bias", bias, weight.shape[1], x.dims)


@check
def linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
) -> None:
    linear_forward(x, weight, None)
    _same_shape("grad", grad, "x @ weight", (*x.shape[:-1], weight.shape[1]))


# ----- embedding -----


@check
def embedding_forward(ids: Tensor, weight: Tensor) -> None:
    if weight.dims != 2:
        raise ValueError(f"weight must be (num_embeddings, embedding_dim), got {weight.shape}")
    ids.f.ops.check_class_numbers(ids, weight.shape[0], "Embedding: x")


@check
def embedding_backward(grad: Tensor, ids: Tensor, num_embeddings: int) -> None:
    if grad.shape[:-1] != ids.shape or not grad.shape:
        raise ValueError(
            f"grad must have the shape of the ids, {ids.shape}, and one dimension more, "
            f"got {grad.shape}"
        )
    ids.f.ops.check_class_numbers(ids, num_embeddings, "Embedding: x")


# ----- cross entropy -----


@check
def cross_entropy_forward(logits: Tensor, target: Tensor) -> None:
    if logits.dims != 2 or target.shape != logits.shape[:1]:
        raise ValueError(
            f"softmax_loss needs logits (batch, C) and target (batch,), "
            f"got {logits.shape} and {target.shape}"
        )
    rows, classes = logits.shape
    if rows and not classes:
        raise ValueError(f"softmax_loss needs logits of at least one class, got {logits.shape}")
    target.f.ops.check_class_numbers(target, classes, "softmax_loss: target")


@check
def cross_entropy_backward(grad: Tensor, logits: Tensor, target: Tensor, logsumexp: Tensor) -> None:
    cross_entropy_forward(logits, target)
    _same_shape("grad", grad, "target", target.shape)
    _same_shape("logsumexp", logsumexp, "target", target.shape)


# ----- concatenation -----


@check
def concatenate(parts: Sequence[Tensor], dim: int) -> None:
    first = parts[0]
    check_axis(first, dim)
    dim %= first.dims
    for part in parts[1:]:
        rest = [(*s[:dim], *s[dim + 1 :]) for s in (part.shape, first.shape)]
        if part.dims != first.dims or rest[0] != rest[1]:
            raise ValueError(
                f"concatenate: {first.shape} and {part.shape} must agree in all dimensions "
                f"but {dim}"
            )


# ----- dropout -----


@check
def dropout_forward(x: Tensor, p: float, seed: int) -> None:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout: p must be in [0, 1], got {p}")


@check
def dropout_backward(grad: Tensor, p: float, seed: int) -> None:
    dropout_forward(grad, p, seed)


# ----- AdamW -----


@check
def adamw_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    _same_shape("grad", grad, "param", param.shape)
    for name, changed in (("param", param), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        _same_shape(name, changed, "param", param.shape)
        if changed.dtype != param.dtype:
            raise TypeError(
                f"{name} must have the dtype of param, {param.dtype.name}, got {changed.dtype.name}"
            )
        if not changed._tensor.is_contiguous():
            raise ValueError(f"{name}, which is changed in place, must be contiguous")
    if step < 1:
        raise ValueError(f"step counts from 1, got {step}")


# ----- attention: an `AttentionProblem` has been checked, here only what it is computed with -----


@check
def flash_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any,
    problem: AttentionProblem,
    variant: VariantInputs = NO_VARIANT,
) -> None:
    _same_shape("query", query, "the problem's query", problem.query_shape)
    _same_shape("key", key, "the problem's key", problem.key_shape)
    _same_shape("value", value, "the problem's value", problem.value_shape)
    if (attn_mask is None) != (problem.mask_kind == "none"):
        raise ValueError(f"attn_mask must be of the problem's kind, {problem.mask_kind!r}")
    scores = (*problem.leading, problem.query_shape[-2], problem.key_shape[-2])
    if attn_mask is not None and not broadcasts_to(tuple(attn_mask.shape), scores):
        raise ValueError(f"attn_mask must broadcast to {scores}, got {tuple(attn_mask.shape)}")
    for name, given in (("score", variant.score), ("mask", variant.mask)):
        graph = getattr(problem, f"{name}_mod")
        wanted = (0, 0) if graph is None else (len(graph.captured), len(graph.parameters))
        if (len(given.arrays), len(given.parameters)) != wanted:
            raise ValueError(
                f"variant.{name} must have {wanted[0]} arrays and {wanted[1]} parameters, got "
                f"{len(given.arrays)} and {len(given.parameters)}"
            )
    if (variant.lists is None) == problem.is_sparse:
        raise ValueError("variant.lists must be given if the problem is sparse, and only then")


@check
def flash_attention_backward(
    grad_out: Tensor,
    grad_logsumexp: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any,
    out: Tensor,
    rows: Tensor | None,
    problem: AttentionProblem,
    needs_mask_grad: bool = False,
    variant: VariantInputs = NO_VARIANT,
) -> None:
    flash_attention_forward(query, key, value, attn_mask, problem, variant)
    _same_shape("out", out, "the attention's output", problem.out_shape)
    _same_shape("grad_out", grad_out, "out", out.shape)
    if rows is not None:
        _same_shape("rows", rows, "two numbers for each row", (*problem.logsumexp_shape, 2))
    if grad_logsumexp is not None:
        _same_shape("grad_logsumexp", grad_logsumexp, "logsumexp", problem.logsumexp_shape)
