"""Safetensors headers: which tensor lies where in which file of a model folder. Reads no tensor data, imports no torch.

A model folder is untrusted input. Rules: a header is at most 32 MiB (of an 8B model in 4 bits it has 0.2) of plain JSON,
as `untrusted` reads it; each tensor's byte range must lie inside its file and match its dtype and shape, so that nothing is
ever allocated on the word of a header alone; an index file may name only files directly inside the folder. Pickle weights
(.bin, .pt) are never read. Faults raise `FolderError`, which names the file; callers turn it into their own error type.

The writer (`SafetensorsWriter`) is here because safetensors' own `save_file` wants all tensors of a file at once, and we
must never keep more than one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from quant.sizes import DTYPE_BYTES
from quant.untrusted import MAX_JSON_BYTES, FolderError, check_folder, file_bytes, parse_json, pickles_in, read_json

__all__ = ["INDEX_NAME", "SINGLE_NAME", "FolderError", "SafetensorsWriter", "TensorEntry", "read_header", "read_headers",
           "read_json"]  # fmt: skip

MAX_DIMENSIONS = 8  # of a tensor; a shape of a million numbers would take minutes to multiply
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


class Beside(NamedTuple):
    """The place of a second tensor of as many bytes, whose units of so many bytes come in turn with those of the first."""

    path: Path
    start: int
    unit_bytes: int


@dataclass(frozen=True)
class TensorEntry:
    """The place of one tensor in a file; `start` is its byte offset from the beginning of the file.

    What readers undo: `rotary_heads` have their rows pair by pair, (0, n/2, 1, n/2 + 1, ...) of n; `offset` was added;
    `transposed`: the file has the columns of the matrix one after the other; `beside`: every other row lies elsewhere.
    """

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    n_bytes: int
    rotary_heads: int = 0
    offset: float = 0.0
    transposed: bool = False
    beside: Beside | None = None


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file by name, each range checked against the file's real size. Raises FolderError."""
    n_bytes = _weight_bytes(path)
    try:
        with path.open("rb") as file:
            head = file.read(8)
            if len(head) < 8:
                raise FolderError(f"{path}: {n_bytes} bytes is too short for a safetensors file (truncated?)")
            header_bytes = int.from_bytes(head, "little")
            if header_bytes > min(MAX_JSON_BYTES, n_bytes - 8):
                raise FolderError(f"{path}: says its header has {header_bytes} bytes, the file has {n_bytes}")
            header = parse_json(file.read(header_bytes).decode("utf-8"))
    except OSError as error:
        raise FolderError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise FolderError(f"{path}: its header is not valid JSON ({str(error)[:200]})") from None
    if not isinstance(header, dict):
        raise FolderError(f"{path}: its header is not a JSON object")
    items = ((name, value) for name, value in header.items() if name != "__metadata__")
    entries = {name: _entry(name, value, path, 8 + header_bytes, n_bytes) for name, value in items}
    end = 0
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.n_bytes)):
        if entry.start < end:  # else a small file could stand for any amount of tensors
            raise FolderError(f"{path}: the bytes of tensor {entry.name[:80]!r} overlap those of another")
        end = entry.start + entry.n_bytes
    return entries


def _weight_bytes(path: Path) -> int:
    """The size of a weights file. The error for a missing one names the pickle that lies in its place, if one does."""
    found = [] if os.path.lexists(path) else pickles_in(path.parent)
    if found:
        raise FolderError(f"{path}: not found; {_pickle_reason(found[0])}")
    return file_bytes(path)


def _pickle_reason(name: str) -> str:
    return f"the folder holds pickle weights only ({name}); loading them could run foreign code. Use the safetensors form"


def _entry(name: str, value: Any, path: Path, data_start: int, file_bytes: int) -> TensorEntry:
    shown = repr(name[:80])
    try:
        dtype, shape = str(value["dtype"])[:20], tuple(value["shape"])
        begin, end = value["data_offsets"]
        integers = len(shape) <= MAX_DIMENSIONS and all(
            type(number) is int and 0 <= number < 2**63 for number in (*shape, begin, end)
        )
    except (TypeError, KeyError, ValueError):
        raise FolderError(f"{path}: tensor {shown} has a malformed header entry") from None
    if not integers or dtype not in DTYPE_BYTES or end - begin != prod(shape) * DTYPE_BYTES[dtype]:
        raise FolderError(f"{path}: tensor {shown} has an inconsistent dtype, shape or byte range")
    if data_start + end > file_bytes:
        raise FolderError(f"{path}: truncated: tensor {shown} ends at byte {data_start + end}, the file has {file_bytes}")
    return TensorEntry(name, path, dtype, shape, data_start + begin, end - begin)


def read_headers(folder: Path) -> dict[str, TensorEntry]:
    """All tensors of a model folder by name, from its single safetensors file or through its index. Raises FolderError.

    In a folder that has both, the single file counts, as in transformers.
    """
    index_path, weight_map = folder / INDEX_NAME, dict[str, Any]()
    check_folder(folder)
    if (folder / SINGLE_NAME).exists():
        names = [SINGLE_NAME]
    elif index_path.exists():
        index = read_json(index_path)
        found = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(found, dict) or not found:
            raise FolderError(f"{index_path}: has no 'weight_map' object")
        weight_map = found
        names = sorted({_shard_name(value, index_path) for value in weight_map.values()})
    else:
        raise FolderError(_no_weights(folder))
    entries: dict[str, TensorEntry] = {}
    for name in names:
        if not os.path.exists(folder / name):
            raise FolderError(f"{folder / name}: the shard is named in {INDEX_NAME} but missing")
        entries.update(read_header(folder / name))
    missing = sorted(set(weight_map) - set(entries))
    if missing:
        raise FolderError(f"{index_path}: names {len(missing)} tensors that no shard holds, e.g. {missing[0][:80]!r}")
    return entries


def _shard_name(value: Any, index_path: Path) -> str:
    if not isinstance(value, str) or Path(value).name != value or not value.endswith(".safetensors"):
        raise FolderError(f"{index_path}: shard name {str(value)[:80]!r} is not a .safetensors file inside the folder")
    return value


def _no_weights(folder: Path) -> str:
    found = pickles_in(folder)
    what = _pickle_reason(found[0]) if found else f"no weights here (neither {SINGLE_NAME} nor {INDEX_NAME})"
    return f"{folder}: {what}"


class SafetensorsWriter:
    """A writer of one safetensors file, tensor by tensor. The layout is declared first, then the bytes come in that order.

    The file appears under its final name only when all tensors were written (written beside, synced, renamed).
    """

    def __init__(self, path: Path, layout: Iterable[tuple[str, str, tuple[int, ...]]]) -> None:
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self.expected: list[tuple[str, int]] = []
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        begin = 0
        for name, dtype, shape in layout:
            end = begin + prod(shape) * DTYPE_BYTES[dtype]
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
            self.expected.append((name, end - begin))
            begin = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format asks that tensor data starts at a multiple of 8 bytes
        self.file = self.partial.open("wb")
        self.file.write(len(text).to_bytes(8, "little") + text)
        self.n_written = 0

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Append the bytes of the next tensor. Raises ValueError unless name and size are the declared ones."""
        if (name, len(data)) != self.expected[self.n_written]:
            raise ValueError(f"{name} with {len(data)} bytes, declared was {self.expected[self.n_written]}")
        self.file.write(data)
        self.n_written += 1

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        complete = kind is None and self.n_written == len(self.expected)
        if complete:
            self.file.flush()
            os.fsync(self.file.fileno())
        self.file.close()
        if complete:
            os.replace(self.partial, self.path)
            return
        self.partial.unlink(missing_ok=True)
        if kind is None:
            raise ValueError(f"{self.path}: {self.n_written} of {len(self.expected)} tensors written")
