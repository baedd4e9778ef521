"""The output folder of a run: the names in it, and whether a run may begin there.

The rules: a folder that holds something is never written over, except by the run that it belongs to; a folder with run.json
is a finished run's, and all other files of the result are durable before it is there. No torch: `compare` reads it without.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from lopt_edge.adapters.base import RUN_NAME
from lopt_edge.errors import InputError
from lopt_edge.system.lock import LOCK_NAME
from quant.folders import sync_folder
from quant.headers import FolderError, read_header, read_json
from quant.small_files import TEMPLATE_NAMES, TOKENIZER_NAMES

METRICS_NAME, EVENTS_NAME, BOUNDARY_NAME = "metrics.jsonl", "events.jsonl", "boundary.json"
REPORT_NAME = "report.html"
REFERENCES_NAME = "reference-log-probs"  # until the run is done
SETTINGS_NAME = "config.yaml"  # what `lopt-edge resume` reads
LOGS = {METRICS_NAME, EVENTS_NAME, BOUNDARY_NAME, REPORT_NAME, SETTINGS_NAME, LOCK_NAME, "tensorboard"}


# What a run writes, beside what LOGS and the patterns below name; `--overwrite` removes these and nothing else.
RESULTS = {"plan.json", "README.md", "replaced_layers.json", "adapter_config.json",
           "adapter_model.safetensors", "checkpoints", "teacher-features", REFERENCES_NAME, *TOKENIZER_NAMES,
           *TEMPLATE_NAMES}  # fmt: skip
RESULT_PATTERNS = ("not-finite-step-*.json", "adapter-step-*", "*.partial")


def check_output(folder: Path, *, resuming: bool = False, overwrite: bool = False) -> None:
    """Refuse an output folder that cannot be written, or that has something else in it than a run which saved nothing yet.

    With `resuming` the files of a run are what is expected there, with `overwrite` they may be there. Raises InputError.
    """
    try:
        exists, is_folder = folder.exists(), folder.is_dir()
        held = {path.name for path in folder.iterdir()} if is_folder else set()
    except OSError as error:
        raise InputError(f"cannot be used ({error.strerror})", where=f"output {str(folder)[:80]}") from None
    if exists and not is_folder:
        raise InputError("is a file, not a folder", where=f"output {folder}", fix="choose another output folder")
    if not ((resuming or overwrite) and SETTINGS_NAME in held):
        _check_empty(folder, held)
    parent = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not parent.is_dir():
        raise InputError(
            f"cannot be made: {parent} is a file", where=f"output {folder}", fix="choose another output folder"
        )
    if not os.access(parent, os.W_OK):
        raise InputError("cannot be written", where=f"output {folder}", fix=f"check the permissions of {parent}")


def _check_empty(folder: Path, held: set[str]) -> None:
    """Refuse a folder with more in it than the logs of a run that saved nothing; a new run replaces those."""
    left = {name for name in held if not name.endswith(".partial")} - LOGS
    if "checkpoints" in left and not any((folder / "checkpoints").glob("step-*")):
        left -= {"checkpoints"}
    if not left:
        return
    if RUN_NAME not in left and SETTINGS_NAME in held:
        raise InputError(
            "holds an unfinished run",
            where=f"output {folder}",
            fix=f"go on with it (lopt-edge resume {folder}), choose a new folder, or replace it with --overwrite",
        )
    if RUN_NAME in left:
        fix = "choose a new folder, or replace that run with --overwrite; nothing was changed there"
        raise InputError("holds another run", where=f"output {folder}", fix=fix)
    what = "is not empty, and what is there is no run's"
    raise InputError(what, where=f"output {folder}", fix="choose a new folder; nothing was changed there")


def remove_run(folder: Path) -> list[str]:
    """Remove what an earlier run wrote; returns the names of the files that stay, which are somebody else's.

    What makes it a finished run goes first and its settings last, so that one who is killed here leaves no folder that
    looks like a result, and can do it again.
    """
    unfinish(folder)
    named = [folder / name for name in sorted(RESULTS | LOGS - {LOCK_NAME, SETTINGS_NAME})]
    for path in [*named, *(path for pattern in RESULT_PATTERNS for path in sorted(folder.glob(pattern)))]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    (folder / SETTINGS_NAME).unlink(missing_ok=True)
    return sorted(path.name for path in folder.iterdir() if path.name != LOCK_NAME)


def unfinish(folder: Path) -> None:
    """Take run.json away, durably, before a run that goes on writes its result again. Raises OSError."""
    if (folder / RUN_NAME).exists():
        (folder / RUN_NAME).unlink()
        sync_folder(folder)


def damaged_results(folder: Path) -> list[str]:
    """A sentence for each file of a finished run that cannot be read (a power cut may have emptied it)."""
    if not (folder / RUN_NAME).exists():
        return []
    faults = []
    for path in sorted(folder.glob("*.json")) + sorted(folder.glob("*.safetensors")):
        try:
            (read_json if path.suffix == ".json" else read_header)(path)
        except FolderError as error:
            faults.append(str(error))
    return faults
