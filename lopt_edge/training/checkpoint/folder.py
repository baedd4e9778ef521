"""Checkpoints as folders on disk: written whole or not at all, verified before use, never read as code.

    OUTPUT/checkpoints/step-000120          after step 120
    OUTPUT/checkpoints/step-000120+6        ... and 6 sequences into the next step's window

A checkpoint is written in a folder beside (`.writing-...`), every file synced; then comes `manifest.json` with size and
SHA-256 of each file; then the folder is synced, renamed and its parent synced. So the rules: only a folder whose manifest
is there and true is a checkpoint; an old one is removed only when the new one is durable, its manifest first, so that a
half removed one is none. Tensors are safetensors, the rest is JSON and YAML. What a run puts into one is training's
matter (snapshot.py); this file knows files only.

The caller holds the output folder's lock (system/lock.py), so whatever half-written folder is found belongs to a dead run.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lopt_edge.errors import InputError, RunError
from lopt_edge.system.files import write_json
from lopt_edge.units import format_bytes
from quant.folders import sync_folder
from quant.headers import FolderError, read_json

CHECKPOINTS, MANIFEST, STATE = "checkpoints", "manifest.json", "state.json"
FORMAT = 1
AT_ONCE = 1 << 20  # bytes read for a hash
_NAME = re.compile(r"step-(\d{6,12})(?:\+(\d{1,9}))?(\.old)?")
_WRITING, _OLD = ".writing-", ".old"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder; `state` is its state.json."""

    folder: Path
    state: dict[str, Any]


def name_of(step: int, sequences: int = 0) -> str:
    """The name of the checkpoint after `step` finished steps and so many sequences of the next one."""
    return f"step-{step:06d}" + (f"+{sequences}" if sequences else "")


@contextmanager
def new_checkpoint(root: Path, name: str, *, need_bytes: int = 0) -> Iterator[Path]:
    """A folder to write the files into; on leaving it becomes the checkpoint `name`.

    A checkpoint of the same name is replaced. After a fault nothing of the new one is left, and RunError is raised.
    `need_bytes` are for its message.
    """
    folder = root / f"{_WRITING}{name}-{os.getpid()}"
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        sync_folder(root.parent)
        yield folder
        write_json(folder / MANIFEST, {"format": FORMAT, "files": _sums(folder)})
        sync_folder(folder)
        final, old = root / name, root / f"{name}{_OLD}"
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(final, old)
        os.rename(folder, final)
        sync_folder(root)
        _remove(old)
    except OSError as error:
        raise _failure(folder, error, need_bytes) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _failure(folder: Path, error: OSError, need_bytes: int) -> RunError:
    room = f", which needs up to {format_bytes(need_bytes)}" if need_bytes else ""
    with suppress(OSError):
        room += f" ({format_bytes(shutil.disk_usage(folder.parent).free)} are free there)"
    place = error.filename if isinstance(error.filename, str) else folder
    return RunError(
        f"the checkpoint cannot be written: {error.strerror or error}{room}",
        where=str(place),
        fix="free space or mend the permissions there",
    )


def prune(root: Path, *, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for folder in _candidates(root)[keep:]:
        _remove(folder)


def clean(root: Path) -> None:
    """Remove what a killed run left half written."""
    with suppress(OSError):
        for path in root.iterdir():
            if path.name.startswith(_WRITING):
                shutil.rmtree(path, ignore_errors=True)
            elif path.name.endswith(_OLD) and _fault(path.with_name(path.name.removesuffix(_OLD))) is None:
                _remove(path)


def set_aside(root: Path, *, beyond: Path) -> list[str]:
    """Rename the checkpoints that are newer than `beyond`, from which a run goes on another way; returns the new names."""
    found = _candidates(root)
    newer = found[: found.index(beyond)] if beyond in found else []
    for folder in newer:
        folder.rename(folder.with_name(f"set-aside-{folder.name}"))
    return [f"set-aside-{folder.name}" for folder in newer]


def latest(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint, and a sentence for each newer one that is damaged."""
    faults: list[str] = []
    for folder in _candidates(root):
        try:
            return read(folder), faults
        except InputError as error:
            faults.append(str(error))
    return None, faults


def names(root: Path) -> list[str]:
    """Folders with a checkpoint's name, the newest first, not verified."""
    return [folder.name for folder in _candidates(root)]


def read(folder: Path) -> Checkpoint:
    """The checkpoint of a folder, verified. Raises InputError that says what is wrong with it."""
    if (fault := _fault(folder)) is not None:
        raise InputError(f"is no whole checkpoint: {fault}", where=str(folder), fix="use another one")
    try:
        state = read_json(folder / STATE)
    except FolderError as error:
        raise InputError(str(error), where=str(folder)) from None
    if not isinstance(state, dict):
        raise InputError("state.json holds no object", where=str(folder))
    return Checkpoint(folder, state)


def _candidates(root: Path) -> list[Path]:
    """Folders with a checkpoint's name, the newest first."""
    found = []
    with suppress(OSError):
        for path in root.iterdir():
            if match := _NAME.fullmatch(path.name):
                found.append((int(match[1]), int(match[2] or 0), match[3] is None, path))
    return [path for *_, path in sorted(found, reverse=True)]


def _fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder; None if it is whole."""
    try:
        manifest = read_json(folder / MANIFEST)
        files = manifest["files"]
        if manifest["format"] != FORMAT:
            return f"{MANIFEST} has format {str(manifest['format'])[:20]!r}, this program reads {FORMAT}"
        for name, facts in files.items():
            path = folder / name
            if Path(name).name != name or path.is_symlink():
                return f"{MANIFEST} names {name[:80]!r}, which is no file of the folder"
            if path.stat().st_size != facts["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes, {facts['bytes']:,} were written"
            if _sha256(path) != facts["sha256"]:
                return f"{name} was changed (its SHA-256 differs)"
        return None if STATE in files else f"{MANIFEST} names no {STATE}"
    except (FolderError, OSError) as error:
        return str(error)
    except (KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is malformed"


def _sums(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file, which is synced too."""
    found = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        found[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    return found


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while part := file.read(AT_ONCE):
            digest.update(part)
    return digest.hexdigest()


def _remove(folder: Path) -> None:
    """Remove a checkpoint, the manifest first: from then on it is no checkpoint any more."""
    with suppress(OSError):
        (folder / MANIFEST).unlink()
    shutil.rmtree(folder, ignore_errors=True)
