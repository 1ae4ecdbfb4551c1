"""Draw what a bigbird mask is made of: global blocks, a window, random blocks, and all three.

python project/draw_masks.py              # the pictures in README.md
python project/draw_masks.py --length 4096 --block-size 64 --out pictures
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from minitorch import BlockMask, attention_masks
from project.arguments import COUNT, SEED, parser_of, whole

RESULTS = Path(__file__).resolve().parent / "results"
PARTS: dict[str, dict[str, Any]] = {
    "global": {"window": 0, "random_blocks": 0},
    "window": {"global_blocks": 0, "random_blocks": 0},
    "random": {"window": 0, "global_blocks": 0},
    "bigbird": {},
}
DOTS = 50  # per inch: a picture is 4 inches wide


def masks(length: int, block_size: int, seed: int) -> dict[str, BlockMask]:
    """Each part alone, and all together, by name."""
    return {
        name: attention_masks.bigbird(length, block_size, seed=seed, **without)
        for name, without in PARTS.items()
    }


def main(arguments: list[str] | None = None) -> None:
    """Write mask_NAME.png for each."""
    parser = parser_of(__doc__)
    parser.add_argument("--length", type=whole(COUNT), default=2048, help="of the sequence")
    parser.add_argument("--block-size", type=whole(COUNT), default=64, help="tokens of a block")
    parser.add_argument("--seed", type=whole(SEED), default=0, help="of the random blocks")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder; default: %(default)s")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    for name, mask in masks(given.length, given.block_size, given.seed).items():
        path = given.out / f"mask_{name}.png"
        mask.picture().savefig(path, dpi=DOTS, metadata={"Software": None})
        print(f"{path}: {mask.sparsity():.1f}% of the blocks are skipped")


if __name__ == "__main__":
    main()
