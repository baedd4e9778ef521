"""The rows of all sources, read and found sound, then given out a few at a time: from memory, or where they are too many
for it, by reading them again.

The rules: what comes out is the same either way, row by row, note by note (tests/data/test_streamed.py). Rows whose text
is together less than `STREAM_BYTES` are kept; as soon as there are more, none is (from the first on, where the files' sizes
say so), wherever they come from: files, folders, the hub, packed or not, weighed, with renamed columns, preferences. Then
memory has a few rows, and of a mixture a byte for each. Every fault of a row's form is found in the first reading, before
anything is encoded.

Not here: what becomes of the rows (`dataset`), and a single file's limits (`records`): a `.json` or `.csv` file is read
whole each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress, islice
from typing import TypeVar

from lopt_edge.data.columns import Columns
from lopt_edge.data.formats import DataFormat, RowMaker
from lopt_edge.data.notes import Notes
from lopt_edge.data.preferences import taken_apart
from lopt_edge.data.records import Record
from lopt_edge.data.renamed import Renamed
from lopt_edge.data.rows import AnyRow, Conversation
from lopt_edge.data.sources import Source, mixed, sources_of
from lopt_edge.errors import InputError

STREAM_BYTES = 64 << 20
FEW_ROWS = 256
T = TypeVar("T")


@dataclass(frozen=True)
class HowRead:
    """How records become rows: under which names, in which format (None: detected by `detect`)."""

    data_format: DataFormat | None
    mapping: Mapping[str, str]
    detect: Callable[[Sequence[Record]], tuple[DataFormat, str]]

    def format_of(self, records: Sequence[Record]) -> tuple[DataFormat, str]:
        """The format, and why."""
        return self.detect(records) if self.data_format is None else (self.data_format, "named by --data-format")


class SoundRows:
    """The rows that a specification names, all of them read and found sound. Raises InputError(s) for all faults.

    `fields` and `notes` learn what is met.
    """

    def __init__(self, spec: str, how: HowRead, fields: Columns, notes: Notes) -> None:
        self.sources = [source.located() for source in sources_of(spec)]
        self.formats, self.conversations, self.tools = list[DataFormat](), False, False
        self._how, self._fields = how, fields
        self._reasons, self._counts, self._n_bytes = list[str](), list[int](), 0
        n_bytes = sum(path.stat().st_size for source in self.sources for path in source.paths if path.is_file())
        self._kept: list[list[AnyRow]] | None = [] if n_bytes < STREAM_BYTES else None
        named = [self._read(source, notes) for source in self.sources]
        for theirs in how.mapping:
            if all(theirs in one.missing for one in named):
                raise named[0].no_such_column(theirs)
        self._taken = mixed(self._counts, [source.weight for source in self.sources], seed=spec)

    @property
    def are_many(self) -> bool:
        """Whether they are too many for memory."""
        return self._kept is None

    @property
    def reason(self) -> str:
        """Why the rows are read in their format; of several sources, what each of them gave."""
        if len(self.sources) == 1:
            return self._reasons[0]
        each = zip(self.sources, self._taken, self._counts, self.formats, strict=True)
        taken = [(one, count if some is None else sum(some), count, form) for one, some, count, form in each]
        return "; ".join(f"{one.text}: {some:,} of {count:,} rows, {form}" for one, some, count, form in taken)

    def few(self) -> Iterator[list[AnyRow]]:
        """The rows that are taken, in order, some at a time. Raises InputError where a file has changed meanwhile."""
        for number, taken in enumerate(self._taken):
            place = 0
            for rows in self._given(number):
                if some := rows if taken is None else list(compress(rows, taken[place : place + len(rows)])):
                    yield some
                place += len(rows)
            if place != self._counts[number]:
                where, fix = f"data {self.sources[number].text}", "start again once it is whole"
                raise InputError("changed while it was read", where=where, fix=fix)

    def _read(self, source: Source, notes: Notes) -> Renamed:
        named = Renamed(source.records(), self._how.mapping, name=source.text)
        self._counts.append(0)
        if self._kept is not None:
            self._kept.append([])
        maker: RowMaker | None = None
        try:
            for records in _few(named.records):
                if maker is None:
                    form, reason = self._how.format_of(records)
                    maker = RowMaker(form, self._fields, notes)
                    self.formats.append(form)
                    self._reasons.append(reason)
                self._take(maker.rows(records), sum(record.n_bytes for record in records))
            assert maker is not None  # a file without rows is refused
            maker.finish()
        except InputError:
            named.finish()  # a column that no row has explains what came of it
            raise
        return named

    def _take(self, rows: list[AnyRow], n_bytes: int) -> None:
        talks = [row for row in taken_apart(rows) if isinstance(row, Conversation)]
        self.conversations |= bool(talks)
        self.tools |= any(row.tools for row in talks)
        self._counts[-1] += len(rows)
        self._n_bytes += n_bytes
        if self._n_bytes >= STREAM_BYTES:
            self._kept = None
        if self._kept is not None:
            self._kept[-1] += rows

    def _given(self, number: int) -> Iterator[list[AnyRow]]:
        """All rows of a source, in order, some at a time."""
        if self._kept is not None:
            yield from _few(self._kept[number])
            return
        source, maker = self.sources[number], RowMaker(self.formats[number], self._fields.anew(), Notes())
        for records in _few(Renamed(source.records(), self._how.mapping, name=source.text).records):
            yield maker.rows(records)
        maker.finish()  # the file may have changed meanwhile


def _few(items: Iterable[T]) -> Iterator[list[T]]:
    iterator = iter(items)
    while some := list(islice(iterator, FEW_ROWS)):
        yield some
