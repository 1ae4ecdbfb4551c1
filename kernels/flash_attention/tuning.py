"""Sizes of tiles that were measured to be the fastest, by GPU, head size, causal mask and length.

`python project/bench/tune_attention.py` measures the candidates of each module on the GPU it finds
and rewrites the table; other GPUs' entries stay. Where the table has no entry, a module's own
choice holds: the table makes a kernel faster, never possible.
"""

from __future__ import annotations

Entry = tuple[str, str, tuple[int, int], int, bool, bool]
Numbers = tuple[int, ...]

SHORT = 1024  # queries, up to which a sequence is short: few tiles for each multiprocessor

# (module, kernel, compute capability, head size, causal, short): the arguments of the module's
# class of tile sizes
# ----- written by project/bench/tune_attention.py -----
TABLE: dict[Entry, Numbers] = {
    ("hopper", "forward", (9, 0), 64, False, False): (3, 128, 2, 1, 0),
    ("hopper", "forward", (9, 0), 64, False, True): (3, 128, 3, 1, 0),
    ("hopper", "forward", (9, 0), 64, True, False): (3, 128, 3, 1, 0),
    ("hopper", "forward", (9, 0), 64, True, True): (2, 128, 2, 1, 1),
    ("hopper", "forward", (9, 0), 128, False, False): (2, 160, 2, 1, 1),
    ("hopper", "forward", (9, 0), 128, False, True): (2, 128, 2, 0, 1),
    ("hopper", "forward", (9, 0), 128, True, False): (2, 128, 2, 1, 0),
    ("hopper", "forward", (9, 0), 128, True, True): (2, 128, 2, 1, 0),
    ("hopper", "forward", (9, 0), 256, False, False): (2, 80, 2, 0, 1),
    ("hopper", "forward", (9, 0), 256, False, True): (2, 80, 2, 0, 1),
    ("hopper", "forward", (9, 0), 256, True, False): (2, 80, 2, 0, 1),
    ("hopper", "forward", (9, 0), 256, True, True): (2, 64, 2, 1, 0),
    ("hopper", "key_value", (9, 0), 64, False, False): (128, 96, 2, 2),
    ("hopper", "key_value", (9, 0), 64, False, True): (128, 128, 2, 2),
    ("hopper", "key_value", (9, 0), 64, True, False): (128, 128, 2, 2),
    ("hopper", "key_value", (9, 0), 64, True, True): (128, 128, 2, 2),
    ("hopper", "key_value", (9, 0), 128, False, False): (128, 64, 2, 2),
    ("hopper", "key_value", (9, 0), 128, False, True): (128, 64, 2, 2),
    ("hopper", "key_value", (9, 0), 128, True, False): (128, 64, 2, 2),
    ("hopper", "key_value", (9, 0), 128, True, True): (128, 64, 2, 2),
    ("hopper", "query", (9, 0), 64, False, False): (128, 128, 2, 2),
    ("hopper", "query", (9, 0), 64, False, True): (128, 128, 2, 2),
    ("hopper", "query", (9, 0), 64, True, False): (128, 128, 2, 2),
    ("hopper", "query", (9, 0), 64, True, True): (128, 128, 2, 2),
    ("hopper", "query", (9, 0), 128, False, False): (128, 96, 2, 2),
    ("hopper", "query", (9, 0), 128, False, True): (128, 80, 2, 2),
    ("hopper", "query", (9, 0), 128, True, False): (128, 96, 2, 2),
    ("hopper", "query", (9, 0), 128, True, True): (128, 64, 2, 2),
    ("hopper", "query", (9, 0), 256, False, False): (128, 48, 2, 1),
    ("hopper", "query", (9, 0), 256, False, True): (128, 48, 2, 1),
    ("hopper", "query", (9, 0), 256, True, False): (128, 48, 2, 1),
    ("hopper", "query", (9, 0), 256, True, True): (128, 48, 2, 1),
    ("mma", "forward", (9, 0), 64, False, False): (128, 64, 4, 2, True),
    ("mma", "forward", (9, 0), 64, False, True): (128, 64, 4, 2, True),
    ("mma", "forward", (9, 0), 64, True, False): (128, 64, 4, 2, True),
    ("mma", "forward", (9, 0), 64, True, True): (128, 64, 4, 2, True),
    ("mma", "forward", (9, 0), 128, False, False): (128, 64, 4, 2, False, 1, 1, True),
    ("mma", "forward", (9, 0), 128, False, True): (128, 64, 4, 2, False, 1, 1, True),
    ("mma", "forward", (9, 0), 128, True, False): (128, 64, 4, 2, False, 1, 1, True),
    ("mma", "forward", (9, 0), 128, True, True): (128, 64, 4, 2, False, 1, 1, True),
    ("mma", "forward", (9, 0), 256, False, False): (128, 64, 8, 2, False, 1, 1, True),
    ("mma", "forward", (9, 0), 256, False, True): (128, 64, 8, 2, False, 1, 1, True),
    ("mma", "forward", (9, 0), 256, True, False): (64, 64, 4, 1, False, 1, 1, True),
    ("mma", "forward", (9, 0), 256, True, True): (64, 64, 4, 1, False, 1, 1, True),
    ("mma", "key_value", (9, 0), 64, False, False): (128, 32, 4, 2),
    ("mma", "key_value", (9, 0), 64, False, True): (128, 32, 4, 2),
    ("mma", "key_value", (9, 0), 64, True, False): (128, 32, 4, 2),
    ("mma", "key_value", (9, 0), 64, True, True): (128, 32, 4, 2),
    ("mma", "key_value", (9, 0), 128, False, False): (64, 64, 4, 2),
    ("mma", "key_value", (9, 0), 128, False, True): (64, 64, 4, 2),
    ("mma", "key_value", (9, 0), 128, True, False): (64, 64, 4, 2),
    ("mma", "key_value", (9, 0), 128, True, True): (64, 64, 4, 2),
    ("mma", "key_value", (9, 0), 256, False, False): (128, 32, 8, 2, False, 1, 2),
    ("mma", "key_value", (9, 0), 256, False, True): (128, 32, 8, 2, False, 1, 2),
    ("mma", "key_value", (9, 0), 256, True, False): (128, 32, 8, 2, False, 1, 2),
    ("mma", "key_value", (9, 0), 256, True, True): (64, 32, 4, 1, False, 1, 2),
    ("mma", "query", (9, 0), 64, False, False): (256, 64, 8, 2),
    ("mma", "query", (9, 0), 64, False, True): (128, 64, 4, 2),
    ("mma", "query", (9, 0), 64, True, False): (128, 64, 4, 2),
    ("mma", "query", (9, 0), 64, True, True): (128, 64, 4, 2),
    ("mma", "query", (9, 0), 128, False, False): (128, 32, 4, 2),
    ("mma", "query", (9, 0), 128, False, True): (128, 32, 4, 2),
    ("mma", "query", (9, 0), 128, True, False): (128, 32, 4, 2),
    ("mma", "query", (9, 0), 128, True, True): (128, 32, 4, 2),
    ("mma", "query", (9, 0), 256, False, False): (128, 64, 8, 1),
    ("mma", "query", (9, 0), 256, False, True): (64, 32, 4, 1),
    ("mma", "query", (9, 0), 256, True, False): (64, 64, 4, 2),
    ("mma", "query", (9, 0), 256, True, True): (64, 32, 4, 1),
}
# ----- end -----


def choice(
    module: str,
    kernel: str,
    architecture: tuple[int, int],
    head_dim: int,
    causal: bool,
    length: int = SHORT + 1,
) -> Numbers | None:
    """The measured tile sizes; None where nothing was measured.

    Args:
        module: its NAME.
        kernel: "forward", "key_value" or "query", the two kernels of a backward pass.
        architecture: compute capability.
        head_dim: the compiled head size.
        causal: whether the problem has a right bound (`problem.right is not None`).
        length: number of queries.

    """
    return TABLE.get((module, kernel, architecture, head_dim, causal, length <= SHORT))


__all__ = ["SHORT", "TABLE", "choice"]
