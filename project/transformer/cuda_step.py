"""The training step on the GPU: batches go ahead of it, losses come behind it, nothing waits.

The first steps launch kernel by kernel, which compiles them. Then one step is recorded as a CUDA
graph, and from there on each step is one launch. What differs from step to step is in device
memory: the batch, the learning rate, the loss scale, and the offset of the dropout seeds.
"""

from __future__ import annotations

import numpy as np

import minitorch
from minitorch import AdamW, DecoderLM, GradScaler, rng
from minitorch.cuda.device_array import DeviceArray
from minitorch.cuda.transfer import Download, Pending, Upload
from minitorch.kernels.gpu import runtime
from minitorch.tensor_data import TensorData

from . import model as models
from .options import TrainingOptions, largest_norm
from .tokenizer import Ids

WARM_UP = 2  # steps before the one that is recorded


class CudaStep:
    """Takes training steps on the GPU.

    Args:
        model: the network, on the GPU.
        optimizer: capturable.
        scaler: of the loss; does nothing unless the network computes in float16.
        options: batch, seed, clipping, and whether to use a graph.
        context: length of a sequence.

    """

    def __init__(
        self,
        model: DecoderLM,
        optimizer: AdamW,
        scaler: GradScaler,
        options: TrainingOptions,
        context: int,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.scaler = scaler
        self.options = options
        # The simulator has no graphs; there each step is launched kernel by kernel.
        self.uses_graph = options.graph and not runtime.SIMULATED
        self.graph: minitorch.cuda.Graph | None = None
        self._stream = runtime.cuda.stream()
        windows = np.zeros((options.batch, context + 1), np.int64)
        self._windows = models.as_tensor(windows, model.backend)
        self._upload = Upload(self._windows._tensor._storage)
        loss_dtype = minitorch.get_default_dtype()
        self._loss = DeviceArray.empty(1, loss_dtype)
        self._download = Download(self._loss)
        self._taken = 0

    def start(self, windows: Ids, step: int) -> Pending:
        """Launch a step.

        Args:
            windows: token numbers (batch, context + 1); a target is the token after its input.
            step: its number, which makes its dropout differ from that of other steps.

        Returns:
            The loss before the step, as soon as it is known.

        """
        with runtime.on_stream(self._stream):
            self._upload.send(windows)
            rng.device_offset()[0] = step
            if self.graph is not None:
                self.graph.replay()
            elif self.uses_graph and self._taken >= WARM_UP:
                self._capture().replay()
            else:
                self._compute()
            self._taken += 1
            return self._download.fetch()

    def _capture(self) -> minitorch.cuda.Graph:
        graph = minitorch.cuda.Graph(self._stream)
        with graph.capture():
            self._compute()
        self.graph = graph
        return graph

    def _compute(self) -> None:
        """Forward, backward, clipping and AdamW; reads nothing back."""
        self.model.train()
        self.optimizer.zero_grad()
        with rng.repeatable_step(self.options.seed):
            inputs, targets = self._windows[:, :-1].contiguous(), self._windows[:, 1:].contiguous()
            loss = models.loss(self.model, inputs, targets)
            self._loss.copy_from_device(_storage(loss))
            self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        # Without clipping too, for it finds the gradients that are not finite: no step is taken.
        self.optimizer.clip_grad_norm_(largest_norm(self.options))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        rng.device_offset().fill(0)  # as dropout outside of training steps wants it


def _storage(tensor: minitorch.Tensor) -> DeviceArray:
    data: TensorData = tensor._tensor
    storage: DeviceArray = data._storage
    return storage
