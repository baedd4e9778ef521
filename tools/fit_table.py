"""Writes the README's table of what a card holds, as the planner predicts it. No GPU has measured a row of it yet.

    python tools/fit_table.py            write it into README.md
    python tools/fit_table.py --print    print it, write nothing
    python tools/fit_table.py --check    exit with 1 if the README shows another one

Each cell is one answer of

    lopt-edge plan --model MODEL --gpu CARD --max-seq-len 2048 --host-memory 32GB --disk-memory 100GB

with all other settings at their defaults: the device's peak in a step of 2,048-token sequences, tokens a second, and the
longest single sequence that fits. Where the peak is far below the card's memory, nothing leaves the card.

The rule: whoever measures a row on a GPU puts it beside this table, with the tool that measured it, and not into it.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lopt_edge import plan_run
from tools.document_block import ROOT, run

CARDS = ("RTX 4060", "RTX 3060", "RTX 4060 Ti 16GB", "RTX 4090")
MODELS = {"llama-3.2-3b": "Llama-3.2-3B", "llama-3.1-8b": "Llama-3.1-8B", "ministral-3-8b": "Ministral-3-8B",
          "gemma-4-e4b": "Gemma-4-E4B", "qwen3.5-9b": "Qwen3.5-9B", "qwen2.5-14b": "Qwen2.5-14B",
          "qwen2.5-32b": "Qwen2.5-32B", "qwen3-30b-a3b": "Qwen3-30B-A3B", "gpt-oss-20b": "gpt-oss-20b"}  # fmt: skip
TOKENS, HOST_MEMORY, DISK_MEMORY = 2048, "32GB", "100GB"


def cell(card: str, model: str) -> str:
    """The peak, speed and longest context of one model on one card."""
    found = plan_run(model, gpu=card, max_seq_len=TOKENS, host_memory=HOST_MEMORY, disk_memory=DISK_MEMORY)
    if not found.fits:
        return "does not fit"
    peak, longest = found.peak_bytes["device"] / 2**30, found.longest_context or 0
    return f"{peak:.1f} GiB, {found.tokens_per_second:,.0f} tokens/s; {longest / 1000:,.0f}K"


def row(card: str) -> str:
    budget = plan_run("llama-3.2-3b", gpu=card, max_seq_len=TOKENS).budget_bytes["device"]
    assert budget is not None
    return f"| {card} ({budget / 2**30:.1f} GiB) | " + " | ".join(cell(card, model) for model in MODELS) + " |"


def table() -> str:
    head = f"| card | {' | '.join(MODELS.values())} |"
    return "\n".join([head, "|---" * (1 + len(MODELS)) + "|", *map(row, CARDS)])


if __name__ == "__main__":
    run(table, ROOT / "README.md", tool="fit_table", description=__doc__)
