"""Prints the table of examples/laptop-gpus.md: what a laptop's card holds of an 8B model, as the planner predicts it.

    python tools/laptop_table.py            the table, to paste
    python tools/laptop_table.py --check    exits with 1 if the document's table is another one
    ... --card "RTX 4060 Laptop"            that card's lines alone

The rule: every number in that document's table comes from here, and a test runs --check.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lopt_edge import plan_run
from lopt_edge.plan.search.run_plan import RunPlan
from lopt_edge.units import format_bytes

DOCUMENT = Path(__file__).resolve().parent.parent / "examples" / "laptop-gpus.md"
CARDS = ("RTX 3060 Laptop", "RTX 4060 Laptop", "RTX 4080 Laptop", "RTX 4090 Laptop")
LENGTHS = (2048, 8192, 32768)
HOST_MEMORY, DISK_MEMORY = "12GB", "100GB"
HEAD = ("card", "tokens", "device memory", "of it", "layers' weights", "graphs", "host", "tokens/s", "longest context")


def rows(cards: Sequence[str]) -> list[tuple[str, ...]]:
    found = []
    for card in cards:
        for length in LENGTHS:
            one = plan_run(
                "llama-3.1-8b", gpu=card, max_seq_len=length, grad_accum=1, host_memory=HOST_MEMORY, disk_memory=DISK_MEMORY
            )
            found.append((card, f"{length:,}", *cells(one)))
    return found


def cells(one: RunPlan) -> tuple[str, ...]:
    budget = one.budget_bytes["device"]
    assert budget is not None
    if not one.fits:
        return "does not fit", "", "", "", "", "", f"{one.longest_context:,}"
    return (
        format_bytes(one.peak_bytes["device"]),
        format_bytes(budget),
        str(one.knobs["weights"]),
        str(one.knobs["activations"]),
        format_bytes(one.peak_bytes["host"]),
        f"{one.tokens_per_second:,.0f}",
        f"{one.longest_context:,}",
    )


def table(card: str | None) -> str:
    lines = rows([card]) if card else [HEAD, tuple("---" for _ in HEAD), *rows(CARDS)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the document, print nothing")
    parser.add_argument("--card", choices=CARDS, help="its lines alone")
    options = parser.parse_args()
    found = table(options.card)
    if not options.check:
        print(found, end="")
    elif found not in DOCUMENT.read_text(encoding="utf-8"):
        raise SystemExit(f"{DOCUMENT} has another table; paste what this tool prints")


if __name__ == "__main__":
    main()
