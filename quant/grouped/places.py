"""Where the matrices of a folder in blocks lie: entries as those of any folder, with a block type. folder.py writes it.

No torch. What `blocks.json` claims is checked against the size of `blocks.bin` before a tensor is read.
"""

from __future__ import annotations

import json
from pathlib import Path

from quant.gguf.types import GROUPED, ORDER, ORDER_BYTES, ORDERED
from quant.headers import FolderError, TensorEntry, read_headers

BLOCKS_NAME, PLACES_NAME = "blocks.bin", "blocks.json"
_TYPES = {**GROUPED, **ORDERED}


def block_entries(folder: Path) -> dict[str, TensorEntry] | None:
    """The tensors of a folder in blocks, by name; None for any other folder. Raises FolderError."""
    if not (folder / PLACES_NAME).exists():
        return None
    entries, path = read_headers(folder), folder / BLOCKS_NAME
    try:
        places, n_bytes = json.loads((folder / PLACES_NAME).read_text(encoding="utf-8")), path.stat().st_size
        for name, place in places.items():
            kind, shape, start = _TYPES[place["type"]], tuple(place["shape"]), place["start"]
            if not all(type(one) is int and one > 0 for one in shape) or len(shape) != 2 or shape[1] % kind.block_elements:
                raise ValueError(name)
            entries[name] = TensorEntry(name, path, kind.name, shape, start, kind.n_bytes(shape))
            if not 0 <= start <= n_bytes - kind.n_bytes(shape):
                raise ValueError(name)
            if kind.is_ordered:
                order, length = place["order"], ORDER_BYTES * shape[1]
                entries[name + ORDER] = TensorEntry(name + ORDER, path, "I32", shape[1:], order, length)
                if not 0 <= order <= n_bytes - length:
                    raise ValueError(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FolderError(f"{folder / PLACES_NAME}: is damaged ({type(error).__name__}: {str(error)[:80]})") from None
    return entries
