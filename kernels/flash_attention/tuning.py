"""Sizes of tiles that were measured to be the fastest, by GPU, head size and causal mask.

`python project/tune_attention.py` measures the candidates of each module on the GPU it finds and
rewrites the table; other GPUs' entries stay. Where the table has no entry, a module's own choice
holds: the table makes a kernel faster, never possible.
"""

from __future__ import annotations

Entry = tuple[str, str, tuple[int, int], int, bool]
Numbers = tuple[int, ...]

# (module, kernel, compute capability, head size, causal): the arguments of the module's class of
# tile sizes
# ----- written by project/tune_attention.py -----
TABLE: dict[Entry, Numbers] = {}
# ----- end -----


def choice(
    module: str, kernel: str, architecture: tuple[int, int], head_dim: int, causal: bool
) -> Numbers | None:
    """The measured tile sizes; None where nothing was measured.

    Args:
        module: its NAME.
        kernel: "forward", "key_value" or "query", the two kernels of a backward pass.
        architecture: compute capability.
        head_dim: the compiled head size.
        causal: whether the problem has a right bound (`problem.right is not None`).

    """
    return TABLE.get((module, kernel, architecture, head_dim, causal))


__all__ = ["TABLE", "choice"]
