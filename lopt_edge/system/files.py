"""Small files written whole: text, JSON and logs of JSON lines; and folders that outlive a power cut.

The rules: a reader finds the old file or the new one, never half of one, and so does whoever starts the machine again (the
file is synced before it has its name, its folder before the call returns); a full disk is a RunError that names the path. A
line of a log may be torn by a power cut; whoever goes on with the log cuts it off and says so.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any

from lopt_edge.errors import RunError
from quant.folders import sync_folder


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, each name durable. Raises OSError."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a whole file beside and rename it, so that a reader sees the old or the new one, after a power cut too."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        raise RunError(f"cannot be written: {error.strerror}", where=str(path), fix="free space or permissions") from None


def write_json(path: Path, values: Any) -> None:
    """Write values as JSON, as `write_text` does. NaN and infinity are no JSON: ValueError."""
    write_text(path, json.dumps(values, indent=1, allow_nan=False) + "\n")


class JsonLines:
    """A log of one JSON object a line, flushed at once. `kept_bytes` of what is there stay, the rest is cut off.

    Less may be there: a run that goes on in another folder begins its log with the steps it does itself. `torn_bytes` at
    the end of what was to stay were no whole lines, and are cut off too.
    """

    def __init__(self, path: Path, *, kept_bytes: int = 0) -> None:
        self.path = path
        try:
            make_folder(path.parent)
            self.file = path.open("r+b" if path.exists() else "w+b", buffering=0)
            kept = min(kept_bytes, path.stat().st_size)
            whole = _whole_lines(self.file, kept)
            self.torn_bytes = kept - whole
            self.file.truncate(whole)
            self.file.seek(0, os.SEEK_END)
        except OSError as error:
            raise self._failure(error) from None

    @property
    def n_bytes(self) -> int:
        """The bytes of the log so far."""
        return self.file.tell()

    def write(self, values: Mapping[str, Any]) -> None:
        """Write one line, the whole of it or nothing. Raises RunError, also for a log that was removed meanwhile."""
        self._check_there()
        line, start = memoryview(json.dumps(values, allow_nan=False).encode() + b"\n"), self.n_bytes
        try:
            while line:
                line = line[self.file.write(line) :]
        except OSError as error:
            with suppress(OSError):
                self.file.truncate(start)
                self.file.seek(start)
            raise self._failure(error) from None

    def sync(self) -> None:
        """Make the log durable. Raises RunError, also for a log that was removed meanwhile."""
        self._check_there()
        try:
            os.fsync(self.file.fileno())
        except OSError as error:
            raise self._failure(error) from None

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def _check_there(self) -> None:
        """Refuse to write what nobody could find: the open file outlives its name."""
        try:
            there = os.path.samestat(os.stat(self.path), os.fstat(self.file.fileno()))
        except OSError:
            there = False
        if not there:
            raise RunError(
                "was removed or moved while the run went on",
                where=str(self.path),
                fix="leave the output folder alone until the run ends",
            )

    def _failure(self, error: OSError) -> RunError:
        return RunError(
            f"cannot be written: {error.strerror}", where=str(self.path), fix="free space or mend the permissions there"
        )


def _whole_lines(file: FileIO, n_bytes: int) -> int:
    """The bytes of a log, up to `n_bytes`, that are whole lines of JSON; a power cut leaves half a line, or zeros."""
    whole, lines = 0, BufferedReader(file)
    with suppress(ValueError, RecursionError):  # of what is no JSON: the torn part begins there
        for line in lines:
            if whole + len(line) > n_bytes or not line.endswith(b"\n"):
                break
            json.loads(line)
            whole += len(line)
    lines.detach()
    return whole


def torn_tail(log: JsonLines) -> str | None:
    """A sentence about what was cut off a log that is gone on with; None where all of it was whole."""
    if not log.torn_bytes:
        return None
    return f"{log.path}: its last {log.torn_bytes:,} bytes were no whole line (a power cut does that) and were cut off"
