"""Hidden states of every example, computed once and kept on disk: a boundary's, or a teacher's last ones.

One file of rows in bfloat16 (example i lies where the lengths of those before it end), one of eight bytes an example: a
mark that it is there and the CRC-32 of its rows. `identity.json` says of what it is: model, data, boundary, dtype; a cache
of another identity is refused. The rules: rows are written before their mark, and a mark counts only if the sum agrees, so
that whatever a crash or a damaged disk leaves, an example is whole or it is absent and computed again. A step that writes
goes on with what it reads back, so it is one that reads, bit for bit. (A row that was lost and is computed again may come
out of another batch, with other padding: its last bits, before rounding to bfloat16, may differ.)

One process has a cache at a time (its caller locks the folder). Nothing here decides what is cached or when.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lopt_edge.errors import InputError, RunError
from lopt_edge.run.tiers.staging import Stage
from lopt_edge.system.files import write_json
from quant.files import tensor_bytes
from quant.headers import FolderError, read_json

ROWS_NAME, MARKS_NAME, IDENTITY_NAME = "rows.bin", "marks.bin", "identity.json"
MARK_BYTES = 8
THERE = b"done"


class FeatureCache:
    """A cache of hidden states in a folder: `lengths` are tokens by example, `width` is numbers a token.

    Raises InputError for a folder of another identity, RunError if its files cannot be opened.
    """

    def __init__(self, folder: Path, *, identity: Mapping[str, Any], lengths: Sequence[int], width: int) -> None:
        self.folder, self.lengths, self.width = folder, tuple(lengths), width
        self.starts = (0, *accumulate(self.lengths))
        self.known: set[int] = set()  # written or verified by this process
        claim(folder, dict(identity) | {"width": width, "examples": len(self.lengths), "tokens": self.starts[-1]})
        try:
            self._rows, self._marks = (
                os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644) for name in (ROWS_NAME, MARKS_NAME)
            )
        except OSError as error:
            raise self._failure(error) from None

    @property
    def n_bytes(self) -> int:
        """The bytes of all rows, once all are there."""
        return 2 * self.width * self.starts[-1]

    @property
    def held_bytes(self) -> int:
        """The bytes that the rows take of the disk now."""
        return os.fstat(self._rows).st_blocks * 512

    def has(self, examples: Sequence[int]) -> bool:
        """Whether all of these examples are there and whole; each one's sum is checked once in a process."""
        return all(self._has(example) for example in examples)

    def _has(self, example: int) -> bool:
        if example not in self.known:
            mark = self._read(self._marks, MARK_BYTES * example, bytearray(MARK_BYTES))
            if mark[:4] != THERE or int.from_bytes(mark[4:], "little") != zlib.crc32(self._example_bytes(example)):
                return False
            self.known.add(example)
        return True

    def _example_bytes(self, example: int) -> bytearray:
        return self._read(self._rows, self._position(example), bytearray(2 * self.width * self.lengths[example]))

    def _position(self, example: int) -> int:
        return 2 * self.width * self.starts[example]

    def write(self, examples: Sequence[int], hidden_BTD: Tensor, *, packed: bool = False) -> None:
        """Write the rows of a micro-batch (B, T, width), whose rows begin with these examples' tokens, in bfloat16.

        `packed`: they lie in one row, one after the other.
        """
        for example, place in zip(examples, self._places(examples, packed=packed), strict=True):
            if example in self.known:
                continue
            rows = tensor_bytes(hidden_BTD[place].to(torch.bfloat16).contiguous().cpu())
            self._write(self._rows, self._position(example), rows)
            self._write(self._marks, MARK_BYTES * example, memoryview(THERE + zlib.crc32(rows).to_bytes(4, "little")))
            self.known.add(example)

    def read(
        self,
        examples: Sequence[int],
        *,
        n_tokens: int,
        device: torch.device,
        dtype: torch.dtype,
        packed: bool = False,
        stage: Stage | None = None,
    ) -> Tensor:
        """The hidden states (B, n_tokens, width) of examples that are there; padding is zero. `stage`: the way up to a
        GPU, whose host then waits for nothing."""
        shape = (1 if packed else len(examples), n_tokens, self.width)
        room = None if stage is None else stage.room(shape, dtype)
        hidden_BTD = torch.zeros(shape, dtype=dtype, device=device) if room is None else room.host.zero_()
        for example, place in zip(examples, self._places(examples, packed=packed), strict=True):
            found = torch.frombuffer(self._example_bytes(example), dtype=torch.bfloat16)
            hidden_BTD[place] = found.view(-1, self.width).to(device=hidden_BTD.device, dtype=dtype)
        return hidden_BTD if stage is None or room is None else stage.send(room)

    def _places(self, examples: Sequence[int], *, packed: bool) -> Iterator[tuple[int, slice]]:
        """Yield where each example lies in a micro-batch: its row, and its tokens there."""
        start = 0
        for row, example in enumerate(examples):
            end = start + self.lengths[example]
            yield (0 if packed else row), slice(start, end)
            start = end if packed else 0

    def _read(self, descriptor: int, position: int, out: bytearray) -> bytearray:
        """Fill `out` with what the file has at `position` (zeros beyond its end), and return it."""
        view, done = memoryview(out), 0
        try:
            while done < len(out) and (n_read := os.preadv(descriptor, [view[done:]], position + done)):
                done += n_read
        except OSError as error:
            raise self._failure(error) from None
        return out

    def _write(self, descriptor: int, position: int, content: memoryview) -> None:
        done = 0
        try:
            while done < len(content):
                done += os.pwrite(descriptor, content[done:], position + done)
        except OSError as error:
            raise self._failure(error) from None

    def _failure(self, error: OSError) -> RunError:
        return RunError(
            f"the cache cannot be read or written ({error.strerror})",
            where=str(self.folder),
            fix="check the disk and its free space; what is whole in it is used again",
        )

    def close(self) -> None:
        """Close the cache's files."""
        for descriptor in (self._rows, self._marks):
            os.close(descriptor)


def claim(folder: Path, identity: Mapping[str, Any]) -> None:
    """Make the folder a cache of this identity. Raises InputError if it is a cache of another, or contains other things."""
    path = folder / IDENTITY_NAME
    if not path.exists():
        strangers = sorted(name for name in os.listdir(folder) if not name.startswith("."))
        if strangers:
            raise InputError(f"holds {strangers[0]!r}, but no cache", where=str(folder), fix="name a new folder")
        write_json(path, dict(identity))
        return
    try:
        found = read_json(path)
    except FolderError as error:
        raise InputError(str(error), where=str(path), fix="remove the cache, or name another folder") from None
    if found != json.loads(json.dumps(dict(identity))):
        values = found if isinstance(found, dict) else {}
        others = [
            f"{name} was {_short(values.get(name))}, is {_short(identity[name])}"
            for name in identity
            if values.get(name) != identity[name]
        ] or ["it has another form"]
        raise InputError(
            f"is a cache of another run: {'; '.join(others)}", where=str(folder), fix="remove it, or name another folder"
        )


def _short(value: Any) -> str:
    """The value as text, a fingerprint by its first digits."""
    text = str(value)
    return text if len(text) <= 16 else f"{text[:12]}..."
