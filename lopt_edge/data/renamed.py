"""Column mapping: a table's own names in the place of ours (`columns: {prompt: question, completion: answer}`).

The rule: a name that no row of any source has is refused, and so is a mapping onto a field that the row has, too; what is
mapped is the field under its new name and nothing else. Records pass one by one; none is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from difflib import get_close_matches

from lopt_edge.data.records import Record
from lopt_edge.errors import InputError

SHOWN_NAMES = 12


def mapping_of(pairs: Iterable[str]) -> dict[str, str]:
    """The mapping theirs -> ours of `ours=theirs` texts. Raises InputError."""
    found: dict[str, str] = {}
    for pair in pairs:
        ours, joined, theirs = (part.strip() for part in pair.partition("="))
        if not (ours and joined and theirs):
            raise InputError(f"{pair!r} maps nothing", where="columns", fix="write ours=theirs, e.g. prompt=question")
        if theirs in found or ours in found.values():
            raise InputError(f"{pair!r} names a column again", where="columns", fix="map each column once")
        found[theirs] = ours
    return found


class Renamed:
    """The records of a source with their fields under our names, in one pass; `name` is the source's."""

    def __init__(self, records: Iterable[Record], mapping: Mapping[str, str], *, name: str) -> None:
        self._mapping, self._name = mapping, name
        self.missing = dict.fromkeys(mapping)  # until a row has them, in order
        self._there: set[str] = set()  # the names of the first rows
        self._is_over = False
        self.records: Iterator[Record] = self._pass(records)

    def _pass(self, records: Iterable[Record]) -> Iterator[Record]:
        for number, record in enumerate(records):
            yield self._one(record, is_early=number < 20) if self._mapping else record
        self._is_over = True

    def _one(self, record: Record, *, is_early: bool) -> Record:
        row = record.value
        if not isinstance(row, dict):
            return record
        self._there |= row.keys() if is_early else set()
        for theirs, ours in self._mapping.items():
            if theirs not in row:
                continue
            self.missing.pop(theirs, None)
            if ours in row and ours not in self._mapping and ours != theirs:
                what, fix = f"the row has both {theirs!r} and {ours!r}", f"leave {ours}={theirs} out of columns"
                raise InputError(what, where=record.where, fix=f"{fix}, or take one out of the rows")
        return replace(record, value={self._mapping.get(key, key): value for key, value in row.items()})

    def finish(self) -> None:
        """Let the rest pass, and raise InputError(s) for what is wrong with it or for a name that no row has."""
        for _ in self.records:
            pass
        if self._is_over and self.missing:  # where the pass broke off, whoever reads was told why
            raise self.no_such_column(next(iter(self.missing)))

    def no_such_column(self, theirs: str) -> InputError:
        """The error for a name that is not there."""
        there = ", ".join(sorted(self._there)[:SHOWN_NAMES])
        near = get_close_matches(theirs, sorted(self._there), n=1)
        fix = (
            f"did you mean {near[0]!r}?"
            if near
            else "write ours=theirs: prompt=question takes the rows' 'question' as prompt"
        )
        return InputError(f"no row has the column {theirs!r} (there are: {there})", where=f"columns {self._name}", fix=fix)
