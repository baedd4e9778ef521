"""A number for every example of a data set, computed once and kept on disk: a reference's log-probabilities.

A folder with one file of 16 bytes an example (the number as a double, a mark that it is there, the CRC-32 of place and
number) and `identity.json`, which says of what the numbers are. The rules: a number counts only if its sum agrees, so
whatever a crash or a damaged disk leaves, it is whole or it is absent and computed again; a folder of another identity is
emptied, since only its own run writes there. All numbers are read at once into host memory, 8 bytes an example.
"""

from __future__ import annotations

import shutil
import struct
import zlib
from array import array
from collections.abc import Mapping, Sequence
from math import isnan, nan
from pathlib import Path
from typing import Any

from lopt_edge.errors import InputError, RunError
from lopt_edge.run.tiers.feature_cache import claim
from lopt_edge.system.files import make_folder

VALUES_NAME = "values.bin"
RECORD = struct.Struct("<d4sI")
THERE = b"done"


class ScoreFile:
    """The numbers of a data set's examples in a folder. Raises RunError if it cannot be read or written."""

    def __init__(self, folder: Path, *, identity: Mapping[str, Any], n_examples: int) -> None:
        self.folder = folder
        self.values = array("d", [nan]) * n_examples
        try:
            make_folder(folder)
            try:
                claim(folder, {**identity, "examples": n_examples})
            except InputError:
                shutil.rmtree(folder)
                make_folder(folder)
                claim(folder, {**identity, "examples": n_examples})
            self._file = (folder / VALUES_NAME).open("r+b" if (folder / VALUES_NAME).exists() else "w+b", buffering=0)
            found = self._file.read(n_examples * RECORD.size)
        except OSError as error:
            raise self._failure(error) from None
        for example, at in enumerate(range(0, min(len(found), n_examples * RECORD.size) - RECORD.size + 1, RECORD.size)):
            value, mark, total = RECORD.unpack_from(found, at)
            if mark == THERE and total == _sum(example, value):
                self.values[example] = value

    def missing(self, examples: Sequence[int]) -> list[int]:
        """Those of these examples that have no number yet."""
        return [example for example in examples if isnan(self.values[example])]

    def write(self, examples: Sequence[int], values: Sequence[float]) -> None:
        """Keep the numbers of some examples. Raises RunError."""
        try:
            for example, value in zip(examples, values, strict=True):
                self._file.seek(example * RECORD.size)
                self._file.write(RECORD.pack(value, THERE, _sum(example, value)))
                self.values[example] = value
        except OSError as error:
            raise self._failure(error) from None

    def close(self) -> None:
        """Close the file; the numbers stay in memory."""
        self._file.close()

    def _failure(self, error: OSError) -> RunError:
        what = f"log-probabilities cannot be kept ({error.strerror or error})"
        return RunError(what, where=str(self.folder), fix="check the disk and its free space")


def _sum(example: int, value: float) -> int:
    return zlib.crc32(struct.pack("<qd", example, value))
