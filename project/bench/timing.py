"""Time of work, on the CPU by its clock and on a GPU between events; contestants take turns.

On a GPU there are three ways, by what is asked:

- `Recorder`: of kernels. A graph holds the launches of one call, so that what Python takes is not
  in the figure. Ours and PyTorch's are recorded on one stream, and take turns, so that clocks and
  heat are the same for all. Before each repeat the cache (L2) is overwritten, which also gives the
  host a head start.
- `seconds_of_calls`: of short calls of ours, launched while the GPU is busy with other work.
- `milliseconds_on`: of whatever is done on a stream, launches included, as a user waits for it.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

FLUSH_BYTES = 256 << 20  # several times the L2 cache of any GPU
WARM_UP = 3
FEWEST_ROUNDS = 3
TOO_SLOW = 5  # times the fastest: such a contestant has fewer rounds
MOST_ROUNDS = 200  # on the CPU
CALLS = 5  # of ours between two events


# ----- on the CPU -----


def in_turn(
    functions: Mapping[str, Callable[[], Any]],
    seconds: float,
    clock: Callable[[], float] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each call, in rounds that call every function in turn; at least 3 rounds.

    Args:
        functions: by name; each is called once before, for what happens only then.
        seconds: that all rounds are to take together.
        clock: that times a call, `time.perf_counter` if None; `time.process_time` counts what all
            threads work, and not what other programs take.

    """
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    now = clock or time.perf_counter
    end = time.perf_counter() + seconds
    for number in range(MOST_ROUNDS):
        if number >= FEWEST_ROUNDS and time.perf_counter() > end:
            break
        for name, function in functions.items():
            start = now()
            function()
            times[name].append(now() - start)
    return times


def medians(milliseconds: Mapping[str, list[float]], digits: int) -> dict[str, dict[str, float]]:
    """Median, fastest and slowest of each contestant's milliseconds, rounded."""
    figures: dict[str, Callable[[list[float]], float]]
    figures = {"milliseconds": statistics.median, "fastest": min, "slowest": max}
    return {
        figure: {name: round(of(record), digits) for name, record in milliseconds.items()}
        for figure, of in figures.items()
    }


# ----- on a GPU -----


def require_gpu() -> None:
    """End the program where there is no GPU, or only numba's simulator of one.

    Raises:
        SystemExit: so it is.

    """
    import minitorch
    from minitorch.kernels.gpu import runtime

    if runtime.SIMULATED:
        raise SystemExit("this needs a GPU, the simulator is none: unset NUMBA_ENABLE_CUDASIM")
    if not minitorch.cuda.is_available():
        raise SystemExit("no CUDA GPU was found (python -m minitorch doctor)")


def seconds_of_calls(call: Callable[[], Any], head_start: Callable[[], Any], rounds: int) -> float:
    """Seconds of one call of ours on the GPU: the median of the rounds, of `CALLS` calls each.

    Args:
        call: launches kernels on the current stream.
        head_start: launches work that keeps the GPU busy until all calls have been launched.
        rounds: how often.

    """
    from minitorch.kernels.gpu.runtime import cuda, current_stream

    times = []
    stream = current_stream()
    for number in range(-2, rounds):
        for _ in range(4):
            head_start()
        start, end = cuda.event(), cuda.event()
        start.record(stream)
        for _ in range(CALLS):
            call()
        end.record(stream)
        end.synchronize()
        if number >= 0:
            times.append(float(cuda.event_elapsed_time(start, end)) * 1e-3 / CALLS)
    return statistics.median(times)


def milliseconds_on(stream: Any, work: Callable[[], Any]) -> float:
    """Milliseconds between two events around work.

    Args:
        stream: of PyTorch, on which the work is launched.
        work: launches it.

    """
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record(stream)
    work()
    end.record(stream)
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds


@dataclass
class Work:
    """What a graph repeats.

    Args:
        replay: starts it.
        results: what the recorded call returned; each replay writes new values into it.
        close: gives its memory back.

    """

    replay: Callable[[], None]
    results: Any
    close: Callable[[], None]


class Recorder:
    """Makes graphs of calls, all on one stream of its own."""

    def __init__(self) -> None:
        import torch

        self.torch = torch
        self.stream = torch.cuda.Stream()
        self.scratch = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def torch_graph(self, function: Callable[[], Any]) -> Work:
        """A call of PyTorch's functions; it is made once before, for what happens only then.

        Args:
            function: returns tensors.

        """
        torch = self.torch
        with torch.cuda.stream(self.stream):
            function()
        self.stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            results = function()
        self._run(graph.replay)
        return Work(graph.replay, results, graph.reset)

    def our_graph(self, function: Callable[[], Any]) -> Work:
        """The same for a function that returns tensors of minitorch."""
        import minitorch
        from minitorch.kernels.gpu import runtime

        stream = runtime.cuda.external_stream(self.stream.cuda_stream)
        with runtime.on_stream(stream):
            function()
        self.stream.synchronize()
        graph = minitorch.cuda.Graph(stream)
        with graph.capture():
            results = function()
        self._run(graph.replay)
        return Work(graph.replay, results, graph.close)

    def our_calls(self, function: Callable[[], Any]) -> Work:
        """The same without a graph, for what cannot be recorded: each repeat is a call. Where the
        GPU takes longer than Python, that is no difference.
        """
        from minitorch.kernels.gpu import runtime

        stream = runtime.cuda.external_stream(self.stream.cuda_stream)
        results: list[Any] = []

        def call() -> None:
            with runtime.on_stream(stream):
                results[:] = function()

        self._run(call)
        return Work(call, results, results.clear)

    def _run(self, replay: Callable[[], None]) -> None:
        with self.torch.cuda.stream(self.stream):
            replay()
        self.stream.synchronize()

    def time_once(self, replay: Callable[[], None]) -> float:
        """Milliseconds of one repeat with a cold cache."""
        with self.torch.cuda.stream(self.stream):
            self.scratch.zero_()
            self.scratch.zero_()
            return milliseconds_on(self.stream, replay)

    def medians(self, works: dict[str, Work], rounds: int) -> dict[str, dict[str, Any]]:
        """Each contestant's median in milliseconds, and the number of rounds behind it.

        Args:
            works: by name.
            rounds: `FEWEST_ROUNDS` for those that take `TOO_SLOW` times as long as the fastest.

        """
        once = {name: self.time_once(work.replay) for name, work in works.items()}
        fastest = min(once.values(), default=0.0)
        turns = {n: FEWEST_ROUNDS if t > TOO_SLOW * fastest else rounds for n, t in once.items()}
        for _ in range(WARM_UP):
            for name, work in works.items():
                if turns[name] == rounds:
                    self.time_once(work.replay)
        times: dict[str, list[float]] = {name: [] for name in works}
        order, shuffled = list(works), random.Random(0)
        for number in range(rounds):
            shuffled.shuffle(order)  # who comes after a hot one finds lower clocks
            for name in order:
                if number < turns[name]:
                    times[name].append(self.time_once(works[name].replay))
        return {
            name: {"ms": statistics.median(record), "rounds": len(record)}
            for name, record in times.items()
        }
