"""Learn to classify points with tensors on the fast backend: compiled loops, BLAS.

python project/run_fast_tensor.py --dataset xor --hidden 100 --plot
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `project` is found

import minitorch
from minitorch import TensorBackend
from minitorch.kernels.gpu import runtime
from project.points import add_training_options, make_parser, make_points, parse, picture
from project.run_tensor import TensorTrain

FastTensorBackend = TensorBackend(minitorch.FastOps)


class FastTrain(TensorTrain):
    """`TensorTrain`, on the fast backend if not told otherwise."""

    def __init__(self, hidden_layers: int, backend: TensorBackend = FastTensorBackend) -> None:
        super().__init__(hidden_layers, backend)


def choose_backend(name: str) -> TensorBackend:
    """The backend called "cpu" or "gpu".

    Raises:
        SystemExit: there is no GPU.

    """
    if name == "cpu":
        return FastTensorBackend
    if not runtime.is_available():
        raise SystemExit("--backend gpu: no CUDA GPU was found (python -m minitorch doctor)")
    return TensorBackend(minitorch.CudaOps)


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Run from the command line; returns the losses."""
    parser = make_parser(__doc__, points=50)
    add_training_options(parser, hidden=10, rate=0.5, epochs=500)
    parser.add_argument("--backend", "--BACKEND", choices=["cpu", "gpu"], default="cpu")
    args = parse(parser, argv, weight_bytes=3 * 8)
    backend = choose_backend(args.backend)
    graph = make_points(args)
    trainer = FastTrain(args.hidden, backend)
    start = time.perf_counter()
    losses = trainer.train(graph, args.rate, args.epochs)
    per_epoch = (time.perf_counter() - start) / args.epochs
    print(f"{1000 * per_epoch:.2f} ms an epoch, compilation included")
    if args.plot:
        with minitorch.no_grad():
            print(picture(graph, lambda points: trainer.run_many(points).to_numpy()[:, 0].tolist()))
    return losses


if __name__ == "__main__":
    main()
