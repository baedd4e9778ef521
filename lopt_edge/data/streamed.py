"""Data files that are too large for memory, read twice: once to check all rows, once to encode them, a few at a time.

The rules: what comes out is what reading all at once gives, example by example, note by note
(tests/data/test_streamed.py); memory has a few rows and an index of the examples, which lie in a file (stored.py); every
fault of every row's form is found in the first reading, before anything is encoded. Streamed are local files of rows
(.jsonl, .ndjson, .parquet) of together at least `STREAM_BYTES`, without weights, a mapping of columns or preferences,
which need to know all rows at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

from lopt_edge.data.columns import Columns
from lopt_edge.data.encode import Example
from lopt_edge.data.formats import DataFormat, RowMaker
from lopt_edge.data.notes import Notes
from lopt_edge.data.records import Record, is_streamed, iterate_records
from lopt_edge.data.rows import AnyRow, Conversation, Preference, Row
from lopt_edge.data.sources import Source
from lopt_edge.data.stored import Store, StoredExamples
from lopt_edge.system.cache import default_cache

STREAM_BYTES = 64 << 20
FEW_ROWS = 256
T = TypeVar("T")
Detect = Callable[[Sequence[Record]], tuple[DataFormat, str]]
Encode = Callable[[Sequence[Row]], list[list[Example]]]


def is_large(sources: Sequence[Source]) -> bool:
    """Whether the rows of these sources are streamed."""
    paths = [path for source in sources for path in source.paths]
    if any(source.hub is not None or source.weight is not None for source in sources):
        return False
    if not all(path.is_file() and is_streamed(path) for path in paths):
        return False
    return sum(path.stat().st_size for path in paths) >= STREAM_BYTES


class LargeRows:
    """The rows of large files, which were all read and found sound; they are read again to be encoded.

    Raises InputError(s) for all faults together.
    """

    def __init__(
        self, sources: Sequence[Source], data_format: DataFormat | None, detect: Detect, fields: Columns, notes: Notes
    ) -> None:
        self.sources, self.fields = sources, fields
        self.formats, self.reasons, self.counts = list[DataFormat](), list[str](), list[int]()
        self.conversations = self.tools = False
        for source in sources:
            maker: RowMaker | None = None
            for records in _few(_records(source)):
                if maker is None:
                    found, reason = detect(records) if data_format is None else (data_format, "named by --data-format")
                    self.formats.append(found)
                    self.reasons.append(reason)
                    self.counts.append(0)
                    maker = RowMaker(found, fields, notes)
                rows = maker.rows(records)
                self.counts[-1] += len(rows)
                talks = [row for row in rows if isinstance(row, Conversation)]
                self.conversations |= bool(talks)
                self.tools |= any(row.tools for row in talks)
            assert maker is not None  # a file without rows is refused
            maker.finish()

    @property
    def n_rows(self) -> int:
        """The number of rows of all sources."""
        return sum(self.counts)

    @property
    def reason(self) -> str:
        """Why the rows are read in their format; of several sources, what each of them gave."""
        if len(self.sources) == 1:
            return self.reasons[0]
        each = zip(self.sources, self.counts, self.formats, strict=True)
        return "; ".join(f"{one.text}: {count:,} of {count:,} rows, {form}" for one, count, form in each)

    def encoded(self, encode: Encode) -> tuple[StoredExamples, int]:
        """The examples of all rows, in order, and the number of rows that left none. Raises InputError(s), RunError."""
        store, n_dropped, number = Store(default_cache()), 0, 0
        for source, form in zip(self.sources, self.formats, strict=True):
            maker = RowMaker(form, self.fields.anew(), Notes())
            for records in _few(_records(source)):
                for found in encode(_plain(maker.rows(records))):
                    for example in found:
                        store.add(example, row=number)
                    n_dropped += not found
                    number += 1
            maker.finish()  # the file may have changed meanwhile
        return store.examples(), n_dropped


def _records(source: Source) -> Iterator[Record]:
    return (record for path in source.paths for record in iterate_records(path))


def _few(items: Iterable[T]) -> Iterator[list[T]]:
    iterator = iter(items)
    while some := list(islice(iterator, FEW_ROWS)):
        yield some


def _plain(rows: Sequence[AnyRow]) -> list[Row]:
    return [row for row in rows if not isinstance(row, Preference)]
