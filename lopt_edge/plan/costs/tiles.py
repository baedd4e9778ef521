"""How attention is cut into tiles of queries.

The rule: what decides both what is run and what is predicted stands once; the planner (module_bytes.py) and the code that
runs (run/model/query_tiles.py) ask this file. How large pieces are is not decided here: sizes that differ by device are
plan/facts/device_kinds.py's, those of our modules quant/sizes.py's.
"""

from __future__ import annotations

from typing import NamedTuple

from lopt_edge.plan.facts.device_kinds import kind_of


class QueryTile(NamedTuple):
    """A tile of attention: its queries, and the keys that they see."""

    queries: slice
    keys: slice


def query_tiles(n_queries: int, n_keys: int, *, group: int, window: int | None, device_type: str) -> list[QueryTile]:
    """The tiles into which attention is cut; the last query is at the last key. `group` heads share keys and are in one
    tile."""
    n_tile = _tile_queries(n_keys, group=group, device_type=device_type)
    return [_tile(start, n_tile, n_queries, n_keys, window) for start in range(0, n_queries, n_tile)]


def _tile_queries(n_keys: int, *, group: int, device_type: str) -> int:
    return max(1, kind_of(device_type).score_bytes // (4 * group * n_keys))


def _tile(start: int, n_tile: int, n_queries: int, n_keys: int, window: int | None) -> QueryTile:
    end, earlier = min(start + n_tile, n_queries), n_keys - n_queries
    first_key = 0 if window is None else max(0, start + earlier - window + 1)
    return QueryTile(slice(start, end), slice(first_key, end + earlier))
