"""The model card of an adapter folder: what it was made from, how, and how it is loaded.

The rules: every figure on it comes from the run's own record (run.json); nothing is claimed that was not measured. And the
names of foreign folders stand on it as names: no line, key, markup or code can be made of one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lopt_edge.run.model.adapter_config import REPLACED_NAME
from quant.untrusted import printable_name


def model_card(run: Mapping[str, Any], *, run_file: str, log_file: str) -> str:
    """README.md of the output folder: what the adapter is, how it was made, how to load it.

    `run` are the facts of `run_file`; the loss of each step is in `log_file`.
    """
    config, before, after = run["config"], run["evaluation"]["before"], run["evaluation"]["after"]
    base = printable_name(run["base"])
    scored, objective = run["scored_tokens"], config.get("objective", "sft")
    method = f"method `{config['method']}`" + ("" if objective == "sft" else f", objective `{objective}`")
    rows = [
        f"| {name.replace('_', ' ')} | {_count(scored.get(name))} | {before[name]:.4f} | {after[name]:.4f} |"
        for name in after
        if name in before
    ]
    heads = ("| held-out | tokens | before | after |", "|---|---|---|---|")
    table = "\n".join([*heads, *rows]) if rows else "No held-out data was given."
    return f"""---
base_model: {json.dumps(base, ensure_ascii=False)}
library_name: peft
pipeline_tag: text-generation
tags: [lora, lopt-edge]
---
# LoRA adapter for {_as_text(Path(base).name)}

Trained with lopt-edge {run["versions"]["lopt-edge"]}, {method}, {run["totals"]["steps"]} steps,
{run["totals"]["tokens"]:,} tokens ({run["totals"]["supervised_tokens"]:,} supervised), on a base in 4 bits (NF4).

{table}

{_loading(run)}
The full settings, the plan and the measurements are in `{run_file}`, the loss of each step in `{log_file}`.
"""


def _count(n_tokens: int | None) -> str:
    return "" if n_tokens is None else f"{n_tokens:,}"


def _loading(run: Mapping[str, Any]) -> str:
    if layers := run.get("replacement", {}).get("layers"):
        return f"""Layers {", ".join(map(str, layers))} of the base were replaced by mixtures of the layers beside them
(`{REPLACED_NAME}`), so **the adapter alone, loaded with peft onto the base, does not give this model**. `lopt-edge generate
--adapter` reads both; a plain transformers folder is made by

```sh
lopt-edge export path/to/this/folder --merged merged
```"""
    copy = printable_name(run["quantised_folder"])
    return f"""```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({run["base"]!r})  # in 4 bits, as in training: {copy}
model = PeftModel.from_pretrained(base, "path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```"""


def _as_text(name: str) -> str:
    """A name in Markdown, none of it markup."""
    return re.sub(r"([\\`*_{}\[\]<>()#|!~&$])", r"\\\1", name)
