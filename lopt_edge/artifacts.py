"""The output folder of a run: adapter, tokenizer, logs (JSON lines), run.json, model card.

The adapter is peft's form (`adapter_model.safetensors`, `adapter_config.json` written by peft itself, or in checkpoints by
us with the same content), so that plain peft loads it. Rules: the output folder must be new, empty, or hold nothing but the
logs of a run that saved nothing, so no run is overwritten (resuming is another matter); a file is written beside and
renamed, a log line is written whole or not at all; an adapter that holds a number that is not finite is never saved.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lopt_edge.errors import InputError, RunError
from lopt_edge.output_lock import LOCK_NAME
from lopt_edge.plan.budget import format_bytes
from lopt_edge.run.load import Model
from lopt_edge.run.lora import ADAPTER_CONFIG_NAME, ADAPTER_NAME, write_adapter
from lopt_edge.run.replaced import REPLACED_NAME, replaced_values

RUN_NAME = "run.json"
METRICS_NAME, EVENTS_NAME, BOUNDARY_NAME = "metrics.jsonl", "events.jsonl", "boundary.json"
SETTINGS_NAME = "config.yaml"  # what `lopt-edge resume` reads


LOGS = {METRICS_NAME, EVENTS_NAME, BOUNDARY_NAME, SETTINGS_NAME, LOCK_NAME}


def check_output(folder: Path, *, resuming: bool = False) -> None:
    """Refuse an output folder that cannot be written, or that holds something else than a run which saved nothing yet.

    `resuming`: the files of a run are what is expected there.
    """
    try:
        exists, is_folder = folder.exists(), folder.is_dir()
        held = {path.name for path in folder.iterdir()} if is_folder else set()
    except OSError as error:
        raise InputError(f"cannot be used ({error.strerror})", where=f"output {str(folder)[:80]}") from None
    if exists and not is_folder:
        raise InputError("is a file, not a folder", where=f"output {folder}", fix="choose another output folder")
    if not (resuming and SETTINGS_NAME in held):
        _check_empty(folder, held)
    parent = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not parent.is_dir():
        raise InputError(
            f"cannot be made: {parent} is a file", where=f"output {folder}", fix="choose another output folder"
        )
    if not os.access(parent, os.W_OK):
        raise InputError("cannot be written", where=f"output {folder}", fix=f"check the permissions of {parent}")


def _check_empty(folder: Path, held: set[str]) -> None:
    """Logs alone are what a run leaves that was stopped before it saved anything; a new run replaces them."""
    left = {name for name in held if not name.endswith(".partial")} - LOGS
    if "checkpoints" in left and not any((folder / "checkpoints").glob("step-*")):
        left -= {"checkpoints"}
    if not left:
        return
    if RUN_NAME not in left and SETTINGS_NAME in held:
        raise InputError("holds an unfinished run", where=f"output {folder}",
                         fix=f"go on with it (lopt-edge resume {folder}), or choose a new folder")  # fmt: skip
    what = "holds another run" if RUN_NAME in left else "is not empty"
    raise InputError(what, where=f"output {folder}", fix="choose a new folder; nothing was changed there")


def check_free_space(folder: Path, *, need_bytes: int, what: str) -> None:
    """Raise InputError if the disk of `folder` has less free."""
    existing = next(path for path in (folder, *folder.resolve().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    if free < need_bytes:
        raise InputError(f"{what} need up to {format_bytes(need_bytes)}, {format_bytes(free)} are free there",
                         where=str(folder), fix="free space, or choose another output folder")  # fmt: skip


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
    """As `write_text`. NaN and infinity are no JSON: ValueError."""
    write_text(path, json.dumps(values, indent=1, allow_nan=False) + "\n")


@dataclass(frozen=True)
class AdapterShape:
    """What adapter_config.json says: rank, alpha, dropout, modules, the layers that carry adapters, and the base."""

    r: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    layers: tuple[int, ...]
    n_layers: int
    base: str
    revision: str | None = None

    def config(self) -> dict[str, Any]:
        """peft's keys; what is not named has peft's default."""
        layers = sorted(self.layers)
        return {
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base,
            "revision": self.revision,
            "inference_mode": True,
            "r": self.r,
            "lora_alpha": self.alpha if self.alpha % 1 else int(self.alpha),
            "lora_dropout": self.dropout,
            "target_modules": sorted(self.targets),
            "layers_to_transform": None if len(layers) == self.n_layers else layers,
            "bias": "none",
        }


def save_adapter(folder: Path, model: Model, shape: AdapterShape, *, plain: bool = False) -> None:
    """Write adapter_model.safetensors, adapter_config.json, and replaced_layers.json where layers are replaced.

    Raises NotFinite, RunError.

    `plain`: without peft, whose import takes some 50 MiB; a test holds that peft reads the same config.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replaced = replaced_values(model)
        write_adapter(model, folder / ADAPTER_NAME)
        if replaced is not None:
            write_json(folder / REPLACED_NAME, replaced)
        if plain:
            write_json(folder / ADAPTER_CONFIG_NAME, {"peft_type": "LORA", **shape.config()})
        else:
            from peft import LoraConfig

            LoraConfig(**shape.config()).save_pretrained(folder)
    except OSError as error:
        raise RunError(f"the adapter cannot be written: {error}", where=str(folder), fix="free space there") from None


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
        return self.file.tell()

    def write(self, values: Mapping[str, Any]) -> None:
        """The whole line or nothing of it. Raises RunError."""
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
        """Make it durable. Raises RunError."""
        try:
            os.fsync(self.file.fileno())
        except OSError as error:
            raise self._failure(error) from None

    def close(self) -> None:
        self.file.close()

    def _failure(self, error: OSError) -> RunError:
        return RunError(f"cannot be written: {error.strerror}", where=str(self.path), fix="free space or mend the "
                        "permissions there")  # fmt: skip


def model_card(run: Mapping[str, Any]) -> str:
    """README.md of the output folder: what the adapter is, how it was made, how to load it."""
    config, before, after = run["config"], run["evaluation"]["before"], run["evaluation"]["after"]
    rows = [f"| {name.replace('_', ' ')} | {before[name]:.4f} | {after[name]:.4f} |" for name in after if name in before]
    table = "\n".join(["| held-out | before | after |", "|---|---|---|", *rows]) if rows else "No held-out data was given."
    return f"""---
base_model: {run["base"]}
library_name: peft
pipeline_tag: text-generation
tags: [lora, lopt-edge]
---
# LoRA adapter for {Path(run["base"]).name}

Trained with lopt-edge {run["versions"]["lopt-edge"]}, method `{config["method"]}`, {run["totals"]["steps"]} steps,
{run["totals"]["tokens"]:,} tokens ({run["totals"]["supervised_tokens"]:,} supervised), on a base in 4 bits (NF4).

{table}

{_loading(run)}
The full settings, the plan and the measurements are in `{RUN_NAME}`, the loss of each step in `{METRICS_NAME}`.
"""


def _loading(run: Mapping[str, Any]) -> str:
    if layers := run.get("replacement", {}).get("layers"):
        return f"""Layers {", ".join(map(str, layers))} of the base were replaced by mixtures of the layers beside them
(`{REPLACED_NAME}`), so **the adapter alone, loaded with peft onto the base, does not give this model**. `lopt-edge generate
--adapter` reads both; a plain transformers folder is made by

```sh
lopt-edge export path/to/this/folder --merged merged
```"""
    return f"""```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{run["base"]}")  # in 4 bits, as in training: {run["quantised_folder"]}
model = PeftModel.from_pretrained(base, "path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```"""
