"""CUDA graphs: the launches of a training step recorded once and repeated by one call.

A launch from Python takes some twenty microseconds, a kernel of a small network takes two. A graph
holds the launches with all their arguments, so that the driver repeats them back to back.

    graph = minitorch.cuda.Graph()
    with graph.capture():
        step()  # launches are recorded, nothing is computed
    for batch in batches:
        inputs.copy_from_host(batch)  # a graph reads and writes the same addresses each time
        graph.replay()

What a graph may contain: kernels, copies and fills on the current stream. No copy to the host, no
waiting, nothing that compiles: run the same code once or twice before. A step with dropout belongs
into `rng.repeatable_step`.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .. import rng
from ..kernels.gpu import runtime
from . import allocator, driver
from .device_array import error_word


class Graph:
    """Work of the GPU, recorded by `capture` and repeated by `replay`.

    Tensors made during the capture have memory of the graph's own, which lives as long as the graph
    does; each replay writes new values into them.

    Args:
        stream: of `runtime.cuda.stream()`, on which it is recorded and repeated; a new one if None.

    Raises:
        RuntimeError: there is no GPU, or only the simulator, which has no graphs.

    """

    def __init__(self, stream: Any = None) -> None:
        if not runtime.is_available() or runtime.SIMULATED:
            where = "the simulator has none" if runtime.SIMULATED else "there is none here"
            raise RuntimeError(f"a CUDA graph needs a GPU, {where}: run the work directly")
        driver.use_context()
        self.stream = runtime.cuda.stream() if stream is None else stream
        self._pool = allocator.Pool()
        self._executable: Any = None

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Record what the block launches; nothing runs.

        Raises:
            RuntimeError: the graph has been captured before, or the block did something that cannot
                be recorded.

        """
        if self._executable is not None:
            raise RuntimeError("this graph holds work already: make a new Graph")
        error_word(), rng.device_offset()  # they outlive the graph: made outside its memory
        bindings, stream = driver.bindings(), driver.stream_handle(self.stream)
        # A tensor that dies of garbage collection in between would free memory, which a capture
        # does not allow.
        gc.collect()
        collecting = gc.isenabled()
        gc.disable()
        mode = bindings.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        try:
            with runtime.on_stream(self.stream), allocator.use_pool(self._pool):
                driver.check(bindings.cuStreamBeginCapture(stream, mode))
                try:
                    yield
                except BaseException:
                    bindings.cuStreamEndCapture(stream)  # the stream is usable again
                    raise
                graph = driver.check(bindings.cuStreamEndCapture(stream))
        finally:
            if collecting:
                gc.enable()
        self._executable = driver.check(bindings.cuGraphInstantiate(graph, 0))
        driver.check(bindings.cuGraphDestroy(graph))

    def replay(self) -> None:
        """Do the recorded work, in order on the graph's stream; returns before it is done.

        Raises:
            RuntimeError: nothing has been captured.

        """
        if self._executable is None:
            raise RuntimeError("this graph holds no work: use `with graph.capture():` first")
        handle = driver.stream_handle(self.stream)
        driver.check(driver.bindings().cuGraphLaunch(self._executable, handle))

    def close(self) -> None:
        """Give back the graph and its memory; tensors made in it must not be used any more."""
        if self._executable is not None:
            driver.check(driver.bindings().cuStreamSynchronize(driver.stream_handle(self.stream)))
            driver.check(driver.bindings().cuGraphExecDestroy(self._executable))
            self._executable = None
        self._pool.close()
