"""How attention is cut: into tiles of queries, or into parts of heads.

The rule: what decides both what is run and what is predicted stands once; the planner (module_bytes.py, programs.py) and
the code that runs (run/model/query_tiles.py, run/model/fused_attention.py) ask this file. How large pieces are is not
decided here: sizes that differ by device are plan/facts/device_kinds.py's, those of our modules quant/sizes.py's.
"""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

from lopt_edge.plan.facts.device_kinds import kind_of

FLASH, EFFICIENT = "flash", "efficient"  # torch's fused kernels of attention on a GPU
FLASH_QUERIES, FLASH_WIDTH = 128, 32  # flash rounds tokens and a head's features up to multiples of these
FLASH_WIDEST = 256  # features of a head


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


# parts of heads --------------------------------------------------------------------------------------------------------


def heads_at_once(
    kernel: str, n_rows: int, *, group: int, n_kv_heads: int, head_dim: int, itemsize: int, device_type: str
) -> int:
    """The number of heads of keys whose backward runs at a time; `group` heads share one, `n_rows` are B x T."""
    one = backward_bytes(kernel, n_rows, group=group, head_dim=head_dim, itemsize=itemsize)
    return min(n_kv_heads, max(1, kind_of(device_type).attention_bytes // one))


def forward_bytes(kernel: str, n_rows: int, *, group: int, head_dim: int, itemsize: int) -> int:
    """The bytes that the forward of one head of keys takes: the memory-efficient kernel's repeated keys and values, and its
    part of the output."""
    return 3 * group * n_rows * head_dim * itemsize if kernel == EFFICIENT and group > 1 else 0


def backward_bytes(kernel: str, n_rows: int, *, group: int, head_dim: int, itemsize: int) -> int:
    """The bytes that the backward of one head of keys and its group takes beside the whole gradients.

    Flash attention (aten's flash_api.cpp, mha_bwd): dq in fp32 over rounded sizes, a sum a query, and dk and dv for every
    head of the group. The memory-efficient kernel (attention_backward.cu): keys, values and their gradients for every head,
    fp32 sums of all three in half precision or beyond 128 features, a sum a query. Both: the part's own gradients.
    """
    rows, width = n_rows + FLASH_QUERIES, ceil(head_dim / FLASH_WIDTH) * FLASH_WIDTH
    results = (group + 2) * n_rows * head_dim * itemsize
    if kernel == FLASH:
        repeated = 2 * group * n_rows * head_dim * itemsize if group > 1 else 0
        return group * rows * (width + 1) * 4 + repeated + results
    sums = 3 * group * rows * width * 4 if itemsize != 4 or head_dim > 128 else 0
    return sums + group * rows * 4 + 4 * group * n_rows * head_dim * itemsize + results
