"""Where data lies: files, folders, patterns, and hub data sets, one or several of them with weights.

    train.jsonl                            a file (also .gz, .zst)
    chats/   or   chats/*.jsonl.gz         all data files of a folder; those that match, in the order of their names
    tatsu-lab/alpaca                       a hub data set (hub_sets.py); org/name:config[train[:5%]]@revision
    a.jsonl:0.7,org/name:0.3               several, in these shares

The rules: what exists as a path is one, whatever else it could mean. With weights each source gives its share and no row
comes twice: the mixture ends where the first source would. Without weights all rows of all sources are taken. What is
left out is chosen by the text of the specification alone, so that the same words give the same rows.

Nothing is downloaded by reading a specification; `files` of a source does that.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lopt_edge.data.hub_sets import HubSet, fetched, read_hub_name
from lopt_edge.data.records import Record, is_data_file, read_records
from lopt_edge.errors import InputError, raise_collected

_PARTS = re.compile(r",(?![^\[]*\])")  # commas outside of brackets
_WEIGHT = re.compile(r"(.+):(\d+(?:\.\d+)?|\.\d+)")
T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """One source of a specification: its words, where it is, and its weight (None: all of it)."""

    text: str
    paths: tuple[Path, ...] = ()
    hub: HubSet | None = None
    weight: float | None = None

    def files(self) -> tuple[Path, ...]:
        """The files of the source on this machine; a hub's are fetched. Raises InputError."""
        return self.paths if self.hub is None else fetched(self.hub)

    def records(self) -> list[Record]:
        """The rows of all files, in order; of a hub's split the part that was asked for. Raises InputError(s)."""
        found = [record for path in self.files() for record in read_records(path)]
        return found if self.hub is None else self.hub.part_of(found)


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


def mixed(rows: Sequence[Sequence[T]], weights: Sequence[float | None], *, seed: str) -> list[list[T]]:
    """Of each source's rows those that are taken: all without weights, else its share, no row twice, in their order."""
    shares = [weight for weight in weights if weight is not None]
    if len(shares) < len(rows):
        return [list(each) for each in rows]
    total = sum(shares)
    most = min(len(each) / (share / total) for each, share in zip(rows, shares, strict=True))
    found = []
    for number, (each, share) in enumerate(zip(rows, shares, strict=True)):
        n_taken = max(1, min(len(each), round(most * share / total)))
        chosen = sorted(random.Random(f"mix {seed} {number}").sample(range(len(each)), n_taken))
        found.append([each[index] for index in chosen])
    return found


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
