"""`lopt-edge models`: which models can be trained, and the shapes that `plan --model NAME` knows without a download.

The rule: everything shown is computed from the records (plan/facts): a preset's parameters and 4-bit size follow from its
config, as a plan's bytes do. A model of a listed family that is no preset is planned from its folder or hub id.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lopt_edge.plan.facts.families import FAMILIES, WRAPPERS
from lopt_edge.plan.facts.model import facts_from_config
from lopt_edge.plan.facts.presets import PRESETS
from lopt_edge.units import format_bytes


@dataclass(frozen=True)
class ModelRow:
    """One preset as it is shown. `four_bit_bytes` is the size of its 4-bit folder, `source` where its shape was read.

    `n_active` are the parameters that a token meets: all but those of other experts.
    """

    name: str
    hub_id: str
    family: str
    n_parameters: int
    n_active: int
    four_bit_bytes: int
    max_positions: int | None
    source: str


def model_rows() -> list[ModelRow]:
    """List the presets, by family and size."""
    rows = []
    for preset in PRESETS.values():
        facts = facts_from_config(preset.config, where=preset.name)
        rows.append(
            ModelRow(
                preset.name,
                preset.hub_id,
                facts.family.name,
                facts.n_parameters,
                facts.n_active,
                facts.folder_bytes(preset.itemsize),
                facts.max_positions,
                preset.source,
            )
        )
    return sorted(rows, key=lambda row: (row.family, row.n_parameters))


def models_page(out: Console, *, as_json: bool) -> None:
    """Show the presets and the families, on `out` or as JSON."""
    rows = model_rows()
    if as_json:
        found = {"families": list(FAMILIES), "multimodal": list(WRAPPERS), "presets": [asdict(row) for row in rows]}
        print(json.dumps(found, indent=2))
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("name", "hub id"):
        table.add_column(heading, overflow="fold")
    for heading in ("size", "4 bits", "context"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        size, positions = f"{row.n_parameters / 1e9:.2f}B", f"{row.max_positions:,}" if row.max_positions else ""
        table.add_row(row.name, row.hub_id, size, format_bytes(row.four_bit_bytes), positions)
    out.print(table)
    out.print(
        Text("\nplan one by name: lopt-edge plan --model NAME; train any model of these families, by folder or hub id")
    )
    for heading, names in (("families", FAMILIES), ("text inside multimodal models", WRAPPERS)):
        out.print(Text.assemble((f"{heading}: ", "bold"), ", ".join(names)))
    out.print(Text("other causal language models of transformers are tried before they train: docs/families.md"))
