"""The network and its optimiser, built from options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

import minitorch
from minitorch import (
    CosineSchedule,
    CudaKernelOps,
    DecoderLM,
    FastOps,
    Tensor,
    TensorBackend,
)
from project.weight_decay import decay_groups, decays

from . import attention
from .errors import UserError
from .options import ModelOptions, TrainingOptions
from .tokenizer import Ids

Array = npt.NDArray[Any]
BACKENDS = {"cpu": TensorBackend(FastOps), "cuda": TensorBackend(CudaKernelOps)}
COMPUTE_DTYPES = {"": None, "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def backend(device: str) -> TensorBackend:
    """What computes on a device.

    Args:
        device: "cpu" or "cuda".

    Raises:
        UserError: there is no GPU.

    """
    if device == "cuda" and not minitorch.cuda.is_available():
        raise UserError(
            "--device cuda needs a GPU, and numba finds none: `python -m minitorch doctor` says "
            "what is missing"
        )
    return BACKENDS[device]


def build(options: ModelOptions, vocabulary: int, device: str = "cpu") -> DecoderLM:
    """A pre-norm GPT with learned positions, its weights drawn from the library's generators.

    Sets the library's default dtype to that of the weights, for its inputs have the same.

    Args:
        options: sizes, kind of attention, dtype, precision (which a CPU leaves at the dtype).
        vocabulary: number of tokens.
        device: "cpu" or "cuda".

    Raises:
        UserError: there is no GPU, or no such kind of attention.

    """
    minitorch.set_default_dtype(np.dtype(options.dtype))
    return DecoderLM(
        n_vocab=vocabulary,
        n_embd=options.d_model,
        n_head=options.heads,
        n_positions=options.context,
        p_dropout=options.dropout,
        backend=backend(device),
        use_flash_attention=options.attention != "standard",
        block_mask=attention.mask_of(options.attention, options.context),
        n_layer=options.layers,
        middle_dim=options.d_middle,
        compute_dtype=COMPUTE_DTYPES[options.precision] if device == "cuda" else None,
    )


def size(model: DecoderLM) -> int:
    """Number of weights."""
    return sum(parameter.value.size for parameter in model.parameters())


def optimizer(model: DecoderLM, options: TrainingOptions) -> tuple[minitorch.AdamW, CosineSchedule]:
    """AdamW and the schedule that sets its learning rate; on the GPU it keeps everything there.

    Matrices decay; biases and norms do not.

    Args:
        model: whose parameters to train.
        options: learning rate, weight decay, length of the run.

    """
    adamw = minitorch.AdamW(
        decay_groups(model.parameters(), options.weight_decay),
        lr=options.lr,
        betas=(0.9, options.beta2),
        capturable=options.device == "cuda",
    )
    return adamw, CosineSchedule(adamw, options.steps, min(options.warmup, options.steps))


def grouped_state(state: Mapping[str, Array], model: DecoderLM) -> dict[str, Array]:
    """The state of an optimiser from `optimizer`.

    Args:
        state: that, or one of before there were groups, when all parameters decayed and were
            numbered in the order of the model: it is put into the present order.
        model: whose parameters it is for.

    """
    parameters = list(model.parameters())
    numbers = range(len(parameters))
    if "lr" not in state or "steps" not in state or state["lr"].shape == (2,):
        return dict(state)
    if state["steps"].shape != (len(parameters),):
        return dict(state)
    order = sorted(numbers, key=lambda number: not decays(parameters[number]))
    places = {str(old): new for new, old in enumerate(order)}
    renamed = {"lr": np.full(2, state["lr"]), "steps": state["steps"][order]}
    for name, array in state.items():
        slot, _, number = name.partition(".")
        if name not in ("lr", "steps"):
            renamed[f"{slot}.{places.get(number, number)}"] = array
    return renamed


def as_tensor(ids: Ids, backend: TensorBackend) -> Tensor:
    """Token numbers as the library wants them, stored as floats; any shape."""
    floats = ids.astype(minitorch.get_default_dtype())
    return minitorch.tensor_from_numpy(floats, backend, requires_grad=False)


def loss_of_ids(model: DecoderLM, inputs: Ids, targets: Ids) -> Tensor:
    """`loss` of token numbers on the host."""
    return loss(model, as_tensor(inputs, model.backend), as_tensor(targets, model.backend))


def loss(model: DecoderLM, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in nats per token, shape (1,).

    Args:
        model: the network.
        inputs: token numbers, (batch, length).
        targets: (batch, length), the token after each input.

    """
    logits = model(inputs)  # (B, T, V)
    flat = logits.view(targets.size, model.n_vocab)
    return minitorch.softmax_loss(flat, targets.view(targets.size)).mean()
