"""Encoded examples, in memory or in a file without a name: for data sets larger than a laptop's memory.

A file in the cache's folder has, one after the other, of each example its place, its ids (int32) and its mask (a byte a
token); it has no name, so it goes with the process. Memory has an index: 25 bytes an example, for lengths, targets and
what else is counted over all of them. The rules: an example comes out as it went in; its bytes are read when it is asked
for, by a positioned read, never a memory map, so no page of the file counts as memory of the run; what is read is checked
against a checksum, since a disk may lie.
"""

from __future__ import annotations

import os
import tempfile
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, overload

from lopt_edge.data.encode import Example
from lopt_edge.errors import RunError
from lopt_edge.system.cache import default_cache

TRUNCATED, LAST_TURN_ONLY = 1, 2


class StoredExamples(Sequence[Example]):
    """Examples in a file, or some of them (`chosen`: their numbers, in the order in which they are given)."""

    def __init__(self, store: Store, chosen: Sequence[int]) -> None:
        self.store, self.chosen = store, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        if isinstance(index, slice):
            return self.some(range(*index.indices(len(self))))
        return self.store.read(self.chosen[index])

    def __iter__(self) -> Iterator[Example]:
        return (self.store.read(number) for number in self.chosen)

    def some(self, indices: Iterable[int]) -> StoredExamples:
        """Some of the examples, by index, in that order."""
        return StoredExamples(self.store, array("I", (self.chosen[index] for index in indices)))

    @property
    def lengths(self) -> Sequence[int]:
        """The number of tokens of each."""
        return self._of(self.store.lengths)

    @property
    def target_counts(self) -> Sequence[int]:
        """The number of targets of each."""
        return self._of(self.store.target_counts)

    @property
    def n_rows(self) -> int:
        """The number of rows that they are from."""
        seen = bytearray(max(self.store.rows, default=-1) + 1)
        for row in self._of(self.store.rows):
            seen[row] = 1
        return sum(seen)

    def count(self, flag: Any) -> int:
        """How many of them have a flag: TRUNCATED or LAST_TURN_ONLY."""
        return sum(self.store.flags[number] & flag != 0 for number in self.chosen)

    def _of(self, values: array[int]) -> array[int]:
        is_all = self.chosen == range(len(values))
        return values if is_all else array("I", (values[number] for number in self.chosen))


class Gathered:
    """The examples of a data set as they come, row by row, each with its label: in a file (`in_file`), or in memory."""

    def __init__(self, *, in_file: bool) -> None:
        self.labels, self.n_rows, self.n_dropped = bytearray(), 0, 0
        self._store = Store(default_cache()) if in_file else None
        self._examples: list[Example] = []

    def add(self, found: Iterable[tuple[Example, bool]]) -> None:
        """What a row gave; nothing, where it is dropped."""
        n_before = len(self.labels)
        for example, label in found:
            self.labels.append(label)
            if self._store is None:
                self._examples.append(example)
            else:
                self._store.add(example, row=self.n_rows)
        self.n_rows += 1
        self.n_dropped += n_before == len(self.labels)

    def examples(self) -> Sequence[Example]:
        """All examples; nothing is added after."""
        return tuple(self._examples) if self._store is None else self._store.examples()


def some_of(examples: Sequence[Example], indices: Iterable[int]) -> Sequence[Example]:
    """Some of the examples, by index, in that order; they stay where they are."""
    return examples.some(indices) if isinstance(examples, StoredExamples) else tuple(examples[index] for index in indices)


def where_those_are(examples: Sequence[Example], found: Iterable[Example]) -> Sequence[Example]:
    """What was made of examples, kept as they are: in memory, or in a file of its own."""
    if not isinstance(examples, StoredExamples):
        return tuple(found)
    gathered = Gathered(in_file=True)
    for _, row in groupby(found, key=attrgetter("where")):
        gathered.add((example, True) for example in row)
    return gathered.examples()


class Store:
    """The file, and the index of what it has. Raises RunError where it cannot be written or read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder, buffering=1 << 20)  # noqa: SIM115  (for the process' life)
        except OSError as error:
            raise self._fault(error) from None
        self.starts, self.checksums = array("Q"), array("I")
        self.lengths, self.target_counts, self.rows, self.flags = array("I"), array("I"), array("I"), array("B")
        self.largest_id = 0
        self._end = 0

    def add(self, example: Example, *, row: int) -> None:
        """Append an example of a row by its number."""
        place = example.where.encode()
        data = b"".join((len(place).to_bytes(4, "little"), place, example.input_ids.tobytes(), example.supervised))
        try:
            self._file.write(data)
        except OSError as error:
            raise self._fault(error) from None
        self.starts.append(self._end)
        self.checksums.append(zlib.crc32(data))
        self.lengths.append(len(example))
        self.target_counts.append(example.n_supervised)
        self.rows.append(row)
        self.flags.append(TRUNCATED * example.truncated | LAST_TURN_ONLY * example.last_turn_only)
        self.largest_id = max(self.largest_id, *example.input_ids)
        self._end += len(data)

    def examples(self) -> StoredExamples:
        """All that was added; nothing is added after."""
        try:
            self._file.flush()
        except OSError as error:
            raise self._fault(error) from None
        return StoredExamples(self, range(len(self.starts)))

    def read(self, number: int) -> Example:
        """The example of that number."""
        start, stop = self.starts[number], self.starts[number + 1] if number + 1 < len(self.starts) else self._end
        try:
            data = os.pread(self._file.fileno(), stop - start, start)
        except OSError as error:
            raise self._fault(error) from None
        if zlib.crc32(data) != self.checksums[number]:
            what = f"example {number} of the encoded data came back otherwise than it was written"
            raise RunError(what, where=str(self.folder), fix="check the disk")
        first = 4 + int.from_bytes(data[:4], "little")
        ids, flags = array("i"), self.flags[number]
        middle = first + ids.itemsize * self.lengths[number]
        ids.frombytes(data[first:middle])
        where = data[4:first].decode()
        return Example(ids, data[middle:], where, bool(flags & TRUNCATED), bool(flags & LAST_TURN_ONLY))

    def _fault(self, error: OSError) -> RunError:
        what = f"the encoded data cannot be kept there: {error.strerror}"
        return RunError(what, where=str(self.folder), fix="free space there, or set LOPT_EDGE_CACHE to another folder")
