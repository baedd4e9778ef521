"""Model folders written tensor by tensor: shards of bounded size, and their index.

The layout (names, dtypes, shapes) is known before the first byte, so that the cut into shards and every header are too, and
memory has one tensor at a time. Used by quantising, by merging and by tools that make models. A folder with one shard has
no index, as transformers writes it. The caller makes the folder and gives it its final name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from math import prod
from pathlib import Path

from torch import Tensor

from quant.files import tensor_bytes
from quant.headers import INDEX_NAME, SINGLE_NAME, SafetensorsWriter
from quant.sizes import DTYPE_BYTES

SHARD_BYTES = 4_000_000_000
Layout = Sequence[tuple[str, str, tuple[int, ...]]]


def write_sharded(
    folder: Path,
    layout: Layout,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    shard_bytes: int = SHARD_BYTES,
    on_tensor: Callable[[str], None] = lambda name: None,
) -> int:
    """Write CPU tensors that come in the layout's order; returns their bytes. `on_tensor` gets each name once written."""
    shards = _cut(layout, shard_bytes)
    weight_map: dict[str, str] = {}
    stream = iter(tensors)
    for number, shard in enumerate(shards, start=1):
        file_name = SINGLE_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with SafetensorsWriter(folder / file_name, shard) as writer:
            for _ in shard:
                name, tensor = next(stream)
                writer.write(name, tensor_bytes(tensor.contiguous()))
                del tensor  # or it would live on while the next one is made
                weight_map[name] = file_name
                on_tensor(name)
    total = sum(_n_bytes(dtype, shape) for _, dtype, shape in layout)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return total


def _cut(layout: Layout, shard_bytes: int) -> list[list[tuple[str, str, tuple[int, ...]]]]:
    shards: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    filled = 0
    for entry in layout:
        size = _n_bytes(entry[1], entry[2])
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += size
    return shards


def _n_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return prod(shape) * DTYPE_BYTES[dtype]
