"""Small files written whole: text, JSON and logs of JSON lines.

The rule: a reader finds the old file or the new one, never half of one; a full disk is a RunError that names the path.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lopt_edge.errors import RunError


def write_text(path: Path, text: str) -> None:
    """Write a whole file beside and rename it, so that a reader sees the old or the new one."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise RunError(f"cannot be written: {error.strerror}", where=str(path), fix="free space or permissions") from None


def write_json(path: Path, values: Any) -> None:
    """Write values as JSON, as `write_text` does. NaN and infinity are no JSON: ValueError."""
    write_text(path, json.dumps(values, indent=1, allow_nan=False) + "\n")


class JsonLines:
    """A log of one JSON object a line, flushed at once. `kept_bytes` of what is there stay, the rest is cut off.

    Less may be there: a run that goes on in another folder begins its log with the steps it does itself.
    """

    def __init__(self, path: Path, *, kept_bytes: int = 0) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("r+b" if path.exists() else "w+b", buffering=0)
            self.file.truncate(min(kept_bytes, path.stat().st_size))
            self.file.seek(0, os.SEEK_END)
        except OSError as error:
            raise self._failure(error) from None

    @property
    def n_bytes(self) -> int:
        """The bytes of the log so far."""
        return self.file.tell()

    def write(self, values: Mapping[str, Any]) -> None:
        """Write one line, the whole of it or nothing. Raises RunError."""
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
        """Make the log durable. Raises RunError."""
        try:
            os.fsync(self.file.fileno())
        except OSError as error:
            raise self._failure(error) from None

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def _failure(self, error: OSError) -> RunError:
        return RunError(
            f"cannot be written: {error.strerror}", where=str(self.path), fix="free space or mend the permissions there"
        )
