"""The transformer of `run_transformer.py` in training, ours and the same one in PyTorch.

Neither library is imported before it is asked for: a process may measure one of them alone.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from project.weight_decay import decay_groups

VOCABULARY = 96
ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8}
WEIGHT_DECAY = 0.1  # of matrices
WARM_UP, CHECKED = 2, 5  # steps before a graph is captured; losses that are compared


@dataclass(frozen=True)
class Network:
    """A network and its batch.

    Args:
        layers: of attention and feed-forward.
        d_model: size of a token's vector.
        heads: of attention.
        context: tokens of a row, T.
        batch: rows, B.
        middle: size of the feed-forward layers.
        precision: "fp32", or "bf16" for products in bfloat16 (on a GPU).

    """

    layers: int
    d_model: int
    heads: int
    context: int
    batch: int
    middle: int
    precision: str = "fp32"

    def tokens(self, seed: int) -> tuple[Any, Any]:
        """Random inputs and targets, (B, T) int64."""
        ids = np.random.default_rng(seed).integers(0, VOCABULARY, (self.batch, self.context + 1))
        return np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:])


@dataclass(frozen=True)
class Training:
    """A network in training: `step` launches a step, `loss` is that before the last one."""

    step: Callable[[], None]
    loss: Callable[[], float]
    stream: Any = None  # of PyTorch, on which it works on a GPU

    def first_losses(self) -> list[float]:
        """The losses of the first steps, which are taken."""
        losses = []
        for _ in range(CHECKED):
            self.step()
            losses.append(self.loss())
        return losses


def check_losses(losses: dict[str, list[float]], tolerance: float) -> None:
    """See that all have learnt the same.

    Raises:
        AssertionError: the losses of one are not those of the first, to the relative tolerance.

    """
    first, *others = losses
    for name in others:
        np.testing.assert_allclose(losses[name], losses[first], tolerance, err_msg=name)


# ----- ours -----


def our_model(network: Network, device: str, seed: int) -> Any:
    """Ours in float32, with products in the network's precision; "cpu" or "cuda"."""
    import minitorch
    from project.transformer import model as models

    minitorch.set_default_dtype(np.float32)
    minitorch.manual_seed(seed)
    return minitorch.DecoderLM(
        VOCABULARY, network.d_model, network.heads, network.context, p_dropout=0.0,
        n_layer=network.layers, middle_dim=network.middle, backend=models.backend(device),
        use_flash_attention=True,
        compute_dtype=models.COMPUTE_DTYPES[network.precision] if device == "cuda" else None,
    )  # fmt: skip


def our_training(network: Network, model: Any, seed: int) -> Training:
    """minitorch: on the GPU a few steps kernel by kernel, then a graph."""
    import minitorch
    from minitorch.kernels.gpu import runtime
    from project.transformer import model as models

    inputs, targets = (models.as_tensor(ids, model.backend) for ids in network.tokens(seed))
    on_gpu = model.backend.cuda
    groups = decay_groups(model.parameters(), WEIGHT_DECAY)
    optimizer = minitorch.AdamW(groups, capturable=on_gpu, **ADAMW)
    kept: dict[str, Any] = {}

    def compute() -> None:
        optimizer.zero_grad()
        loss = models.loss(model, inputs, targets)
        kept["loss"] = loss.detach()
        loss.backward()
        optimizer.step()

    def loss() -> float:
        return float(kept["loss"].item())

    if not on_gpu or runtime.SIMULATED:
        return Training(compute, loss)
    import torch

    from minitorch.cuda.driver import stream_handle

    graph = minitorch.cuda.Graph()
    taken = 0

    def step() -> None:
        nonlocal taken
        taken += 1
        if taken <= WARM_UP:
            with runtime.on_stream(graph.stream):
                compute()
            return
        if taken == WARM_UP + 1:
            with graph.capture():
                compute()
        graph.replay()

    return Training(step, loss, torch.cuda.ExternalStream(stream_handle(graph.stream)))


# ----- PyTorch's -----


def torch_model(network: Network, weights: dict[str, Any] | None = None) -> Any:
    """The same network in PyTorch.

    Args:
        network: its sizes.
        weights: those that ours begins with, by the names of its `state_dict`; PyTorch's own, the
            same ones every time, if None.

    """
    import torch
    from torch import nn
    from torch.nn import functional as F

    d, heads, middle = network.d_model, network.heads, network.middle

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(d), nn.LayerNorm(d)
            self.qkv = nn.Linear(d, 3 * d)  # one product, as in nanoGPT
            self.out = nn.Linear(d, d)
            self.linear_in, self.linear_out = nn.Linear(d, middle), nn.Linear(middle, d)

        def forward(self, x: Any) -> Any:
            batch, length, _ = x.shape
            q, k, v = self.qkv(self.ln_1(x)).view(batch, length, 3, heads, -1).unbind(2)
            attended = F.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
            )
            x = x + self.out(attended.transpose(1, 2).reshape(batch, length, d))
            return x + self.linear_out(F.gelu(self.linear_in(self.ln_2(x)), approximate="tanh"))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(VOCABULARY, d)
            self.positions = nn.Embedding(network.context, d)
            self.layers = nn.ModuleList(Layer() for _ in range(network.layers))
            self.ln, self.head = nn.LayerNorm(d), nn.Linear(d, VOCABULARY)

        def forward(self, ids: Any) -> Any:
            x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
            for layer in self.layers:
                x = layer(x)
            return self.head(self.ln(x))

    torch.manual_seed(0)
    model = Model()
    if weights is not None:
        copy_weights(model, weights)
    return model


def copy_weights(model: Any, weights: dict[str, Any]) -> None:
    """Set the weights of the PyTorch model to those of minitorch's `state_dict`."""
    import torch

    def put(module: Any, *names: str) -> None:
        parts = [torch.from_numpy(weights[f"{name}.weights"]) for name in names]
        joined = torch.cat(parts, dim=-1)  # minitorch keeps (in, out), PyTorch (out, in)
        linear = isinstance(module, torch.nn.Linear)
        module.weight.copy_(joined.T if linear else joined)
        if getattr(module, "bias", None) is not None:
            biases = [torch.from_numpy(weights[f"{name}.bias"]) for name in names]
            module.bias.copy_(torch.cat(biases))

    with torch.no_grad():
        put(model.tokens, "token_embeddings")
        put(model.positions, "position_embeddings")
        for number, layer in enumerate(model.layers, 1):
            prefix = f"t_layer_{number}."
            put(layer.ln_1, prefix + "ln_1")
            put(layer.ln_2, prefix + "ln_2")
            put(layer.qkv, *(f"{prefix}attention.{x}_projection" for x in "qkv"))
            put(layer.out, prefix + "attention.out_projection")
            put(layer.linear_in, prefix + "ff.linear_in")
            put(layer.linear_out, prefix + "ff.linear_out")
        put(model.ln, "ln")
        put(model.head, "lm_head")


def torch_training(network: Network, model: Any, fused: bool, seed: int) -> Training:
    """PyTorch, eager; `fused` chooses the kind of its AdamW."""
    import torch

    device = next(model.parameters()).device
    inputs, targets = (torch.from_numpy(ids).to(device) for ids in network.tokens(seed))
    groups = decay_groups(model.parameters(), WEIGHT_DECAY)
    optimizer = torch.optim.AdamW(groups, fused=fused, **ADAMW)
    kept: dict[str, Any] = {}

    def precision() -> AbstractContextManager[Any]:
        if network.precision == "bf16":
            return torch.autocast(device.type, torch.bfloat16)  # type: ignore[no-any-return]
        return nullcontext()

    def step() -> None:
        optimizer.zero_grad()
        with precision():
            logits = model(inputs).view(-1, VOCABULARY)
            loss = torch.nn.functional.cross_entropy(logits, targets.reshape(-1))
        kept["loss"] = loss.detach()
        loss.backward()
        optimizer.step()

    def loss() -> float:
        return float(kept["loss"])

    return Training(step, loss, torch.cuda.current_stream() if device.type == "cuda" else None)
