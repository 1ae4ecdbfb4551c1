"""FlashAttention as an operation of PyTorch: its graph, its random numbers, our kernels.

Imported when the first torch tensor comes, as torch is not needed otherwise.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch.overrides import handle_torch_function, has_torch_function

from .. import attention
from ..arguments import type_name
from ..dtypes import FLOAT_DTYPES, HALF_DTYPES
from ..kernels.flash_attention.problem import AttentionProblem, checked_flag
from ..tensor import Tensor
from . import foreign
from .arrays import import_array

_BOOL = np.dtype(np.bool_)
_drawing = threading.Lock()
_undisturbed: Callable[..., Any] | None = None


def flash_attention(query: Any, key: Any, value: Any, **options: Any) -> Any:
    """`foreign.flash_attention` for torch tensors. torch.compile breaks its graph around this call:
    neither our Python nor the kernels are for it to trace.
    """
    global _undisturbed
    if "torch._dynamo" not in sys.modules:  # nobody compiles, and loading it takes a second
        return _attention(query, key, value, **options)
    if _undisturbed is None:
        _undisturbed = torch.compiler.disable(_attention)
    return _undisturbed(query, key, value, **options)


def _attention(query: Any, key: Any, value: Any, **options: Any) -> Any:
    tensors = [query, key, value, options.get("attn_mask")]
    given = tuple(x for x in tensors if isinstance(x, torch.Tensor))
    if has_torch_function(given):  # subclasses decide what becomes of the result
        return handle_torch_function(foreign.flash_attention, given, query, key, value, **options)
    for name, x in (("query", query), ("key", key), ("value", value)):
        _check(name, x, query)
    mask = _mask(options.pop("attn_mask", None), query)
    return_lse = checked_flag("return_lse", options.pop("return_lse", False))
    drawn = options.get("seed") is None
    problem = attention.describe(
        _outline(query),
        _outline(key),
        _outline(value),
        None if mask is None else _outline(mask),
        **options | {"seed": 0 if drawn else options["seed"]},
    )
    if drawn and problem.dropout_p > 0:
        problem = replace(problem, seed=_draw_seed(query.device))
    out, logsumexp, *_ = MiniTorchFlashAttention.apply(query, key, value, mask, problem)
    return (out, logsumexp) if return_lse else out


# ----- what is given -----


def _check(name: str, x: Any, query: Any) -> None:
    """Raise an error with the argument's name unless it is a plain tensor where the query is."""
    if not isinstance(x, torch.Tensor):
        hint = " or a numpy array" if name == "attn_mask" else ", as query is"
        raise TypeError(f"{name} must be a torch.Tensor{hint}, got {type_name(x)}")
    if x.is_nested or x.layout != torch.strided:
        layout = "nested" if x.is_nested else x.layout
        raise TypeError(f"{name} must be a dense tensor, got one with layout {layout}")
    if x.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name} must be on the CPU or on a CUDA GPU, got device {x.device}")
    if x.device != query.device:
        raise ValueError(f"{name} must be on the query's device, {query.device}, got {x.device}")
    floats = FLOAT_DTYPES if x.device.type == "cpu" else (*FLOAT_DTYPES, *HALF_DTYPES)
    allowed = (_BOOL, *floats) if name == "attn_mask" else floats
    if _dtype(x) not in (known.name for known in allowed):
        where = "CPU" if x.device.type == "cpu" else "GPU"
        names = ", ".join(dtype.name for dtype in allowed)
        raise TypeError(f"{name} on the {where} must have a dtype of {names}, got {_dtype(x)}")


def _dtype(x: Any) -> str:
    return str(x.dtype).removeprefix("torch.")


def _outline(x: Any) -> Any:
    """An array with the shape and the dtype of a tensor, and elements that nobody reads."""
    return np.broadcast_to(np.zeros((), np.dtype(_dtype(x))), tuple(x.shape))


def _mask(attn_mask: Any, query: Any) -> Any:
    """A mask as a torch tensor beside the query. An array is copied: backward needs it, and PyTorch
    does not see who writes to it in between.
    """
    if attn_mask is None:
        return None
    if isinstance(attn_mask, np.ndarray):
        allowed = (_BOOL, *FLOAT_DTYPES, np.dtype(np.float16))
        array = import_array(attn_mask, allowed, "attn_mask").array
        attn_mask = torch.tensor(np.array(array), device=query.device)
    elif isinstance(attn_mask, Tensor):
        if attn_mask.requires_grad():
            raise TypeError(
                "attn_mask must be a torch.Tensor to get a gradient beside torch tensors, got a "
                "minitorch.Tensor that requires one: pass attn_mask.detach()"
            )
        attn_mask = torch.from_dlpack(attn_mask)
    _check("attn_mask", attn_mask, query)
    return attn_mask


def _draw_seed(device: Any) -> int:
    """The seed of a dropout mask, from PyTorch's generator of the device: `torch.manual_seed` and
    checkpointing repeat it. It is made of the generator's state, which is known on the host; for a
    number drawn on the GPU the host would wait.

    Raises:
        RuntimeError: a CUDA graph of PyTorch's is captured, which would repeat the seed.

    """
    on_gpu = device.type == "cuda"
    if on_gpu and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "minitorch.flash_attention with dropout in a captured CUDA graph would drop the same "
            "weights in every replay: give it a seed if that is wanted"
        )
    generator = torch.cuda.default_generators[device.index] if on_gpu else torch.default_generator
    with _drawing:
        state = generator.get_state()
        torch.rand(1, device=device)  # the next call finds another state
    return int.from_bytes(blake2b(state.numpy().tobytes(), digest_size=8).digest(), "little")


# ----- the graph -----


class MiniTorchFlashAttention(torch.autograd.Function):
    """Output and logsumexp. All that backward needs is saved through PyTorch, which then notices
    writes to it, moves it with `saved_tensors_hooks` and computes it anew for a checkpoint.
    """

    @staticmethod
    def forward(query: Any, key: Any, value: Any, mask: Any, problem: AttentionProblem) -> Any:
        """Both as new tensors, on the stream on which PyTorch computes; and whatever else the
        kernels of this backend keep for their backward pass.
        """
        with foreign.stream_of(query, "torch"):
            q, k, v = _ours(query=query, key=key, value=value)
            kept = q.f.ops.flash_attention_forward(q, k, v, _our_mask(q, mask), problem)
            return tuple(map(_theirs, kept))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Save what backward needs."""
        *tensors, ctx.problem = inputs
        seed = None
        if ctx.problem.dropout_p > 0:  # a checkpoint may compute output and seed anew, as a pair
            seed = torch.tensor(ctx.problem.seed, dtype=torch.uint64, device="cpu")
        ctx.save_for_backward(seed, *tensors, *output)
        ctx.mark_non_differentiable(*(x for x in output[2:] if x is not None))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Any, grad_logsumexp: Any, *_: Any) -> Any:
        """Gradients of query, key, value and mask, where they are wanted."""
        if grad_out is None and grad_logsumexp is None:
            return (None,) * 5
        needed = ctx.needs_input_grad
        seed, *inputs = ctx.saved_tensors  # read once: a checkpoint allows no more
        problem = ctx.problem if seed is None else replace(ctx.problem, seed=seed.item())
        inputs, kept = inputs[:4], inputs[4:]
        gradients = MiniTorchFlashAttentionGradient.apply(
            problem, needed[3], *inputs, grad_out, grad_logsumexp, *kept
        )
        return (*(g if n else None for g, n in zip(gradients, needed, strict=False)), None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Not there: raises RuntimeError."""
        raise RuntimeError(
            "minitorch.flash_attention has no forward-mode derivative (jvp, jacfwd, hessian): use "
            "backward, torch.func.vjp or torch.func.jacrev, or PyTorch's own attention with "
            "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        """The mapped dimension becomes one more leading dimension."""
        *tensors, problem = arguments
        if problem.dropout_p > 0 and info.randomness != "different":
            raise RuntimeError(
                "minitorch.flash_attention with dropout draws another mask for each sample of "
                f"vmap: use vmap(..., randomness='different'), got {info.randomness!r}"
            )
        inputs = [
            _batched(x, dim, info.batch_size, len(problem.leading) + 2)
            for x, dim in zip(tensors, in_dims, strict=False)
        ]
        kept = MiniTorchFlashAttention.apply(
            *inputs, _mapped(problem, info.batch_size, *inputs[:3])
        )
        return kept, tuple(None if x is None else 0 for x in kept)


class MiniTorchFlashAttentionGradient(torch.autograd.Function):
    """The backward pass, an operation itself: its own derivative raises an error and is not 0."""

    @staticmethod
    def forward(
        problem: AttentionProblem,
        needs_mask_grad: bool,
        query: Any,
        key: Any,
        value: Any,
        mask: Any,
        grad_out: Any,
        grad_logsumexp: Any,
        out: Any,
        *kept: Any,
    ) -> Any:
        """Gradients of query, key, value, and of the mask or None."""
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        with foreign.stream_of(query, "torch"):
            q, k, v = _ours(query=query, key=key, value=value)
            grads = _ours(grad_out=grad_out, grad_logsumexp=grad_logsumexp)
            rows = _ours(out=out, logsumexp=kept[-1])
            *found, dmask = q.f.ops.flash_attention_backward(
                *grads, q, k, v, _our_mask(q, mask), *rows, problem, needs_mask_grad
            )
            # Where an input was broadcast, expand sums its gradient.
            sums = [x.expand(g).contiguous() for x, g in zip((q, k, v), found, strict=True)]
            gradients = tuple(map(_theirs, sums))
            if dmask is None:
                return (*gradients, None)
            return (*gradients, _theirs(dmask).to(mask.dtype).reshape(mask.shape))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is saved."""

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Not there: raises RuntimeError."""
        raise RuntimeError(
            "minitorch.flash_attention has a first derivative and no second: its backward pass "
            "cannot be differentiated. PyTorch's own attention can, with "
            "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
        )

    jvp = backward

    @staticmethod
    def vmap(info: Any, in_dims: Any, problem: Any, needs_mask_grad: Any, *tensors: Any) -> Any:
        """One more leading dimension; what the samples share gets a gradient for each of them."""
        size, dims = info.batch_size, in_dims[2:]
        if problem.dropout_p > 0 and dims[6] is None:  # one mask, in a forward pass without vmap
            samples = [
                MiniTorchFlashAttentionGradient.apply(
                    problem,
                    needs_mask_grad,
                    *(_sample(x, d, number) for x, d in zip(tensors, dims, strict=True)),
                )
                for number in range(size)
            ]
            stacked = tuple(
                None if g[0] is None else torch.stack(g) for g in zip(*samples, strict=True)
            )
            return stacked, tuple(None if g is None else 0 for g in stacked)
        inputs = [
            _batched(x, dim, size, len(problem.leading) + 2)
            for x, dim in zip(tensors[:4], dims, strict=False)
        ]
        others = [_batched(x, dim, size) for x, dim in zip(tensors[4:], dims[4:], strict=True)]
        mapped = _mapped(problem, size, *inputs[:3])
        found = MiniTorchFlashAttentionGradient.apply(mapped, needs_mask_grad, *inputs, *others)
        gradients = tuple(
            None if g is None else g.reshape(size, *_sample_shape(x, dim))
            for g, x, dim in zip(found, tensors, dims, strict=False)
        )
        return gradients, tuple(None if g is None else 0 for g in gradients)


def _ours(**tensors: Any) -> list[Any]:
    """Torch tensors as ours, None as it is."""
    try:
        plain = {name: None if x is None else x.detach() for name, x in tensors.items()}
    except RuntimeError as error:  # vmap as it was before torch.func, where autograd still uses it
        raise RuntimeError(
            "minitorch.flash_attention takes no batch of gradients (is_grads_batched=True, "
            "vectorize=True): use torch.func.vmap or torch.func.jacrev"
        ) from error
    return [None if x is None else foreign.imported(x, name) for name, x in plain.items()]


def _theirs(x: Tensor | None) -> Any:
    return None if x is None else torch.from_dlpack(x)


def _our_mask(query: Tensor, mask: Any) -> Any:
    """A mask as the kernels of the query's backend take it."""
    return query.f.ops.attention_mask(None if mask is None else foreign.mask_from(mask.detach()))


# ----- torch.func.vmap -----


def _batched(x: Any, dim: int | None, size: int, dims: int = 0) -> Any:
    """A tensor with the mapped dimension first, and with dimensions of size 1 after it if there
    are fewer than `dims` others.
    """
    if x is None:
        return None
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.reshape(size, *(1,) * (dims + 1 - x.dim()), *x.shape[1:])


def _sample_shape(x: Any, dim: int | None) -> tuple[int, ...]:
    return tuple(n for d, n in enumerate(x.shape) if d != dim)


def _sample(x: Any, dim: int | None, number: int) -> Any:
    return x if x is None or dim is None else x.select(dim, number)


def _mapped(problem: AttentionProblem, size: int, query: Any, key: Any, value: Any) -> Any:
    """The problem of all samples at once."""
    return replace(
        problem,
        query_shape=tuple(query.shape),
        key_shape=tuple(key.shape),
        value_shape=tuple(value.shape),
        leading=(size, *problem.leading),
    )
