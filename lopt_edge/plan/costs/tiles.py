"""How large a piece is that is computed at a time: of a norm, of the vocabulary, of attention's queries.

The rule: a size that decides both what is run and what is predicted stands once, here or in quant/sizes.py; the planner
and the code that runs read the same one.
"""

from __future__ import annotations

from typing import NamedTuple

VOCABULARY_CHUNK = {"cpu": 1024, "cuda": 8192}  # run.losses
SCORE_BYTES = {"cpu": 4 << 20, "cuda": 32 << 20}  # of a tile's attention scores in fp32


class QueryTile(NamedTuple):
    """A tile's queries, and the keys that they see."""

    queries: slice
    keys: slice


def query_tiles(n_queries: int, n_keys: int, *, group: int, window: int | None, device_type: str) -> list[QueryTile]:
    """How attention is cut; the last query is at the last key. `group` heads share keys and are in one tile."""
    n_tile = _tile_queries(n_keys, group=group, device_type=device_type)
    return [_tile(start, n_tile, n_queries, n_keys, window) for start in range(0, n_queries, n_tile)]


def _tile_queries(n_keys: int, *, group: int, device_type: str) -> int:
    return max(1, SCORE_BYTES[device_type] // (4 * group * n_keys))


def _tile(start: int, n_tile: int, n_queries: int, n_keys: int, window: int | None) -> QueryTile:
    end, earlier = min(start + n_tile, n_queries), n_keys - n_queries
    first_key = 0 if window is None else max(0, start + earlier - window + 1)
    return QueryTile(slice(start, end), slice(first_key, end + earlier))


NORM_TILE = {"cpu": 1 << 20, "cuda": 32 << 20}  # bytes of rows: run.tiled.ROW_BYTES
