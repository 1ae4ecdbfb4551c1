"""FlashAttention as an operation of PyTorch: its graph, its random numbers, our kernels.

Imported when the first torch tensor comes, as torch is not needed otherwise.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch.overrides import handle_torch_function, has_torch_function

from .. import attention
from ..arguments import type_name
from ..attention_variants import Variant
from ..block_mask import BlockMask
from ..captured_arrays import dtype_name
from ..dtypes import FLOAT_DTYPES, HALF_DTYPES
from ..kernels.flash_attention.problem import AttentionProblem, checked_flag
from ..kernels.flash_attention.variant import VariantInputs, wanted_gradients
from ..tensor import Tensor
from . import foreign
from .arrays import default_backend, import_array

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
    functions = options.pop("score_mod", None), _block_mask(options.pop("block_mask", None))
    problem = attention.describe(
        _outline(query),
        _outline(key),
        _outline(value),
        None if mask is None else _outline(mask),
        **options,
    )
    variant = Variant.of(*functions, problem)
    captured = _captured(variant, query)
    if options.get("seed") is None and problem.dropout_p > 0:
        problem = replace(problem, seed=_draw_seed(query.device))
    problem, inputs = variant.fused(problem)
    out, logsumexp, _ = MiniTorchFlashAttention.apply(
        query, key, value, mask, problem, _with_tensors(inputs, [None] * len(captured)), *captured
    )
    return (out, logsumexp) if return_lse else out


# ----- what is given -----


def _check(name: str, x: Any, query: Any) -> None:
    """Raise an error with the argument's name unless it is a plain tensor where the query is, of a
    dtype that is known there.
    """
    if not isinstance(x, torch.Tensor):
        hint = " or a numpy array" if name == "attn_mask" else ", as query is"
        raise TypeError(f"{name} must be a torch.Tensor{hint}, got {type_name(x)}")
    _check_place(name, x, query)
    floats = FLOAT_DTYPES if x.device.type == "cpu" else (*FLOAT_DTYPES, *HALF_DTYPES)
    allowed = (_BOOL, *floats) if name == "attn_mask" else floats
    if dtype_name(x) not in (known.name for known in allowed):
        where = "CPU" if x.device.type == "cpu" else "GPU"
        names = ", ".join(dtype.name for dtype in allowed)
        raise TypeError(f"{name} on the {where} must have a dtype of {names}, got {dtype_name(x)}")


def _check_place(name: str, x: Any, query: Any) -> None:
    if x.is_nested or x.layout != torch.strided:
        layout = "nested" if x.is_nested else x.layout
        raise TypeError(f"{name} must be a dense tensor, got one with layout {layout}")
    if x.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name} must be on the CPU or on a CUDA GPU, got device {x.device}")
    if x.device != query.device:
        raise ValueError(f"{name} must be on the query's device, {query.device}, got {x.device}")


def _outline(x: Any) -> Any:
    """An array with the shape and the dtype of a tensor, and elements that nobody reads."""
    return np.broadcast_to(np.zeros((), np.dtype(dtype_name(x))), tuple(x.shape))


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


def _block_mask(block_mask: Any) -> Any:
    """PyTorch's BlockMask as one of ours: its blocks are copied, its mask_mod is traced."""
    kind = type(block_mask)
    if kind.__name__ != "BlockMask" or kind.__module__.split(".")[0] != "torch":
        return block_mask
    names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
    lists = {name: getattr(block_mask, name) for name in names}
    arrays: dict[str, Any] = {n: None if x is None else x.cpu().numpy() for n, x in lists.items()}
    function = block_mask.mask_mod
    return BlockMask.from_kv_blocks(
        **arrays,
        BLOCK_SIZE=block_mask.BLOCK_SIZE,
        mask_mod=None if getattr(function, "__name__", "") == "noop_mask" else function,
        seq_lengths=block_mask.seq_lengths,
    )


def _captured(variant: Variant, query: Any) -> list[Any]:
    """The tensors that the score function closes over, as torch tensors beside the query."""
    found = []
    for name, x in zip(variant.names, variant.arrays, strict=True):
        if isinstance(x, np.ndarray):
            continue
        if isinstance(x, Tensor):
            if x.requires_grad():
                raise TypeError(
                    f"`{name}` of score_mod must be a torch.Tensor to get a gradient beside torch "
                    "tensors, got a minitorch.Tensor that requires one"
                )
            x = torch.from_dlpack(x)
        _check_place(f"`{name}` of score_mod", x, query)
        found.append(x)
    return found


def _with_tensors(inputs: VariantInputs, tensors: Sequence[Any]) -> VariantInputs:
    """With these in the place of the tensors, or of None, among the score function's arrays."""
    rest = iter(tensors)
    arrays = (x if isinstance(x, np.ndarray) else next(rest) for x in inputs.score.arrays)
    return inputs._replace(score=inputs.score._replace(arrays=tuple(arrays)))


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
    """Output, logsumexp, and whatever else the kernels keep for their backward pass. All that
    backward needs is saved through PyTorch, which then notices writes to it, moves it with
    `saved_tensors_hooks` and computes it anew for a checkpoint.
    """

    @staticmethod
    def forward(
        query: Any, key: Any, value: Any, mask: Any, problem: AttentionProblem,
        inputs: VariantInputs, *captured: Any,
    ) -> Any:  # fmt: skip
        """All as new tensors, on the stream on which PyTorch computes. `captured` are the tensors
        that belong among `inputs`.
        """
        with foreign.stream_of(query, "torch"):
            q, k, v = _ours(query=query, key=key, value=value)
            variant = _with_tensors(inputs, [_our_captured(x) for x in captured])
            kept = q.f.ops.flash_attention_forward(q, k, v, _our_mask(q, mask), problem, variant)
            return tuple(map(_theirs, kept))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Save what backward needs."""
        query, key, value, mask, ctx.problem, ctx.inputs, *captured = inputs
        seed = None
        if ctx.problem.dropout_p > 0:  # a checkpoint may compute output and seed anew, as a pair
            seed = torch.tensor(ctx.problem.seed, dtype=torch.uint64, device="cpu")
        ctx.save_for_backward(seed, query, key, value, mask, *output, *captured)
        ctx.mark_non_differentiable(*(x for x in output[2:] if x is not None))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Any, grad_logsumexp: Any, *_: Any) -> Any:
        """Gradients of query, key, value, mask and captured tensors, where they are wanted."""
        needed = ctx.needs_input_grad
        if grad_out is None and grad_logsumexp is None:
            return (None,) * len(needed)
        seed, *saved = ctx.saved_tensors  # read once: a checkpoint allows no more
        problem = ctx.problem if seed is None else replace(ctx.problem, seed=seed.item())
        found = MiniTorchFlashAttentionGradient.apply(
            _wanting(problem, ctx.inputs, needed[6:]), ctx.inputs, needed[3], grad_out,
            grad_logsumexp, *saved,
        )  # fmt: skip
        wanted = (*needed[:4], *needed[6:])
        found = [g if n else None for g, n in zip(found, wanted, strict=True)]
        return (*found[:4], None, None, *found[4:])

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
        """The mapped dimension becomes one more leading dimension; with functions, which may ask
        for the batch, one sample is computed after another.
        """
        problem, size = arguments[4], info.batch_size
        if problem.dropout_p > 0 and info.randomness != "different":
            raise RuntimeError(
                "minitorch.flash_attention with dropout draws another mask for each sample of "
                f"vmap: use vmap(..., randomness='different'), got {info.randomness!r}"
            )
        if problem.has_functions:
            return _each_sample(MiniTorchFlashAttention, arguments, in_dims, size, 4)
        inputs = [
            _batched(x, dim, size, len(problem.leading) + 2)
            for x, dim in zip(arguments[:4], in_dims, strict=False)
        ]
        kept = MiniTorchFlashAttention.apply(
            *inputs, _mapped(problem, size, *inputs[:3]), *arguments[5:]
        )
        return kept, tuple(None if x is None else 0 for x in kept)


class MiniTorchFlashAttentionGradient(torch.autograd.Function):
    """The backward pass, an operation itself: its own derivative raises an error and is not 0."""

    @staticmethod
    def forward(
        problem: AttentionProblem, inputs: VariantInputs, needs_mask_grad: bool, grad_out: Any,
        grad_logsumexp: Any, query: Any, key: Any, value: Any, mask: Any, out: Any,
        logsumexp: Any, rows: Any, *captured: Any,
    ) -> Any:  # fmt: skip
        """Gradients of query, key, value, of the mask or None, and of captured tensors or None."""
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        with foreign.stream_of(query, "torch"):
            q, k, v = _ours(query=query, key=key, value=value)
            grads = _ours(grad_out=grad_out, grad_logsumexp=grad_logsumexp)
            kept = _ours(out=out, rows=rows)
            variant = _with_tensors(inputs, [_our_captured(x) for x in captured])
            dq, dk, dv, dmask, *others = q.f.ops.flash_attention_backward(
                *grads, q, k, v, _our_mask(q, mask), *kept, problem, needs_mask_grad, variant
            )
            # Where an input was broadcast, expand sums its gradient.
            sums = [x.expand(g).contiguous() for x, g in zip((q, k, v), (dq, dk, dv), strict=True)]
            of_array = dict(zip(wanted_gradients(problem.score_mod), others, strict=True))
            found = [dmask, *(of_array.get(n) for n in _tensor_places(inputs))]
            return (
                *map(_theirs, sums),
                *(
                    None if g is None else _theirs(g).to(x.dtype).reshape(x.shape)
                    for g, x in zip(found, (mask, *captured), strict=True)
                ),
            )

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
    def vmap(info: Any, in_dims: Any, problem: Any, *arguments: Any) -> Any:
        """One more leading dimension; what the samples share gets a gradient for each of them."""
        size, apart = info.batch_size, in_dims[9] is not None  # whether vmap gave each an output
        if problem.has_functions or (problem.dropout_p > 0 and not apart):
            return _each_sample(
                MiniTorchFlashAttentionGradient,
                (problem, *arguments),
                in_dims,
                size,
                0 if apart else None,
            )
        variant, needs_mask_grad, *tensors = arguments
        dims = in_dims[3:]
        grads = [_batched(x, dim, size) for x, dim in zip(tensors[:2], dims, strict=False)]
        inputs = [
            _batched(x, dim, size, len(problem.leading) + 2)
            for x, dim in zip(tensors[2:6], dims[2:], strict=False)
        ]
        kept = [_batched(x, dim, size) for x, dim in zip(tensors[6:9], dims[6:], strict=False)]
        mapped = _mapped(problem, size, *inputs[:3])
        found = MiniTorchFlashAttentionGradient.apply(
            mapped, variant, needs_mask_grad, *grads, *inputs, *kept, *tensors[9:]
        )
        gradients = tuple(
            None if g is None else g.reshape(size, *_sample_shape(x, dim))
            for g, x, dim in zip(found, tensors[2:6], dims[2:], strict=False)
        )
        return gradients, tuple(None if g is None else 0 for g in gradients)


def _tensor_places(inputs: VariantInputs) -> list[int]:
    """Where tensors belong among the score function's arrays."""
    arrays = inputs.score.arrays
    return [n for n, x in enumerate(arrays) if not isinstance(x, np.ndarray)]


def _wanting(
    problem: AttentionProblem, inputs: VariantInputs, wanted: Sequence[bool]
) -> AttentionProblem:
    """The problem whose backward pass gives the gradients of these captured tensors: PyTorch knows
    which are wanted only there.
    """
    if problem.score_mod is None:
        return problem
    captured = list(problem.score_mod.captured)
    for n, wants in zip(_tensor_places(inputs), wanted, strict=True):
        captured[n] = captured[n]._replace(wants_gradient=wants)
    graph = replace(problem.score_mod, captured=tuple(captured))
    return replace(problem, score_mod=graph)


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


def _our_captured(x: Any) -> Any:
    """A captured tensor as the kernels take it. The CPU has no numbers of 16 bits."""
    x = x.detach()
    if not x.is_cuda and dtype_name(x) in (dtype.name for dtype in HALF_DTYPES):
        x = x.float()
    if x.is_floating_point():
        return foreign.imported(x, "score_mod's tensor")
    if not x.is_cuda:
        return x.numpy()
    x = x.to(torch.uint8 if x.dtype == torch.bool else torch.int32)  # as kernels store them
    data = import_array(x, (np.dtype(dtype_name(x)),), "score_mod's tensor")
    return Tensor(data, backend=default_backend(data.on_device))


# ----- torch.func.vmap -----


def _each_sample(
    function: Any, arguments: Sequence[Any], dims: Sequence[Any], size: int, seeded: int | None
) -> Any:
    """What a function gives for each sample, stacked.

    Args:
        function: of autograd.
        arguments: of all samples.
        dims: the mapped dimension of each, None of what the samples share.
        size: how many.
        seeded: which argument is the problem, if each sample has a dropout seed of its own.

    """
    samples = []
    for number in range(size):
        sample = [_sample(x, d, number) for x, d in zip(arguments, dims, strict=True)]
        if seeded is not None:
            seed = (sample[seeded].seed + number) % (1 << 64)
            sample[seeded] = replace(sample[seeded], seed=seed)
        samples.append(function.apply(*sample))
    stacked = tuple(None if x[0] is None else torch.stack(x) for x in zip(*samples, strict=True))
    return stacked, tuple(None if x is None else 0 for x in stacked)


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


def _sample(x: Any, dim: Any, number: int) -> Any:
    mapped = isinstance(x, torch.Tensor) and dim is not None
    return x.select(dim, number) if mapped else x


def _mapped(problem: AttentionProblem, size: int, query: Any, key: Any, value: Any) -> Any:
    """The problem of all samples at once."""
    return replace(
        problem,
        query_shape=tuple(query.shape),
        key_shape=tuple(key.shape),
        value_shape=tuple(value.shape),
        leading=(size, *problem.leading),
    )
