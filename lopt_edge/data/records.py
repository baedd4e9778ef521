"""Reads a data file into records: one value per row, with the place it came from.

Rule: a data file is untrusted. Whatever its bytes are, reading it ends in records or in an `InputError` that names
file and line: broken JSON, a NaN (not JSON, though Python would take it), an integer of a million digits, brackets
nested deeper than the parser's stack, text that is not UTF-8, a quote that never closes. Broken rows are collected
over the whole file, so that one run shows all of them.

Places: `data.jsonl:12` and `data.csv:12` are physical lines counted from 1 (a CSV row that spans lines is named by its
first), `data.json[12]` is the 12th element counted from 0 as JSON tools do, `data.parquet row 12` counts from 1.

Not here: what the fields mean (`formats`). A `.txt` file is one record, whole; nothing is split at blank lines.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from lopt_edge.data.faults import Faults
from lopt_edge.errors import InputError

# A JSON object with one of these keys is itself a row, not a wrapper around a list of rows.
ROW_KEYS = frozenset({"messages", "conversations", "prompt", "completion", "instruction", "text"})
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class Record:
    """One row: a JSON object (or CSV / Parquet row) as a dict, or the text of a plain text file."""

    value: dict[str, Any] | str
    where: str


def read_records(path: str | Path) -> list[Record]:
    """All records of a data file, in file order; at least one."""
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    _check_path(path, known=reader is not None)
    assert reader is not None
    try:
        records = list(reader(path))
    except OSError as error:
        raise InputError(f"cannot read the file ({error.strerror or error})", where=str(path)) from error
    if not records:
        raise InputError("the file holds no rows", where=str(path), fix="give a data file with at least one row")
    return records


def _check_path(path: Path, *, known: bool) -> None:
    try:
        exists, is_dir, is_file = path.exists(), path.is_dir(), path.is_file()
    except (OSError, ValueError) as error:  # a name too long, or with a NUL in it
        raise InputError(f"not a usable path ({error})", where=repr(str(path))) from error
    if not exists:
        raise InputError("no such file", where=str(path), fix="check the path of the data file")
    if is_dir:
        raise InputError("this is a directory, not a data file", where=str(path), fix="name one file inside it")
    if not is_file:
        raise InputError("not a regular file", where=str(path), fix="save the data to a file first")
    if not known:
        kind = f"unknown file type '{path.suffix}'" if path.suffix else "the file name has no ending"
        raise InputError(kind, where=str(path), fix="use one of " + ", ".join(_READERS))


# --- text and JSON ----------------------------------------------------------------------------------------------------


def _decode(raw: bytes, *, path: Path, line: int = 1) -> str:
    """UTF-8 text of `raw`, which begins at the given line of the file; a byte order mark is dropped."""
    try:
        return raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        bad_line = line + raw.count(b"\n", 0, error.start)
        encoding = "UTF-16" if line == 1 and raw.startswith(UTF16_MARKS) else "another encoding"
        raise InputError(
            f"the text is not valid UTF-8 (byte 0x{raw[error.start]:02x})",
            where=f"{path}:{bad_line}",
            fix=f"save the file as UTF-8 (it looks like {encoding})",
        ) from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON; write null or leave the field out")


def _parse_json(text: str, *, where: str) -> Any:
    """`json.loads` whose every failure is an `InputError`."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if "\n" in text.strip() else f"column {error.colno}"
        raise InputError(f"broken JSON at {place}: {error.msg}", where=where, fix="correct the row") from None
    except RecursionError:
        raise InputError("the JSON is nested too deeply", where=where, fix="flatten or remove the row") from None
    except ValueError as error:  # a forbidden constant, or an integer beyond Python's digit limit
        raise InputError(f"bad JSON value: {error}", where=where, fix="correct the row") from None


def _as_row(value: object, *, where: str) -> Record:
    if not isinstance(value, dict):
        kind = type(value).__name__ if value is not None else "null"
        raise InputError(f"the row is {kind}, not an object", where=where, fix='write each row as {"field": ...}')
    return Record(value, where)


def _read_jsonl(path: Path) -> Iterator[Record]:
    faults = Faults()
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            where = f"{path}:{number}"
            try:
                text = _decode(raw, path=path, line=number)
                if text.strip():
                    yield _as_row(_parse_json(text, where=where), where=where)
            except InputError as error:
                faults.add(error)
                if number == 1 and raw.startswith(UTF16_MARKS):
                    break  # every further line would fail for the same reason
    faults.raise_any()


def _read_json(path: Path) -> Iterator[Record]:
    text = _decode(path.read_bytes(), path=path)
    if not text.strip():
        return
    try:
        value = _parse_json(text, where=str(path))
    except InputError as error:
        if "Extra data" in error.what:
            fix = "if the file holds one object per line, name it .jsonl"
            raise InputError(error.what, where=str(path), fix=fix) from None
        raise
    faults = Faults()
    rows, base = _rows_of(value, where=str(path))
    for index, row in enumerate(rows):
        try:
            yield _as_row(row, where=f"{base}[{index}]")
        except InputError as error:
            faults.add(error)
    faults.raise_any()


def _rows_of(value: object, *, where: str) -> tuple[list[Any], str]:
    """The list of rows in a JSON file and the place that its indices count from."""
    if isinstance(value, list):
        return value, where
    if not isinstance(value, dict):
        raise InputError("the file is neither a list nor an object", where=where, fix="write a list of objects")
    if ROW_KEYS & value.keys():
        return [value], where
    lists = [key for key, item in value.items() if isinstance(item, list)]
    if len(lists) == 1:
        return value[lists[0]], f"{where} {lists[0]}"
    found = "no list" if not lists else "several lists: " + ", ".join(repr(key) for key in lists[:10])
    raise InputError(f"the object holds {found}", where=where, fix="keep the rows alone, as a list of objects")


def _read_text(path: Path) -> Iterator[Record]:
    # Line ends become \n: a model should not learn \r from a file that happened to be saved on Windows.
    text = _decode(path.read_bytes(), path=path).replace("\r\n", "\n")
    if text.strip():
        yield Record(text, str(path))


# --- tables -----------------------------------------------------------------------------------------------------------


def _read_csv(path: Path) -> Iterator[Record]:
    text = _decode(path.read_bytes(), path=path)
    limit = csv.field_size_limit()
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # process-wide, and a C long on Windows; put back below
    try:
        rows = list(_csv_rows(text, path=path))
    finally:
        csv.field_size_limit(limit)
    if not rows:
        return
    (header_line, header), *body = rows
    _check_header(header, where=f"{path}:{header_line}")
    faults = Faults()
    for line, row in body:
        if len(row) == len(header):
            yield Record(dict(zip(header, row, strict=True)), f"{path}:{line}")
        else:
            fix = "quote fields that contain commas or line breaks"
            faults.add(InputError(f"{len(row)} fields, the header has {len(header)}", where=f"{path}:{line}", fix=fix))
    faults.raise_any()


def _csv_rows(text: str, *, path: Path) -> Iterator[tuple[int, list[str]]]:
    """(first physical line, fields) of every row that is not blank."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        for row in reader:
            if row:
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        fix = "close every quote; double a quote inside a quoted field"
        raise InputError(f"broken CSV: {error}", where=f"{path}:{line}", fix=fix) from None


def _check_header(header: list[str], *, where: str) -> None:
    doubled = sorted({name for name in header if header.count(name) > 1})
    if doubled:
        raise InputError(f"the header names {doubled[0]!r} more than once", where=where, fix="rename the columns")
    if len(header) == 1 and any(mark in header[0] for mark in ";\t"):
        raise InputError("the fields are not separated by commas", where=where, fix="save the table comma-separated")


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow as pa  # type: ignore[import-untyped]  # here, not above: only Parquet files pay for it
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield Record(row, f"{path} row {number}")
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        fix = "write the file again; it may be cut short"
        raise InputError(f"not a readable Parquet file: {reason}", where=f"{path} row {number + 1}", fix=fix) from error


_READERS = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
