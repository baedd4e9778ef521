"""GGUF headers: the metadata of a file, and which tensor lies where in it. Reads no tensor data, imports no torch.

A file is untrusted. Rules: every count and length is held against what is left of the file before anything is read or made
by it, so a header costs at most a small multiple of its own bytes; long arrays (a vocabulary) are walked over, and what
stays is where they lie; each tensor's shape, type and byte range must agree, lie inside the file and overlap no other. A
fault is a `FolderError` that names the file. The format: ggml-org/ggml, docs/gguf.md (versions 2 and 3, little-endian).

A model of several shards (`NAME-00001-of-00003.gguf`) is read from its first one, which names how many there are.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from quant.gguf.types import BY_NUMBER, OTHER_NAMES, TYPES
from quant.headers import MAX_DIMENSIONS, TensorEntry
from quant.untrusted import FolderError, file_bytes, printable_name

MAGIC = b"GGUF"
MAX_KEYS, MAX_TENSORS, MAX_SHARDS = 65_536, 200_000, 1_000
MAX_NAME_BYTES = 65_535
MAX_TEXT_BYTES = 16 * 2**20  # of one value: a chat template; the longest seen has 20 kB
MAX_ELEMENTS = 8_000_000  # of one array; the largest vocabularies have 262,144 tokens and some 500,000 merges
SHORT_ARRAY = 4_096  # numbers; what is longer stays in the file
STRING, ARRAY = 8, 9
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True)
class LongArray:
    """An array that was left in the file: the type and number of its elements."""

    type: int
    n_elements: int


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says: its metadata by key, and its tensors by the names that they have there."""

    paths: tuple[Path, ...]
    metadata: Mapping[str, Any]
    entries: Mapping[str, TensorEntry]
    header_bytes: int  # of the first file: where its tensors begin


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF does; Ollama's blobs have no suffix."""
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def read_gguf_header(path: Path) -> GgufHeader:
    """The header of a GGUF file, and of the shards that follow it. Raises FolderError."""
    first = _read_one(path)
    n_shards = first.metadata.get("split.count", 1)
    if type(n_shards) is not int or not 0 <= n_shards <= MAX_SHARDS:
        raise FolderError(f"{path}: split.count {str(n_shards)[:40]} is out of reason")
    if n_shards <= 1:
        return first
    found = SHARD.search(path.name)
    if not found or int(found[2]) != n_shards:
        raise FolderError(
            f"{path}: is one of {n_shards} shards, but its name does not end in -00001-of-{n_shards:05d}.gguf"
        )
    if int(found[1]) != 1:
        raise FolderError(f"{path}: is not the first of {n_shards} shards; name that one")
    stem = path.name[: found.start()]
    others = [path.with_name(f"{stem}-{number:05d}-of-{n_shards:05d}.gguf") for number in range(2, n_shards + 1)]
    entries = dict(first.entries)
    for other in others:
        shard = _read_one(other)
        if twice := entries.keys() & shard.entries.keys():
            raise FolderError(f"{other}: has tensor {min(twice)[:80]!r}, which an earlier shard has")
        entries |= shard.entries
    return GgufHeader((path, *others), first.metadata, entries, first.header_bytes)


def read_arrays(path: Path, keys: Sequence[str]) -> dict[str, list[Any]]:
    """The elements of some arrays that a header has. Raises FolderError."""
    n_bytes = file_bytes(path)
    try:
        with path.open("rb") as file:
            metadata = _Reader(path, file, n_bytes, wanted=frozenset(keys)).header().metadata
    except OSError as error:
        raise FolderError(f"{path}: cannot be read ({error.strerror})") from None
    return {key: metadata[key] for key in keys}


def _read_one(path: Path) -> GgufHeader:
    n_bytes = file_bytes(path)
    try:
        with path.open("rb") as file:
            return _Reader(path, file, n_bytes).header()
    except OSError as error:
        raise FolderError(f"{path}: cannot be read ({error.strerror})") from None


class _Reader:
    """A reader of one header, which never asks for more bytes than the file has left."""

    def __init__(self, path: Path, file: BinaryIO, n_bytes: int, *, wanted: frozenset[str] = frozenset()) -> None:
        self.path, self.file, self.n_bytes, self.wanted = path, file, n_bytes, wanted
        self.left = n_bytes

    def fault(self, text: str) -> FolderError:
        return FolderError(f"{self.path}: {text}")

    def take(self, n_bytes: int) -> bytes:
        if n_bytes > self.left:
            raise self.fault(f"truncated: its header asks for {n_bytes} bytes where {self.left} are left")
        data = self.file.read(n_bytes)
        if len(data) != n_bytes:
            raise self.fault("ends inside its header (truncated while reading?)")
        self.left -= n_bytes
        return data

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self, most: int, what: str) -> str:
        n_bytes = self.number("<Q")
        if n_bytes > most:
            raise self.fault(f"{what} has {n_bytes} bytes, at most {most} are read")
        try:
            return self.take(n_bytes).decode("utf-8")
        except UnicodeDecodeError:
            raise self.fault(f"{what} is no UTF-8") from None

    def header(self) -> GgufHeader:
        if self.take(4) != MAGIC:
            raise self.fault("is no GGUF file (it does not begin with GGUF)")
        version = self.number("<I")
        if version not in (2, 3):
            big = "; it seems to be for big-endian machines" if version in (2 << 24, 3 << 24) else ""
            raise self.fault(f"has GGUF version {version}, read are 2 and 3{big}")
        n_tensors, n_keys = self.number("<Q"), self.number("<Q")
        if n_keys > MAX_KEYS or n_tensors > MAX_TENSORS:
            raise self.fault(f"says that it has {n_tensors} tensors and {n_keys} keys, which is out of reason")
        metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self.text(MAX_NAME_BYTES, "a key")
            if key in metadata:
                raise self.fault(f"has the key {key[:80]!r} twice")
            metadata[key] = self.value(key, self.number("<I"))
        infos = [self.info() for _ in range(n_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= 65_536 or alignment & (alignment - 1):
            raise self.fault(f"general.alignment {str(alignment)[:40]} is no power of two from 8 to 65,536")
        start = -(-(self.n_bytes - self.left) // alignment) * alignment
        return GgufHeader((self.path,), metadata, self.entries(infos, start, alignment), start)

    def value(self, key: str, kind: int) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.text(MAX_TEXT_BYTES, f"the value of {key[:80]!r}")
        if kind != ARRAY:
            raise self.fault(f"the value of {key[:80]!r} has the unknown type {kind}")
        kind, n_elements = self.number("<I"), self.number("<Q")
        if kind == STRING:
            return self.strings(key, n_elements)
        if kind not in SCALARS:
            raise self.fault(f"the array {key[:80]!r} has elements of the unknown type {kind}")
        size = struct.calcsize(SCALARS[kind])
        if n_elements > MAX_ELEMENTS or n_elements * size > self.left:
            raise self.fault(f"the array {key[:80]!r} says that it has {n_elements} elements")
        if n_elements <= SHORT_ARRAY or key in self.wanted:
            return list(struct.unpack(f"<{n_elements}{SCALARS[kind][1]}", self.take(n_elements * size)))
        self.skip(n_elements * size)
        return LongArray(kind, n_elements)

    def strings(self, key: str, n_elements: int) -> LongArray | list[str]:
        """Walk over an array of strings, each of which has its length before it."""
        if n_elements > MAX_ELEMENTS or 8 * n_elements > self.left:
            raise self.fault(f"the array {key[:80]!r} says that it has {n_elements} elements")
        if key in self.wanted:
            return [self.text(MAX_TEXT_BYTES, f"a string of {key[:80]!r}") for _ in range(n_elements)]
        for _ in range(n_elements):
            n_bytes = self.number("<Q")
            if n_bytes > self.left:
                raise self.fault(f"truncated: a string of {key[:80]!r} has {n_bytes} bytes where {self.left} are left")
            self.skip(n_bytes)
        return LongArray(STRING, n_elements)

    def skip(self, n_bytes: int) -> None:
        self.file.seek(n_bytes, os.SEEK_CUR)
        self.left -= n_bytes

    def info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.text(MAX_NAME_BYTES, "a tensor's name")
        n_sides = self.number("<I")
        if not 1 <= n_sides <= MAX_DIMENSIONS:
            raise self.fault(f"tensor {name[:80]!r} has {n_sides} dimensions")
        sides = struct.unpack(f"<{n_sides}Q", self.take(8 * n_sides))
        return name, tuple(reversed(sides)), self.number("<I"), self.number("<Q")

    def entries(self, infos: list[Any], start: int, alignment: int) -> dict[str, TensorEntry]:
        found: dict[str, TensorEntry] = {}
        for name, shape, number, offset in infos:
            if name in found:
                raise self.fault(f"has tensor {name[:80]!r} twice")
            found[name] = self.entry(name, shape, number, (start, offset, alignment))
        end = start
        for entry in sorted(found.values(), key=lambda entry: (entry.start, entry.n_bytes)):
            if entry.start < end:  # else a small file could stand for any amount of tensors
                raise self.fault(f"the bytes of tensor {entry.name[:80]!r} overlap those of another")
            end = entry.start + entry.n_bytes
        return found

    def entry(self, name: str, shape: tuple[int, ...], number: int, where: tuple[int, int, int]) -> TensorEntry:
        start, offset, alignment = where
        kind, shown = BY_NUMBER.get(number), printable_name(repr(name[:80]))
        if kind is None:
            known = OTHER_NAMES.get(number, f"number {number}")
            raise self.fault(
                f"tensor {shown} has the type {known}, which cannot be unpacked here (known: {', '.join(TYPES)})"
            )
        if prod(shape) >= 2**62 or not all(shape) or shape[-1] % kind.block_elements:
            raise self.fault(f"tensor {shown} has the shape {list(shape)}, which {kind.name} blocks cannot have")
        n_bytes = kind.n_bytes(shape)
        if offset % alignment or offset > self.n_bytes:
            raise self.fault(f"tensor {shown} begins at {offset}, which is no multiple of {alignment} inside the file")
        if start + offset + n_bytes > self.n_bytes:
            what = f"tensor {shown} ends at byte {start + offset + n_bytes}, the file has {self.n_bytes}"
            raise self.fault(f"truncated: {what}")
        return TensorEntry(name, self.path, kind.name, shape, start + offset, n_bytes)
