"""Writes the tables of docs/settings.md: every setting of `finetune`, from the fields of `Config`.

    python tools/settings_table.py            write them into docs/settings.md, and examples/config.schema.json
    python tools/settings_table.py --print    print them, write nothing
    python tools/settings_table.py --check    exit with 1 if the document shows others

Groups and order are those of lopt_edge/config/panels.py, as in `finetune --help`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lopt_edge.config.panels import in_panels
from lopt_edge.config.schema import schema
from lopt_edge.config.settings import Config, field_names, may_be_bool
from lopt_edge.plan.methods import METHODS, owners_of
from tools.document_block import ROOT, run

MOST_SHOWN = 2**31  # a bound beyond it tells nobody anything
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
HEAD = "| setting | flag | values | default | what it is |\n|---|---|---|---|---|"


def sections() -> str:
    """The tables, each under its heading, in the order of `finetune --help`."""
    own = {f"Method {', '.join(owners)}": owners for owners in map(owners_of, field_names()) if owners}
    parts = []
    for panel, names in in_panels():
        heading = f"### {', '.join(f'`{name}`' for name in own[panel])}" if panel in own else f"## {panel}"
        parts.append(f"{heading}\n\n{table(names)}")
    return "\n\n".join(parts)


def table(names: list[str] | tuple[str, ...]) -> str:
    return "\n".join([HEAD, *map(row, names)])


def row(name: str) -> str:
    field = Config.model_fields[name]
    flag = f"--{name.replace('_', '-')}"
    flags = f"`{flag}`, `--no-{flag[2:]}`" if may_be_bool(field.annotation) else f"`{flag}`"
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
    if not sys.argv[1:]:
        (ROOT / "examples" / "config.schema.json").write_text(json.dumps(schema(), indent=2) + "\n", encoding="utf-8")
    run(sections, ROOT / "docs" / "settings.md", tool="settings_table", description=__doc__)
