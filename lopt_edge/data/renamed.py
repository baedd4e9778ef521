"""Column mapping: a table's own names in the place of ours (`columns: {prompt: question, completion: answer}`).

The rule: a name that no row has is refused, and so is a mapping onto a field that the row has, too; what is mapped is the
field under its new name and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from lopt_edge.data.records import Record
from lopt_edge.errors import InputError


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


def renamed(records: Sequence[Record], mapping: Mapping[str, str], *, name: str) -> list[Record]:
    """The records with their fields under our names. Raises InputError."""
    if not mapping:
        return list(records)
    for theirs, ours in mapping.items():
        tables = [record for record in records if isinstance(record.value, dict)]
        if not any(theirs in record.value for record in tables):
            there = ", ".join(sorted({key for record in tables[:20] for key in record.value})[:12])
            raise InputError(f"no row has the column {theirs!r} (there are: {there})", where=f"columns {name}")
        both = next((one for one in tables if theirs in one.value and ours in one.value and ours not in mapping), None)
        if both is not None and ours != theirs:
            what = f"the row has both {theirs!r} and {ours!r}"
            raise InputError(
                what, where=both.where, fix=f"leave {ours}={theirs} out of columns, or take one out of the rows"
            )
    return [_renamed(record, mapping) for record in records]


def _renamed(record: Record, mapping: Mapping[str, str]) -> Record:
    if not isinstance(record.value, dict):
        return record
    return Record({mapping.get(key, key): value for key, value in record.value.items()}, record.where)
