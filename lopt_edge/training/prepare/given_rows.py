"""Rows that are given in Python instead of a file: they become one beside the output, which the run can be taken up with.

The rule: the file has the name of the output and `.data.jsonl`; a run that is refused leaves none behind.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lopt_edge.config.settings import Config
from lopt_edge.errors import InputError, RunError
from lopt_edge.system.files import make_folder, write_text


@contextmanager
def kept_rows(config: Config, rows: Sequence[Mapping[str, Any]] | None) -> Iterator[Config]:
    """The settings with the rows' file as data; as they are where no rows are given. Raises InputError, RunError."""
    if rows is None:
        yield config
        return
    path = Path(f"{config.output}.data.jsonl")
    was_there = path.exists()
    try:
        text = "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)
    except (TypeError, ValueError) as error:
        raise InputError(f"a row is no JSON object ({error})", where="data", fix="give dicts of texts and lists") from None
    if was_there and path.read_text(encoding="utf-8") != text and not config.overwrite:
        raise InputError("holds other rows", where=str(path), fix="choose another output, or set overwrite")
    try:
        make_folder(path.parent)
    except OSError as error:
        raise RunError(f"cannot be made: {error.strerror}", where=str(path.parent)) from None
    write_text(path, text)
    try:
        yield config.model_copy(update={"data": str(path)})
    except InputError:
        if not was_there:
            path.unlink(missing_ok=True)
        raise
