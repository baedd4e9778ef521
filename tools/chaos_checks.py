"""What chaos.py holds runs to: after a kill, and when one came to its end.

Whole checkpoints stay whole and never go back; what a finished run left is compared byte for byte with what an undisturbed
run left: the adapter, the log without what is measured, and the 4-bit copy in the cache. Everything here reads files only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lopt_edge.errors import InputError
from lopt_edge.run.model.lora import ADAPTER_NAME
from lopt_edge.training.checkpoint import folder as checkpoint
from quant.headers import FolderError, read_header

MEASURED = ("step_seconds", *(f"peak_{tier}_bytes" for tier in ("device", "rss", "host", "pinned", "disk")))
LEFTOVERS = (".writing-", ".partial", "lopt-pages-", ".lock", ".old")


@dataclass(frozen=True)
class Final:
    """The final state that two runs of the same settings have in common."""

    adapter: bytes
    log: tuple[str, ...]
    four_bit: Mapping[str, str]  # SHA-256 by file


def final_of(output: Path, cache: Path) -> Final:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    log = (json.dumps({key: value for key, value in line.items() if key not in MEASURED}) for line in lines)
    return Final((output / ADAPTER_NAME).read_bytes(), tuple(log), hashes(cache))


def hashes(folder: Path) -> dict[str, str]:
    """The hash of each file by its path inside `folder`; nothing half written counts."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".partial" not in str(path)
    }


def final_faults(output: Path, cache: Path, whole: Final) -> Iterator[str]:
    """The faults of a finished run: how it differs from the undisturbed one, and what it left lying about."""
    try:
        found = final_of(output, cache)
    except (OSError, ValueError) as error:
        yield f"the result cannot be read: {error}"
        return
    if found.adapter != whole.adapter:
        yield f"{ADAPTER_NAME} differs from the undisturbed run's"
    if found.log != whole.log:
        at = next((at for at, pair in enumerate(zip(found.log, whole.log, strict=False)) if pair[0] != pair[1]), "its end")
        yield f"metrics.jsonl differs from the undisturbed run's at line {at} ({len(found.log)} and {len(whole.log)} lines)"
    if found.four_bit != whole.four_bit:
        yield "the 4-bit copy differs from the first one"
    if Path(f"{output}.pages").exists():
        yield "left behind: the page folder"
    for folder in (output, cache):
        for path in folder.rglob("*"):
            if any(part in path.name for part in LEFTOVERS):
                yield f"left behind: {path}"


def stamps(*paths: Path) -> dict[str, tuple[int, int]]:
    """The size and time of change of every file."""
    files = [path for root in paths for path in ([root] if root.is_file() else sorted(root.rglob("*")))]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


@dataclass
class Chain:
    """A run with its output folder, over all its attempts."""

    output: Path
    kills: int = 0
    newest: tuple[int, int] = (0, 0)  # steps, sequences of the newest whole checkpoint

    def faults(self, *, keep: int) -> Iterator[str]:
        """The faults of the folder after a kill."""
        whole = []
        for folder in (self.output / checkpoint.CHECKPOINTS).glob("step-*"):
            if not (folder / checkpoint.MANIFEST).exists():
                continue
            try:
                run = checkpoint.read(folder).state["run"]
                whole.append((run["steps"], run["sequences"]))
            except InputError as error:
                yield f"a checkpoint with a manifest is damaged: {error}"
        newest = max(whole, default=(0, 0))
        if newest < self.newest:
            yield f"the newest checkpoint of {self.output} went back from {self.newest} to {newest}"
        self.newest = max(newest, self.newest)
        if len(whole) > keep + 1:
            yield f"{len(whole)} checkpoints are whole in {self.output}, {keep} are to be kept"
        adapter = self.output / ADAPTER_NAME
        try:
            if adapter.exists():
                read_header(adapter)
        except FolderError as error:
            yield f"the adapter cannot be read after a kill: {error}"


def half_written(output: Path, cache: Path, *, child: int) -> frozenset[str]:
    """The phases in which this process must have been, by what lies half written under its id."""
    left = {
        "checkpoint": (output / checkpoint.CHECKPOINTS).glob(f".writing-*-{child}"),
        "quantise": cache.glob(f"*.partial-{child}-*"),
    }
    return frozenset(phase for phase, found in left.items() if any(found))
