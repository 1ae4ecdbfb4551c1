"""Flash attention on the GPU: from tensors to the kernels' arrays, and the choice of a kernel.

No mathematics here, but for the sums of gradients of what was broadcast.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..kernels.copy_cuda import copy_into
from ..kernels.flash_attention.block_lists import TileLists
from ..kernels.flash_attention.captured import CapturedSums
from ..kernels.flash_attention.decode import launch as decode
from ..kernels.flash_attention.hopper import launch as hopper
from ..kernels.flash_attention.launch import (
    Gradients,
    Inputs,
    Matrices,
    Strides,
    functions_of,
    heads_of,
)
from ..kernels.flash_attention.mma import captured as mma_captured
from ..kernels.flash_attention.mma import launch as mma
from ..kernels.flash_attention.problem import AttentionProblem, Shape, mask_kind
from ..kernels.flash_attention.score_values import stored_dtype, words_of
from ..kernels.flash_attention.scores import NO_FUNCTIONS, Functions
from ..kernels.flash_attention.simt import captured as simt_captured
from ..kernels.flash_attention.simt import launch as simt
from ..kernels.flash_attention.variant import (
    NO_VARIANT,
    Captured,
    VariantInputs,
    wanted_gradients,
)
from ..kernels.gpu.runtime import compute_capability
from ..operators import add
from ..rng import device_offset
from ..tensor_data import TensorData, strides_from_shape
from . import allocator
from .device_array import DeviceArray
from .elementwise import fold
from .storage import contiguous, copied, in_dtype
from .views import contiguous_data, device_storage, view_of

if TYPE_CHECKING:
    from ..tensor import Tensor

# Implementations, the fastest first; the last takes whatever any of them takes. What such a module
# has is told in kernels/flash_attention/launch.py.
FLASH_ATTENTION: tuple[Any, ...] = (decode, hopper, mma, simt)


class Choice(NamedTuple):
    """Which implementation computes a pass, and why each one before it does not: (name, reason)."""

    module: Any
    passed_over: tuple[tuple[str, str], ...]


def choose(
    problem: AttentionProblem, architecture: tuple[int, int], backward: bool = False
) -> Choice:
    """The first of `FLASH_ATTENTION` that computes the forward (or backward) pass of the problem.

    A pure function: it asks no GPU anything.

    Raises:
        ValueError: none does.

    """
    passed_over: list[tuple[str, str]] = []
    for module in FLASH_ATTENTION:
        reason = _why_not(module, problem, architecture, backward)
        if reason is None:
            return Choice(module, tuple(passed_over))
        passed_over.append((module.NAME, reason))
    name, reason = passed_over[-1]
    raise ValueError(
        f"flash attention on a GPU: {reason} ({name}), got query {problem.query_shape} and value "
        f"{problem.value_shape}"
    )


def _why_not(
    module: Any, problem: AttentionProblem, architecture: tuple[int, int], backward: bool
) -> str | None:
    if backward and not hasattr(module, "backward"):
        return "it has a forward pass alone"
    reason: str | None = module.why_not(problem, architecture)
    return reason


def _workspace(
    module: Any,
    which: str,
    problem: AttentionProblem,
    inputs: Inputs,
    architecture: tuple[int, int],
) -> dict[str, Any]:
    """The argument `workspace` of a module that wants one for a pass."""
    size_of = getattr(module, f"{which}_workspace", None)
    if size_of is None:
        return {}
    dtype = _exact(problem)
    size = -(-size_of(problem, heads_of(problem), inputs, architecture) // dtype.itemsize)
    return {"workspace": DeviceArray.empty(max(size, 1), dtype).array}


def _exact(problem: AttentionProblem) -> np.dtype[Any]:
    """The dtype of the logsumexp and of workspaces."""
    return np.dtype(np.float64 if problem.dtype == np.float64 else np.float32)


# ----- from tensors of any leading dimensions to (batch, heads, rows, columns) -----


def _leading(problem: AttentionProblem, group: int) -> Shape:
    """The problem's leading dimensions, with as many heads as serve `group` query heads each."""
    if not problem.leading:
        return ()
    return (*problem.leading[:-1], problem.leading[-1] // group)


def _merged_stride(shape: Shape, strides: Shape) -> int | None:
    """The stride of dimensions seen as one; None if they are none."""
    merged, expected = 0, None
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        if n == 1:
            continue
        if expected is None:
            merged = stride
        elif stride != expected:
            return None
        expected = stride * n
    return merged


def _matrices(data: TensorData, leading: Shape, alignment: int = 1) -> Matrices:
    """`data` (..., rows, columns), broadcast to the leading dimensions, as (batch, heads, rows,
    columns); copied only if its batch has no single stride, or its rows do not begin at multiples
    of `alignment` bytes.
    """
    if alignment > 1:
        data = _aligned(data, alignment)
    wide = data.broadcast_to((*leading, *data.shape[-2:]))
    batch = _merged_stride(wide.shape[:-3], wide.strides[:-3])
    if batch is None:
        return _matrices(copied(wide), leading, alignment)
    storage = device_storage(wide)
    if storage.dtype.kind == "b":
        storage = storage.view(np.uint8)
    heads = wide.strides[-3] if len(wide.shape) > 2 else 0
    strides = Strides(*(int(s) for s in (batch, heads, *wide.strides[-2:])))
    return Matrices(storage.array, storage.pointer, strides, storage)


def _aligned(data: TensorData, alignment: int) -> TensorData:
    """`data` if its rows are contiguous and begin at multiples of `alignment` bytes; else a copy in
    rows that do, with zeros between a row's end and the next multiple. The stride of a dimension
    of size 1 says nothing, and becomes such a multiple; of an empty tensor so do all.
    """
    itemsize = data.dtype.itemsize
    multiple = max(1, alignment // itemsize)
    columns = data.shape[-1]
    width = -(-columns // multiple) * multiple
    padded = strides_from_shape((*data.shape[:-1], width))
    if data.size == 0:
        return TensorData._of(device_storage(data), data.shape, padded)
    *steps, last = (
        width if n == 1 else step for n, step in zip(data.shape, data.strides, strict=True)
    )
    storage = device_storage(data)
    if (
        (last == 1 or columns == 1)
        and storage.pointer % alignment == 0
        and not any(step % multiple for step in steps)
    ):
        return TensorData._of(storage, data.shape, (*steps, 1))
    copy = DeviceArray.empty(width * prod(data.shape[:-1]), data.dtype)
    if width != columns:
        copy.fill(0)
    out = TensorData._of(copy, data.shape, padded)
    copy_into(view_of(out), view_of(data))
    return out


def _inputs(
    problem: AttentionProblem,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: TensorData | None,
    variant: VariantInputs,
    alignment: int,
) -> Inputs:
    heads = heads_of(problem)
    masks, kind = None, "none"
    functions = NO_FUNCTIONS
    words: tuple[int, ...] = (0,)
    owners: tuple[Any, ...] = ()
    has_scores = problem.seqlen_q and problem.seqlen_k
    if has_scores and problem.has_functions:
        functions = functions_of(problem)
        words, owners = _words(functions, variant, _exact(problem))
    if mask is not None and has_scores:
        full = (*problem.leading, problem.seqlen_q, problem.seqlen_k)
        masks, kind = _matrices(mask.broadcast_to(full), problem.leading), mask_kind(mask.dtype)
    return Inputs(
        _matrices(query._tensor, problem.leading, alignment),
        _matrices(key._tensor, _leading(problem, heads.k_group), alignment),
        _matrices(value._tensor, _leading(problem, heads.v_group), alignment),
        masks,
        kind,
        device_offset().array,
        functions,
        words,
        variant.lists if has_scores else None,
        _keeper(variant.lists),
        owners,
    )


def _words(
    functions: Functions, variant: VariantInputs, real: np.dtype[Any]
) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    """What the functions are given, and the arrays in device memory that it points to."""
    both = []
    # A block mask never changes: what it has is copied once, before a CUDA graph is captured.
    of_mask = None if variant.lists is None else variant.lists.kept
    for graph, given, kept in (
        (functions.score, variant.score, None),
        (functions.mask, variant.mask, of_mask),
    ):
        kinds = () if graph is None else graph.captured
        arrays = (
            _on_device(x, stored_dtype(y.kind, real), kept)
            for x, y in zip(given.arrays, kinds, strict=True)
        )
        both.append(Captured(tuple(arrays), given.parameters))
    words = words_of(functions, both, real, lambda x: device_storage(x).pointer)
    return words, (*both[0].arrays, *both[1].arrays)


def _on_device(
    captured: Any, dtype: np.dtype[Any], kept: dict[Any, Any] | None = None
) -> TensorData:
    """A captured array, contiguous in device memory; one that is kept there if it was before.

    Raises:
        RuntimeError: a CUDA graph is captured, whose replays would not see a copy from the host.

    """
    if hasattr(captured, "_tensor"):
        return contiguous(in_dtype(captured._tensor, dtype))
    key = "array on device", id(captured), dtype
    if kept is not None and key in kept:
        _, known = kept[key]
        return known  # type: ignore[no-any-return]
    if allocator.is_capturing():
        raise RuntimeError(
            "attention's score_mod or block_mask reads an array of numpy, and a CUDA graph is "
            "captured, which holds no copies from the host: make it a Tensor on the GPU, or "
            "compute once with the BlockMask before"
        )
    array = np.ascontiguousarray(captured, dtype)
    data = contiguous_data(DeviceArray.from_host(array.reshape(-1)), array.shape)
    if kept is not None:
        kept[key] = captured, data
    return data


def _keeper(lists: TileLists | None) -> Any:
    """The function `Inputs.on_device`."""
    if lists is None:
        return None
    kept = lists.kept

    def on_device(name: Any, array: Any) -> int:
        key = "on device", name
        if kept.get(key) is None:
            kept[key] = DeviceArray.from_host(array)
        return int(kept[key].pointer)

    return on_device


def _like_layout(shape: Shape, dtype: np.dtype[Any], like: TensorData) -> TensorData:
    """New memory for `shape` whose dimensions lie in the order in which those of `like` do.

    So the output of heads that were cut out of rows is made of such rows again. The last dimension
    always comes last.
    """
    storage = DeviceArray.empty(prod(shape), dtype)
    if len(shape) != len(like.shape) or 0 in like.strides:
        return contiguous_data(storage, shape)
    # The stride of a dimension of size 1 says nothing: it goes where row-major order has it.
    order = sorted(range(len(shape) - 1), key=lambda dim: (-_extent(like, dim), dim))
    order.append(len(shape) - 1)
    packed = strides_from_shape(tuple(shape[dim] for dim in order))
    strides = dict(zip(order, packed, strict=True))
    return TensorData._of(storage, shape, tuple(strides[dim] for dim in range(len(shape))))


def _extent(data: TensorData, dim: int) -> int:
    """A dimension's stride; one of size 1 gets that of the next that has more, times its size."""
    following = next((d for d in range(dim, len(data.shape)) if data.shape[d] > 1), dim)
    return data.strides[following] * (1 if following == dim else data.shape[following])


def _summed(data: TensorData, shape: Shape) -> TensorData:
    """`data` with the dimensions summed that `shape` lacks or has as 1."""
    added = len(data.shape) - len(shape)
    for dim in range(len(data.shape)):
        if data.shape[dim] != 1 and (dim < added or shape[dim - added] == 1):
            data = fold(add, 0.0, data, dim)
    return TensorData._of(data._storage, shape, data.strides[added:])


def _summed_to_heads(data: TensorData, shape: Shape) -> TensorData:
    """The same where `shape` may also have a divisor of the number of heads."""
    if len(shape) > 2 and shape[-3] not in (1, data.shape[-3]):
        data = contiguous(data)
        heads = shape[-3]
        parts = (*data.shape[:-3], heads, data.shape[-3] // heads, *data.shape[-2:])
        grouped = TensorData._of(data._storage, parts, strides_from_shape(parts))
        summed = fold(add, 0.0, grouped, len(parts) - 3)
        data = contiguous_data(device_storage(summed), (*parts[:-3], *parts[-2:]))
    return data if data.shape == shape else _summed(data, shape)


def _captured_sums(
    problem: AttentionProblem, given: Captured
) -> tuple[CapturedSums, list[TensorData]]:
    """Where the gradients of captured arrays are added up; and they themselves, zero at first."""
    arrays = [given.arrays[n] for n in wanted_gradients(problem.score_mod)]
    sizes = [prod(x.shape) for x in arrays]
    starts = tuple(sum(sizes[:n]) for n in range(len(sizes)))
    largest = DeviceArray.empty(len(arrays), _exact(problem))
    units = DeviceArray.empty(len(arrays), _exact(problem))
    sums = DeviceArray.empty(max(sum(sizes), 1), np.dtype(np.int64))
    results = [contiguous_data(DeviceArray.empty(prod(x.shape), x.dtype), x.shape) for x in arrays]
    for array in (largest, sums, *map(device_storage, results)):
        array.fill(0)
    owner = largest, units, sums
    return CapturedSums(largest.array, units.array, sums.array, starts, owner), results


def _captured_gradients(
    arguments: tuple[Any, ...],
    given: Captured,
    workspace: tuple[Any, Any, Any],
    module: Any,
    architecture: tuple[int, int],
) -> list[TensorData]:
    """Gradients of what the score function captured, after the backward pass of a module with these
    arguments. Rows are aligned as tensor cores want them, for all modules but SIMT's.
    """
    problem, _, inputs, *_ = arguments
    if not wanted_gradients(problem.score_mod):
        return []
    sums, found = _captured_sums(problem, given)
    if inputs.functions.score is not None:
        on_cores = module is not simt and mma_captured.takes(problem, architecture)
        (mma_captured if on_cores else simt_captured).captured_gradients(
            *arguments, workspace, sums,
            [(device_storage(x).array, x.size, x.dtype.name) for x in found], architecture,
        )  # fmt: skip
    return found


# ----- the operations: by the first kernels in `FLASH_ATTENTION` that compute them -----


def flash_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any,
    problem: AttentionProblem,
    variant: VariantInputs = NO_VARIANT,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `FusedOps.flash_attention_forward`. The logsumexp of 16-bit tensors is float32; the
    output lies in memory in the order of the query's dimensions.
    """
    architecture = compute_capability()
    module = choose(problem, architecture).module
    alignment = getattr(module, "ROW_ALIGNMENT", 1)
    out = _like_layout(problem.out_shape, problem.dtype, query._tensor)
    count = prod(problem.logsumexp_shape)
    exact, both_passes = _exact(problem), hasattr(module, "backward")
    logsumexp = DeviceArray.empty(count, exact)
    rows = DeviceArray.empty(2 * count, exact) if both_passes else None
    inputs = _inputs(problem, query, key, value, attn_mask, variant, alignment)
    module.forward(
        problem, heads_of(problem), inputs, _matrices(out, problem.leading), logsumexp.array,
        *([] if rows is None else [rows.array]), architecture,
        **_workspace(module, "forward", problem, inputs, architecture),
    )  # fmt: skip
    return (
        query._new(out),
        query._new(contiguous_data(logsumexp, problem.logsumexp_shape)),
        None if rows is None else query._new(
            contiguous_data(rows, (*problem.logsumexp_shape, 2))
        ),
    )  # fmt: skip


def _mask_gradient(query: Tensor, ds: TensorData, attn_mask: Any) -> Tensor:
    """The gradient of an additive mask, from that of all scores."""
    dmask = query._new(_summed(ds, attn_mask.shape))
    return dmask if dmask.dtype == attn_mask.dtype else query.f.ops.cast(dmask, attn_mask.dtype)


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
) -> tuple[Tensor | None, ...]:
    """See `FusedOps.flash_attention_backward`. After kernels that have no backward pass the
    forward pass is computed again: only with scores that are the same to the last bit is P of a
    row right where they are large.
    """
    architecture, heads = compute_capability(), heads_of(problem)
    module = choose(problem, architecture, backward=True).module
    alignment = getattr(module, "ROW_ALIGNMENT", 1)
    leading, kept = problem.leading, _leading(problem, heads.group)
    lengths = problem.seqlen_q, problem.seqlen_k
    dq = _like_layout((*leading, lengths[0], problem.head_dim), problem.dtype, query._tensor)
    dk = _like_layout((*kept, lengths[1], problem.head_dim), problem.dtype, key._tensor)
    dv = _like_layout((*kept, lengths[1], problem.value_dim), problem.dtype, value._tensor)
    exact, count = _exact(problem), prod(problem.logsumexp_shape)
    workspace = [DeviceArray.empty(count + 1, exact) for _ in range(3)]
    ds = None
    if needs_mask_grad and attn_mask is not None:
        ds = contiguous_data(
            DeviceArray.empty(prod((*leading, *lengths)), exact), (*leading, *lengths)
        )
        device_storage(ds).fill(0)
    grad_rows = None
    if grad_logsumexp is not None:
        grad_rows = device_storage(copied(grad_logsumexp._tensor))
    inputs = _inputs(problem, query, key, value, attn_mask, variant, alignment)
    result, numbers = out._tensor, None if rows is None else device_storage(rows._tensor)
    if numbers is None:
        result = _like_layout(problem.out_shape, problem.dtype, query._tensor)
        numbers = DeviceArray.empty(2 * count, exact)
        module.forward(
            problem, heads, inputs, _matrices(result, leading), workspace[0].array,
            numbers.array, architecture,
            **_workspace(module, "forward", problem, inputs, architecture),
        )  # fmt: skip
    do = _matrices(grad_out._tensor.broadcast_to(problem.out_shape), leading, alignment)
    grad_lse = None if grad_rows is None else grad_rows.array
    arguments = (
        problem, heads, inputs, _matrices(result, leading), numbers.array, do, grad_lse,
    )  # fmt: skip
    vectors = workspace[0].array, workspace[1].array, workspace[2].array
    targets = _matrices(dq, leading), _matrices(dk, kept), _matrices(dv, kept)
    module.backward(
        *arguments, Gradients(*targets, None if ds is None else device_storage(ds).array, vectors),
        architecture, **_workspace(module, "backward", problem, inputs, architecture),
    )  # fmt: skip
    captured = _captured_gradients(arguments, variant.score, vectors, module, architecture)
    return (
        query._new(_summed_to_heads(dq, query.shape)),
        query._new(_summed_to_heads(dk, key.shape)),
        query._new(_summed_to_heads(dv, value.shape)),
        None if ds is None else _mask_gradient(query, ds, attn_mask),
        *(query._new(x) for x in captured),
    )
