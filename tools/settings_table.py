"""Writes the tables of docs/settings.md: every setting of `finetune`, from the fields of `Config`.

    python tools/settings_table.py            write them into docs/settings.md
    python tools/settings_table.py --print    print them, write nothing
    python tools/settings_table.py --check    exit with 1 if the document shows others

A method's own options are found by their owners, so a new method needs nothing here. Every other setting stands in GROUPS,
in the order in which it is shown; one that stands in none comes last under "Others", so that none is forgotten.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lopt_edge.config.settings import Config, field_names
from lopt_edge.plan.methods import METHODS, owners_of
from tools.document_block import ROOT, run

GROUPS = {
    "The run": ("model", "revision", "data", "output", "method", "max_steps", "epochs", "seed", "device", "compute_dtype",
                "cache_dir", "sample_prompt", "dry_run"),
    "Where the depth is cut, and what early segments learn by": (
        "num_segments", "boundary_layers", "choose_segments", "lr_local", "local_weight", "boundary_cache", "pipeline",
        "pipeline_minutes"),
    "Training": ("batch_size", "grad_accum", "choose_micro_batch", "lr", "schedule", "warmup_ratio", "weight_decay", "clip",
                 "clip_scope", "optimizer", "lora_r", "lora_alpha", "lora_dropout", "lora_targets", "init_adapter"),
    "Data and evaluation": ("max_seq_len", "data_format", "chat_template", "eval_data", "eval_fraction", "eval_every",
                            "keep_best", "retention_data"),
    "Memory": ("device_memory", "host_memory", "disk_memory", "pinned_memory", "weights", "activations", "saved_inputs",
               "optimizer_states", "gradients", "apply", "prefetch", "token_tile", "page_dir", "memory_report", "force"),
    "Checkpoints and faults": ("save_every", "save_minutes", "keep", "resume", "on_nan", "max_skipped"),
}  # fmt: skip
METHODS_HEADING, OTHERS = "Options of single methods", "Others"
AFTER = "Where the depth is cut, and what early segments learn by"  # the methods' options come next
MOST_SHOWN = 2**31  # a bound beyond it tells nobody anything
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
HEAD = "| setting | flag | values | default | what it is |\n|---|---|---|---|---|"


def sections() -> str:
    """The tables, each under its heading."""
    owned = [name for name in field_names() if owners_of(name)]
    grouped = [name for names in GROUPS.values() for name in names]
    others = tuple(name for name in field_names() if name not in owned and name not in grouped)
    parts = []
    for heading, names in {**GROUPS, **({OTHERS: others} if others else {})}.items():
        parts.append(f"## {heading}\n\n{table(names)}")
        if heading == AFTER:
            parts.append(f"## {METHODS_HEADING}\n\n" + "\n\n".join(method_sections(owned)))
    return "\n\n".join(parts)


def method_sections(owned: list[str]) -> Iterator[str]:
    """The tables of methods' options, one for each set of methods that share them."""
    by_owners: dict[tuple[str, ...], list[str]] = {}
    for name in owned:
        by_owners.setdefault(owners_of(name), []).append(name)
    for owners, names in sorted(by_owners.items()):
        yield f"### {', '.join(f'`{owner}`' for owner in owners)}\n\n{table(names)}"


def table(names: list[str] | tuple[str, ...]) -> str:
    return "\n".join([HEAD, *map(row, names)])


def row(name: str) -> str:
    field = Config.model_fields[name]
    flag = f"--{name.replace('_', '-')}"
    flags = f"`{flag}`, `--no-{flag[2:]}`" if field.annotation is bool else f"`{flag}`"
    default = "**needed**" if field.is_required() else "" if field.default is None else f"`{shown(field.default)}`"
    default += "".join(f" ({one.name}: `{one.defaults[name]}`)" for one in METHODS.values() if name in one.defaults)
    text = (field.description or "").replace("|", "\\|")
    return f"| `{name}` | {flags} | {values(field.annotation, field.metadata)} | {default} | {text} |"


def shown(default: Any) -> str:
    if isinstance(default, bool):
        return "true" if default else "false"
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def values(annotation: Any, metadata: list[Any]) -> str:
    """The type or the choices of a setting, with its bounds."""
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)] if _is_union(annotation) else [annotation]
    kind = kinds[0]
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    if get_origin(kind) is tuple:
        return f"{_word(get_args(kind)[0])}s, with commas between"
    limits = [(sign, getattr(part, key, None)) for part in metadata for key, sign in BOUNDS.items()]
    bounds = [f"{sign} {limit:g}" for sign, limit in limits if limit is not None and limit < MOST_SHOWN]
    return " ".join([_word(kind), ", ".join(bounds)]).strip()


def _is_union(annotation: Any) -> bool:
    return type(None) in get_args(annotation)


def _word(kind: Any) -> str:
    return {int: "integer", float: "number", bool: "true or false", str: "text"}[kind]


if __name__ == "__main__":
    run(sections, ROOT / "docs" / "settings.md", tool="settings_table", description=__doc__)
