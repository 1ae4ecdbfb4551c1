"""The network and its optimiser, built from options."""

from __future__ import annotations

import numpy as np

import minitorch
from minitorch import CosineSchedule, DecoderLM, FastOps, Tensor, TensorBackend

from .options import ModelOptions, TrainingOptions
from .tokenizer import Ids

BACKEND = TensorBackend(FastOps)


def build(options: ModelOptions, vocabulary: int) -> DecoderLM:
    """A pre-norm GPT with learned positions, its weights drawn from the library's generators.

    Sets the library's default dtype to the model's, for its inputs have the same.

    Args:
        options: sizes, kind of attention, dtype.
        vocabulary: number of tokens.

    """
    minitorch.set_default_dtype(np.dtype(options.dtype))
    return DecoderLM(
        n_vocab=vocabulary,
        n_embd=options.d_model,
        n_head=options.heads,
        n_positions=options.context,
        p_dropout=options.dropout,
        backend=BACKEND,
        use_flash_attention=options.attention == "flash",
        n_layer=options.layers,
        middle_dim=options.d_middle,
    )


def size(model: DecoderLM) -> int:
    """Number of weights."""
    return sum(parameter.value.size for parameter in model.parameters())


def optimizer(model: DecoderLM, options: TrainingOptions) -> tuple[minitorch.AdamW, CosineSchedule]:
    """AdamW and the schedule that sets its learning rate.

    Args:
        model: whose parameters to train.
        options: learning rate, weight decay, length of the run.

    """
    adamw = minitorch.AdamW(
        model.parameters(),
        lr=options.lr,
        betas=(0.9, options.beta2),
        weight_decay=options.weight_decay,
    )
    return adamw, CosineSchedule(adamw, options.steps, min(options.warmup, options.steps))


def as_tensor(ids: Ids) -> Tensor:
    """Token numbers as the library wants them, stored as floats; any shape."""
    floats = ids.astype(minitorch.get_default_dtype())
    return minitorch.tensor_from_numpy(floats, BACKEND)


def loss(model: DecoderLM, inputs: Ids, targets: Ids) -> Tensor:
    """Mean cross entropy in nats per token, shape (1,).

    Args:
        model: the network.
        inputs: (batch, length).
        targets: (batch, length), the token after each input.

    """
    logits = model(as_tensor(inputs))  # (B, T, V)
    flat = logits.view(targets.size, model.n_vocab)
    return minitorch.softmax_loss(flat, as_tensor(targets.reshape(-1))).mean()
