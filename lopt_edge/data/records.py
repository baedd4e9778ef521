"""Reads a data file into records: one value per row, with the place it came from.

Rule: a data file is untrusted. Whatever its bytes are, reading it ends in records or in an `InputError` that names
file and line: broken JSON, a NaN (not JSON, though Python would take it), an integer of a million digits, brackets
nested deeper than 64 levels, text that is not UTF-8, a quote that never closes. Broken rows are collected over the whole
file, so that one run shows all of them.

Sizes are limited before memory is taken: a row (a line of .jsonl, a field of .csv) has at most `MAX_ROW_BYTES`, a file has
at most `MAX_ROWS` rows, the types that are read whole have at most `MAX_WHOLE_BYTES`, and a row group of a Parquet file may
unpack to as much: it is packed, so its own size bounds nothing. It is read `PARQUET_ROWS` at a time and counted as it
unpacks, after its own claims have been checked against these limits. So at most ~25 bytes of memory are taken per byte of
JSON (`{},{},...`). A record says how many bytes it has as text, so that who keeps records can bound them (`streamed`).

What is plainly meant is read: a file packed with gzip or zstd (by its first bytes, whatever its name), objects or a list
printed over many lines in a .jsonl file, a table's number that is none (NaN, pandas' missing text) as an absent field.

Places: `data.jsonl:12` and `data.csv:12` are physical lines counted from 1 (a CSV row that spans lines is named by its
first), `data.json[12]` is the 12th element counted from 0 as JSON tools do, `data.parquet row 12` counts from 1.

Not here: what the fields mean (`formats`). A `.txt` file is one record, whole; nothing is split at blank lines.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lopt_edge.data.faults import Faults
from lopt_edge.data.json_text import CUT_SHORT, json_value, json_values
from lopt_edge.errors import InputError

# A JSON object with one of these keys is itself a row, not a wrapper around a list of rows.
ROW_KEYS = frozenset({"messages", "conversations", "prompt", "completion", "instruction", "text"})
MAX_ROW_BYTES = 64 * 2**20
MAX_WHOLE_BYTES = 2**30
MAX_ROWS = 5_000_000
PARQUET_ROWS = 64
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
GZIP_MARK, ZSTD_MARK = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
PACKED = (".gz", ".zst")


@dataclass(frozen=True)
class Record:
    """A row as read: a JSON object (or CSV / Parquet row) as a dict, or the text of a plain text file."""

    value: dict[str, Any] | str
    where: str
    n_bytes: int = field(default=0, compare=False)  # about, of its text


def read_records(path: str | Path) -> list[Record]:
    """The records of a data file, in file order; at least one. Raises InputError(s)."""
    return list(iterate_records(path))


def iterate_records(path: str | Path) -> Iterator[Record]:
    """Yield what `read_records` returns; faults of records are raised once all others have come."""
    path = Path(path)
    reader = _READERS.get(_ending(path))
    _check_path(path, known=reader is not None)
    assert reader is not None
    count = 0
    try:
        for count, record in enumerate(reader(path), start=1):
            if count > MAX_ROWS:
                fix = "take a part of it"
                raise InputError(f"the file holds more than {MAX_ROWS:,} rows", where=str(path), fix=fix)
            yield record
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        fix = "compress it again; it may be cut short"
        raise InputError(f"not a readable gzip file ({error})", where=str(path), fix=fix) from error
    except OSError as error:
        raise InputError(f"cannot read the file ({error.strerror or error})", where=str(path)) from error
    if not count:
        raise InputError("the file holds no rows", where=str(path), fix="give a data file with at least one row")


def count_records(path: Path) -> int:
    """The number of a file's records. Raises InputError(s)."""
    if _ending(path) != ".parquet":
        return sum(1 for _ in iterate_records(path))
    _check_path(path, known=True)
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    with _parquet_faults(path, lambda: 0), pq.ParquetFile(path) as file:
        _check_claims(file.metadata, path=path)
        return int(file.metadata.num_rows)


def _ending(path: Path) -> str:
    """The ending that names the type: `.jsonl` of data.jsonl and of data.jsonl.gz."""
    return (path.with_suffix("") if path.suffix.lower() in PACKED else path).suffix.lower()


def is_data_file(path: Path) -> bool:
    """Whether a file's name is that of a type that is read."""
    return _ending(path) in _READERS


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
        raise InputError(kind, where=str(path), fix="use one of " + ", ".join(_READERS) + " (or .gz, .zst after it)")


# --- text and JSON ----------------------------------------------------------------------------------------------------

AT_ONCE = 1 << 20  # bytes


def _open(path: Path) -> io.BufferedReader | gzip.GzipFile:
    """The file for reading, unpacked where it is compressed."""
    file = path.open("rb")
    mark = file.peek(4)[:4]
    if mark[:2] != GZIP_MARK and mark != ZSTD_MARK:
        return file
    file.close()
    if mark != ZSTD_MARK:
        return gzip.open(path)
    import pyarrow as pa  # it unpacks zstd, and is here for Parquet anyway

    return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))


def _read_whole(path: Path) -> bytes:
    n_bytes = path.stat().st_size
    with _open(path) as file:
        left = MAX_WHOLE_BYTES + 1 if n_bytes <= MAX_WHOLE_BYTES else 0
        parts = []
        while left and (part := file.read(min(left, AT_ONCE))):  # read(n) takes n bytes of memory, however few there are
            parts.append(part)
            left -= len(part)
    raw = b"".join(parts)
    n_bytes = max(n_bytes, len(raw))  # of a compressed file: as far as it was unpacked
    if n_bytes > MAX_WHOLE_BYTES:
        what = f"{n_bytes:,} bytes; a {_ending(path)} file is read whole and may have {MAX_WHOLE_BYTES:,}"
        raise InputError(what, where=str(path), fix="save the rows as .jsonl, or take a part of them")
    return raw


def _decode(raw: bytes, *, path: Path, line: int = 1) -> str:
    """The UTF-8 text of `raw`, which begins at the given line of the file; a byte order mark is dropped."""
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


def _as_row(value: object, *, where: str, n_bytes: int = 0) -> Record:
    if not isinstance(value, dict):
        kind = type(value).__name__ if value is not None else "null"
        raise InputError(f"the row is {kind}, not an object", where=where, fix='write each row as {"field": ...}')
    return Record(value, where, n_bytes)


def _read_jsonl(path: Path) -> Iterator[Record]:
    if _is_printed(path):
        yield from _read_over_lines(path)
        return
    faults = Faults()
    with _open(path) as file:
        for number, raw in enumerate(iter(lambda: file.readline(MAX_ROW_BYTES + 1), b""), start=1):
            where = f"{path}:{number}"
            try:
                if len(raw) > MAX_ROW_BYTES:
                    fix = "cut the row into several"
                    raise InputError(f"the line has more than {MAX_ROW_BYTES:,} bytes", where=where, fix=fix)
                text = _decode(raw, path=path, line=number)
                if text.strip():
                    yield _as_row(json_value(text.rstrip(), where=where), where=where, n_bytes=len(raw))
            except InputError as error:
                faults.add(error)
                if len(raw) > MAX_ROW_BYTES or (number == 1 and raw.startswith(UTF16_MARKS)):
                    break  # what follows is the rest of this line, or would fail for the same reason
    faults.raise_any()


def _is_printed(path: Path) -> bool:
    """Whether a .jsonl file holds values printed over many lines: its first line only begins one, its second is no row."""
    with _open(path) as file:
        lines = (line for line in iter(lambda: file.readline(MAX_ROW_BYTES + 1), b"") if line.strip())
        first, second = (next(lines, b"").decode("utf-8-sig", "replace").strip() for _ in range(2))
    if first[:1] not in ("{", "["):
        return False
    try:
        return isinstance(json_value(first, where=""), list)
    except InputError as error:
        is_begun = error.what.endswith(CUT_SHORT)
    try:
        return is_begun and bool(second) and not isinstance(json_value(second, where=""), dict)
    except InputError:
        return is_begun


def _read_over_lines(path: Path) -> Iterator[Record]:
    """The rows of a .jsonl file that is none: objects printed over many lines, or one list."""
    text = _decode(_read_whole(path), path=path)
    faults = Faults()
    for line, value in json_values(text, where=str(path)):
        for index, row in enumerate(value if isinstance(value, list) else [value]):
            try:
                where = f"{path}[{index}]" if isinstance(value, list) else f"{path}:{line}"
                yield _as_row(row, where=where, n_bytes=len(text) // (len(value) or 1) if isinstance(value, list) else 0)
            except InputError as error:
                faults.add(error)
    faults.raise_any()


def _read_json(path: Path) -> Iterator[Record]:
    text = _decode(_read_whole(path), path=path)
    if not text.strip():
        return
    try:
        value = json_value(text, where=str(path))
    except InputError as error:
        if "Extra data" in error.what:
            fix = "if the file holds one object per line, name it .jsonl"
            raise InputError(error.what, where=str(path), fix=fix) from None
        raise
    faults = Faults()
    rows, base = _rows_of(value, where=str(path))
    n_bytes = len(text) // max(len(rows), 1)
    for index, row in enumerate(rows):
        try:
            yield _as_row(row, where=f"{base}[{index}]", n_bytes=n_bytes)
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
    text = _decode(_read_whole(path), path=path).replace("\r\n", "\n")
    if text.strip():
        yield Record(text, str(path), len(text))


# --- tables -----------------------------------------------------------------------------------------------------------


def _read_csv(path: Path) -> Iterator[Record]:
    text = _decode(_read_whole(path), path=path).replace("\r\n", "\n")  # as in text files
    limit = csv.field_size_limit()
    csv.field_size_limit(MAX_ROW_BYTES)  # process-wide, so put back below
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
            yield Record(dict(zip(header, row, strict=True)), f"{path}:{line}", sum(map(len, row)))
        else:
            fix = "quote fields that contain commas or line breaks"
            faults.add(InputError(f"{len(row)} fields, the header has {len(header)}", where=f"{path}:{line}", fix=fix))
    faults.raise_any()


def _csv_rows(text: str, *, path: Path) -> Iterator[tuple[int, list[str]]]:
    """The (first physical line, fields) of every row that is not blank."""
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
    import pyarrow.parquet as pq  # here, not above: only Parquet files pay for it

    number = 0
    with _parquet_faults(path, lambda: number), pq.ParquetFile(path) as file:
        _check_claims(file.metadata, path=path)
        _check_types(file.schema_arrow, path=path)
        for group in range(file.num_row_groups):
            unpacked = 0
            for packed in file.iter_batches(batch_size=PARQUET_ROWS, row_groups=[group]):
                batch = _without_dictionaries(packed, path=path)
                unpacked += batch.nbytes
                if unpacked > MAX_WHOLE_BYTES:
                    raise _too_large(unpacked, path=path)
                for row in batch.to_pylist():
                    number += 1
                    yield Record(_without_blanks(row), f"{path} row {number}", batch.nbytes // len(batch))


@contextmanager
def _parquet_faults(path: Path, n_read: Callable[[], int]) -> Iterator[None]:
    """What pyarrow raises over a damaged file, as an InputError at the row after those that were read."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        fix = "write the file again; it may be cut short"
        raise InputError(f"not a readable Parquet file: {reason}", where=f"{path} row {n_read() + 1}", fix=fix) from error


def _without_blanks(value: Any) -> Any:
    """The value without fields that are null or NaN: a table gives each row, and each object in it, the fields of all."""
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if item is not None and item == item}
        return {key: _without_blanks(item) for key, item in kept.items()}
    return [_without_blanks(item) for item in value] if isinstance(value, list) else value


def _check_claims(metadata: Any, *, path: Path) -> None:
    """Check what the file says of itself against the limits, before anything is unpacked on its word."""
    if metadata.num_rows > MAX_ROWS:
        raise InputError(
            f"the file says it holds {metadata.num_rows:,} rows, at most {MAX_ROWS:,} are read",
            where=str(path),
            fix="take a part of it",
        )
    # of the row groups: pyarrow's metadata of a single column ends the process (std::terminate) where that is damaged
    claims = [metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups)]
    if claims and (max(claims) > MAX_WHOLE_BYTES or min(claims) < 0):
        raise _too_large(max(claims), path=path)


def _check_types(schema: Any, *, path: Path) -> None:
    """Refuse types with coded values inside: a value that many places share is small until it is a Python object in each.
    Only whole columns may be so coded."""
    coded = ("dictionary<", "run_end_encoded<", "_view")
    for column in schema:
        kind = str(column.type)
        inner = kind.split("<", 1)[1] if kind.startswith("dictionary<") else kind
        if any(mark in inner for mark in coded):
            raise InputError(
                f"column {column.name[:80]!r} has type {kind[:80]}, which is not read",
                where=str(path),
                fix="save its texts as plain strings",
            )


def _without_dictionaries(batch: Any, *, path: Path) -> Any:
    """The rows with each categorical column as its values, if they are not too large."""
    for index, column in enumerate(batch.columns):
        if str(column.type).startswith("dictionary<"):
            if len(batch) * column.dictionary.nbytes > MAX_WHOLE_BYTES:
                raise _too_large(len(batch) * column.dictionary.nbytes, path=path)
            batch = batch.set_column(index, batch.schema.names[index], column.dictionary_decode())
    return batch


def _too_large(n_bytes: int, *, path: Path) -> InputError:
    what = f"a row group unpacks to {n_bytes:,} bytes or more; at most {MAX_WHOLE_BYTES:,} are read"
    return InputError(what, where=str(path), fix="save the rows in smaller row groups or as .jsonl")


_READERS = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
