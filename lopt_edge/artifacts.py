"""The output folder of a run: adapter, tokenizer, metrics.jsonl, run.json, model card.

The adapter is peft's form (`adapter_model.safetensors`, `adapter_config.json` written by peft itself), so that plain peft
loads it. Rules: the output folder must be new or empty, so no run is overwritten; a file is written beside and renamed; an
adapter that holds a number that is not finite is never saved.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lopt_edge.errors import InputError, RunError
from lopt_edge.run.lora import ADAPTER_NAME

RUN_NAME = "run.json"
METRICS_NAME = "metrics.jsonl"


def check_output(folder: Path) -> None:
    """Refuse an output folder that holds something else than an unfinished run's log, or that cannot be written."""
    try:
        exists, is_folder = folder.exists(), folder.is_dir()
        held = {path.name for path in folder.iterdir()} if is_folder else set()
    except OSError as error:
        raise InputError(f"cannot be used ({error.strerror})", where=f"output {str(folder)[:80]}") from None
    if exists and not is_folder:
        raise InputError("is a file, not a folder", where=f"output {folder}", fix="choose another output folder")
    if held - {METRICS_NAME}:  # the log alone is what an unfinished run leaves; a new run replaces it
        what = "holds another run" if (folder / RUN_NAME).exists() else "is not empty"
        raise InputError(what, where=f"output {folder}", fix="choose a new folder; nothing was changed there")
    parent = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not parent.is_dir():
        raise InputError(
            f"cannot be made: {parent} is a file", where=f"output {folder}", fix="choose another output folder"
        )
    if not os.access(parent, os.W_OK):
        raise InputError("cannot be written", where=f"output {folder}", fix=f"check the permissions of {parent}")


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


def save_adapter(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    base: str,
    r: int,
    alpha: float,
    dropout: float,
    targets: Iterable[str],
    layers: Iterable[int],
    n_layers: int,
    revision: str | None = None,
) -> None:
    """Write adapter_model.safetensors and adapter_config.json. Raises RunError for values that are not finite."""
    from peft import LoraConfig, TaskType

    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise RunError(f"the adapter holds values that are not finite ({broken[0]}); it was not saved", where=str(folder))
    layers = sorted(layers)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base,
        revision=revision,
        inference_mode=True,
        r=r,
        lora_alpha=alpha if alpha % 1 else int(alpha),
        lora_dropout=dropout,
        target_modules=sorted(targets),
        layers_to_transform=None if len(layers) == n_layers else layers,
        bias="none",
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{ADAPTER_NAME}.partial"
        save_file(dict(tensors), partial, metadata={"format": "pt"})
        os.replace(partial, folder / ADAPTER_NAME)
        config.save_pretrained(folder)
    except OSError as error:
        raise RunError(f"the adapter cannot be written: {error}", where=str(folder), fix="free space there") from None


class MetricsLog:
    """metrics.jsonl: one JSON object a line, flushed at once."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS_NAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("w", encoding="utf-8")
        except OSError as error:
            raise RunError(f"cannot be written: {error.strerror}", where=str(self.path)) from None

    def write(self, values: Mapping[str, Any]) -> None:
        try:
            self.file.write(json.dumps(values) + "\n")
            self.file.flush()
        except OSError as error:
            raise RunError(f"cannot be written: {error.strerror}", where=str(self.path), fix="free space there") from None

    def close(self) -> None:
        self.file.close()


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

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{run["base"]}")  # in 4 bits, as in training: {run["quantised_folder"]}
model = PeftModel.from_pretrained(base, "path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
The full settings, the plan and the measurements are in `{RUN_NAME}`, the loss of each step in `{METRICS_NAME}`.
"""
