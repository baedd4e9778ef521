"""Where data lies: files, folders, patterns, and hub data sets, one or several of them with weights.

    train.jsonl                            a file (also .gz, .zst)
    chats/   or   chats/*.jsonl.gz         all data files of a folder; those that match, in the order of their names
    tatsu-lab/alpaca                       a hub data set (hub_sets.py); org/name:config[train[:5%]]@revision
    a.jsonl:0.7,org/name:0.3               several, in these shares

The rules: what exists as a path is one, whatever else it could mean. With weights each source gives its share and no row
comes twice: the mixture ends where the first source would. Without weights all rows of all sources are taken. What is
left out is chosen by the text of the specification alone, so that the same words give the same rows.

Nothing is downloaded by reading a specification; `located` does that. Rows are read one after the other, as often as asked.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from lopt_edge.data.hub_sets import HubSet, fetched, read_hub_name
from lopt_edge.data.records import Record, count_records, is_data_file, iterate_records
from lopt_edge.errors import InputError, raise_collected

_PARTS = re.compile(r",(?![^\[]*\])")  # commas outside of brackets
_WEIGHT = re.compile(r"(.+):(\d+(?:\.\d+)?|\.\d+)")


@dataclass(frozen=True)
class Source:
    """One source of a specification: its words, where it is, and its weight (None: all of it)."""

    text: str
    paths: tuple[Path, ...] = ()
    hub: HubSet | None = None
    weight: float | None = None

    def located(self) -> Source:
        """The same with its files on this machine; a hub's are fetched. Raises InputError."""
        return self if self.hub is None or self.paths else replace(self, paths=fetched(self.hub))

    def records(self) -> Iterator[Record]:
        """The rows of all files, in order; of a hub's split the part that was asked for. Raises InputError(s)."""
        paths = self.located().paths
        records = (record for path in paths for record in iterate_records(path))
        if self.hub is None or not self.hub.is_part:
            return records
        part = self.hub.part_of(sum(map(count_records, paths)))
        return islice(records, part.start, part.stop)


def sources_of(spec: str | Path, *, where: str = "data") -> list[Source]:
    """The sources that a specification names. Raises InputError(s) for what is not there, all of them together."""
    text = str(spec)
    if _exists(text) or not text:
        return [_source(text, None, where)]
    errors: list[InputError] = []
    found: list[Source] = []
    for part in (part.strip() for part in _PARTS.split(text)):
        try:
            found.append(_weighted(part, where))
        except InputError as error:
            errors.append(error)
    raise_collected(errors)
    with_weight = [source for source in found if source.weight is not None]
    if with_weight and len(with_weight) < len(found):
        other = next(source for source in found if source.weight is None)
        raise InputError(f"{other.text} has no weight, others have", where=where, fix="give all a weight, or none")
    return found


def absolute(spec: str) -> str:
    """The specification with its local paths made absolute, for a run that is taken up from elsewhere."""
    if _exists(spec):
        return str(Path(spec).expanduser().resolve())
    parts = []
    for part in _PARTS.split(spec):
        name, weight = _split_weight(part.strip())
        suffix = "" if weight is None else f":{weight:g}"
        is_local = _exists(name) or "*" in name
        parts.append(f"{Path(name).expanduser().absolute()}{suffix}" if is_local else part.strip())
    return ",".join(parts)


def mixed(counts: Sequence[int], weights: Sequence[float | None], *, seed: str) -> list[bytes | None]:
    """Of each source with so many rows which of them are taken, a byte a row: its share. None: all, without weights."""
    shares = [weight for weight in weights if weight is not None]
    if len(shares) < len(counts):
        return [None] * len(counts)
    total = sum(shares)
    most = min(count / (share / total) for count, share in zip(counts, shares, strict=True))
    found = list[bytes | None]()
    for number, (count, share) in enumerate(zip(counts, shares, strict=True)):
        n_taken = max(1, min(count, round(most * share / total)))
        found.append(_some(count, n_taken, random.Random(f"mix {seed} {number}")))
    return found


def _some(n_rows: int, n_taken: int, source: random.Random) -> bytes:
    """A byte for each row, 1 for as many as are taken; all choices are equally likely. It takes no memory beside."""
    found = bytearray(n_rows)
    for at in range(n_rows):
        if source.random() * (n_rows - at) < n_taken:
            found[at] = 1
            n_taken -= 1
    return bytes(found)


def _exists(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except (OSError, ValueError):
        return False


def _split_weight(part: str) -> tuple[str, float | None]:
    found = None if _exists(part) else _WEIGHT.fullmatch(part)
    return (found[1], float(found[2])) if found else (part, None)


def _weighted(part: str, where: str) -> Source:
    name, weight = _split_weight(part)
    if weight == 0:
        raise InputError(f"{name} has the weight 0", where=where, fix="leave it out, or give it a share")
    return _source(name, weight, where)


def _source(name: str, weight: float | None, where: str) -> Source:
    path = Path(name).expanduser()
    if _exists(name):
        return Source(name, _in_folder(path, where) if path.is_dir() else (path,), weight=weight)
    if any(mark in name for mark in "*?") and "[" not in name:
        matches = tuple(sorted(match for match in _matching(path) if match.is_file()))
        if not matches:
            raise InputError("matches no file", where=f"{where} {name}", fix="check the pattern")
        return Source(name, matches, weight=weight)
    if (hub := read_hub_name(name)) is not None:
        return Source(name, hub=hub, weight=weight)
    raise InputError("no such file", where=f"{where} {name}", fix="check the path")


def _matching(pattern: Path) -> list[Path]:
    anchor = Path(pattern.anchor) if pattern.is_absolute() else Path()
    parts = pattern.parts[1:] if pattern.is_absolute() else pattern.parts
    return list(anchor.glob("/".join(parts)))


def _in_folder(folder: Path, where: str) -> tuple[Path, ...]:
    found = tuple(path for path in sorted(folder.iterdir()) if path.is_file() and is_data_file(path))
    if not found:
        raise InputError("is a folder without data files", where=f"{where} {folder}", fix="check the path")
    return found
