"""Who takes part in the attention benchmark: our kernels, each one forced, and PyTorch's, pinned.

A contestant has a forward pass and a backward pass, each a graph of its own. All compute on the
same memory: ours sees PyTorch's tensors through DLPack.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from project.bench.timing import Recorder, Work

OURS = ("decode", "hopper", "mma", "simt")  # NAMEs of modules in minitorch.cuda.attention
PYTORCH = {
    "flash": "FLASH_ATTENTION",
    "cudnn": "CUDNN_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
}


@dataclass(frozen=True)
class Case:
    """One cell of the benchmark: heads of queries and keys, and what is asked of them."""

    batch: int
    heads: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    causal: bool = False
    dtype: str = "float16"
    dropout_p: float = 0.0
    seed: int = 0

    def inputs(self) -> list[Any]:
        """Query, key, value and the output's gradient, (B, H, N, D), normal, on the GPU."""
        import torch

        generator = torch.Generator("cuda").manual_seed(self.seed)
        lengths = (self.seqlen_q, self.seqlen_k, self.seqlen_k, self.seqlen_q)
        return [
            torch.randn(
                (self.batch, self.heads, length, self.head_dim),
                generator=generator,
                device="cuda",
                dtype=torch.float32,
            ).to(getattr(torch, self.dtype))
            for length in lengths
        ]


@dataclass
class Contestant:
    """Graphs of both passes; the backward one is None if it is not wanted."""

    forward: Work
    backward: Work | None

    def close(self) -> None:
        """Give the memory back."""
        for work in (self.backward, self.forward):
            if work is not None:
                work.close()


def entered(name: str, enter: Callable[[], Contestant | None]) -> Contestant | None:
    """A contestant; None, after a line about it, if it cannot take part.

    Args:
        name: of the contestant.
        enter: makes it, or raises.

    """
    try:
        return enter()
    except (
        Exception
    ) as error:  # no kernel for the case, no memory: others are measured all the same
        print(f"  {name}: {(str(error) or repr(error)).splitlines()[0][:120]}", flush=True)
        return None


# ----- ours -----


@contextmanager
def only(name: str) -> Iterator[None]:
    """Let one module compute everything that our launcher is asked for; "ours": its own choice."""
    from minitorch.cuda import attention as cuda_attention

    modules = cuda_attention.FLASH_ATTENTION
    if name != "ours":
        cuda_attention.FLASH_ATTENTION = tuple(m for m in modules if name == m.NAME)
    try:
        yield
    finally:
        cuda_attention.FLASH_ATTENTION = modules


def ours(
    recorder: Recorder, name: str, case: Case, inputs: list[Any], backward: bool
) -> Contestant | None:
    """A module of ours; None if it does not compute the case on this GPU, or is not there.

    Args:
        recorder: makes the graphs.
        name: of `OURS`, or "ours" for the launcher's choice.
        case: what is asked for.
        inputs: of `Case.inputs`.
        backward: whether the backward pass is wanted too.

    """
    import minitorch
    from minitorch import attention
    from minitorch.cuda import attention as cuda_attention

    q, k, v, do = (minitorch.as_tensor(x) for x in inputs)
    problem = attention.describe(
        q, k, v, is_causal=case.causal, dropout_p=case.dropout_p, seed=case.seed
    )
    ops: Any = q.f.ops
    if name != "ours":
        modules = {m.NAME: m for m in cuda_attention.FLASH_ATTENTION}
        capability = minitorch.kernels.gpu.runtime.compute_capability()
        if name not in modules or modules[name].why_not(problem, capability) is not None:
            return None
        backward = backward and hasattr(modules[name], "backward")
    with only(name):
        forward = recorder.our_graph(lambda: ops.flash_attention_forward(q, k, v, None, problem))
        if not backward:
            return Contestant(forward, None)
        out, _, rows = forward.results
        return Contestant(
            forward,
            recorder.our_graph(
                lambda: ops.flash_attention_backward(do, None, q, k, v, None, out, rows, problem)[
                    :3
                ]
            ),
        )


def our_standard(
    recorder: Recorder, case: Case, inputs: list[Any], backward: bool
) -> Contestant | None:
    """Standard attention of ours: cuBLAS and a fused softmax; calls, not graphs. None if memory is
    too small.
    """
    import minitorch

    q, k, v, do = (minitorch.as_tensor(x) for x in inputs)
    for x in (q, k, v):
        x.requires_grad_(backward)

    def attend() -> tuple[Any]:
        return (q.attention(k, v, is_causal=case.causal),)

    def gradients() -> tuple[Any, ...]:
        for x in (q, k, v):
            x.zero_grad_()
        forward.results[0].backward(do, retain_graph=True)
        return q.grad, k.grad, v.grad

    try:
        forward = recorder.our_calls(attend)
        return Contestant(forward, recorder.our_calls(gradients) if backward else None)
    except minitorch.cuda.OutOfMemoryError as error:
        print("  " + str(error).splitlines()[0][:120], flush=True)
        minitorch.cuda.empty_cache()
        return None


# ----- PyTorch's -----


def pytorchs(
    recorder: Recorder, name: str, case: Case, inputs: list[Any], backward: bool
) -> Contestant:
    """One of PyTorch's backends, all others switched off.

    Args:
        recorder: makes the graphs.
        name: of `PYTORCH`.
        case: what is asked for.
        inputs: of `Case.inputs`.
        backward: whether the backward pass is wanted too.

    Raises:
        RuntimeError: the backend does not take the case.

    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (x.detach().requires_grad_(backward) for x in inputs[:3])

    def attend() -> Any:
        with sdpa_kernel(getattr(SDPBackend, PYTORCH[name])):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=case.causal, dropout_p=case.dropout_p
            )

    return _recorded(recorder, attend, (q, k, v), inputs[3] if backward else None)


def standard(recorder: Recorder, case: Case, inputs: list[Any], backward: bool) -> Contestant:
    """Standard attention by PyTorch's matmul, softmax, dropout and matmul; not causal."""
    import torch

    q, k, v = (x.detach().requires_grad_(backward) for x in inputs[:3])

    def attend() -> Any:
        weights = torch.softmax((q * case.head_dim**-0.5) @ k.mT, -1)
        if case.dropout_p:
            weights = torch.dropout(weights, case.dropout_p, train=True)
        return weights @ v

    return _recorded(recorder, attend, (q, k, v), inputs[3] if backward else None)


def _recorded(
    recorder: Recorder, attend: Callable[[], Any], leaves: Any, grad_out: Any
) -> Contestant:
    """Graphs of a function of PyTorch's and of its gradients."""
    import torch

    forward = recorder.torch_graph(attend)
    if grad_out is None:
        return Contestant(forward, None)
    out = forward.results
    return Contestant(
        forward,
        recorder.torch_graph(lambda: torch.autograd.grad(out, leaves, grad_out, retain_graph=True)),
    )


# ----- correctness -----


def reference(case: Case, inputs: list[Any]) -> list[Any]:
    """Output and gradients of the last head in float64, (N, D) each."""
    import torch

    q, k, v, do = (x[-1, -1].double() for x in inputs)
    scale = case.head_dim**-0.5
    scores = q @ k.T * scale
    if case.causal:
        scores.masked_fill_(torch.ones_like(scores, dtype=torch.bool).triu_(1), -math.inf)
    weights = torch.softmax(scores, -1)
    del scores
    out = weights @ v
    dv = weights.T @ do
    dscores = (do @ v.T).sub_((do * out).sum(-1, keepdim=True)).mul_(weights)
    return [out, dscores @ k * scale, dscores.T @ q * scale, dv]


def errors(contestant: Contestant, wanted: list[Any]) -> tuple[float, float | None]:
    """Largest error of the output, and of the gradients, in the last head."""
    import torch

    def of(results: Any, references: list[Any]) -> float:
        tensors = [
            x if isinstance(x, torch.Tensor) else torch.from_dlpack(x.detach()) for x in results
        ]
        pairs = zip(tensors, references, strict=True)
        return max(float((x.detach()[-1, -1].double() - y).abs().max()) for x, y in pairs)

    forward = contestant.forward.results
    out = forward[:1] if isinstance(forward, tuple | list) else (forward,)
    backward = contestant.backward
    return of(out, wanted[:1]), None if backward is None else of(backward.results, wanted[1:])
