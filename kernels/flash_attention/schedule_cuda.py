"""The rules of schedule.py as device functions, for the kernels of all GPU families."""

from __future__ import annotations

from ..gpu.runtime import device_function
from .schedule import rules

first_key, end_key, key_tiles, query_tiles, tile_start, is_whole = rules(device_function)

__all__ = ["end_key", "first_key", "is_whole", "key_tiles", "query_tiles", "tile_start"]
