"""Asks the planner what the memory of closed layers would buy, if the steps after the closing had a plan of their own.

    python tools/closed_memory.py [--csv tools/results/closed_memory.csv]

A boundary that closes gives memory back: moments, room for gradients, the inputs that early layers save. A run has one set
of knobs, that of its largest kind of step. Here each later kind gets the search to itself: once with the run's places of
weights and states and only its activations free (nothing would have to move), once with everything free (weights would
move at the closing). The rule: seconds are the planner's own, in three digits as its search ranks them, so the table is the
same on every machine; it says what a plan per kind could gain at most, and measures nothing. docs/methods.md has the
conclusion.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lopt_edge.config.load import load_config  # noqa: E402
from lopt_edge.plan.schedule.build import StepKind  # noqa: E402
from lopt_edge.plan.search.search import Search, Space, three_digits  # noqa: E402
from lopt_edge.planning.worst_case import NOT_GIVEN, Question, question  # noqa: E402

COURSE = {"method": "lopt", "open_until": 0.25, "grad_accum": 1, "epochs": 3}
RUNS = (  # model, card (none: a CPU), tokens, device memory (none: the card's)
    ("llama-3.1-8b", "rtx4090", 2048, None), ("llama-3.1-8b", "rtx4090", 2048, "8GB"),
    ("llama-3.1-8b", "rtx4090", 4096, "10GB"), ("llama-3.1-8b", "rtx4090", 512, "4GB"),
    ("llama-3.1-8b", "rtx4090", 2048, "4GB"),
    ("llama-3.1-8b", "rtx4060-laptop", 1024, "5GB"), ("llama-3.1-8b", "rtx3060", 16384, "12GB"),
    ("llama-3.1-70b", "rtx4090", 2048, None), ("llama-3.1-70b", "rtx4090", 512, "16GB"),
    ("qwen2.5-0.5b", None, 512, "700MB"), ("qwen2.5-0.5b", None, 512, "800MB"), ("qwen2.5-0.5b", None, 2048, "1500MB"),
    ("llama-3.1-8b", None, 512, "4GB"),
)  # fmt: skip
PLACED = ("weights", "states", "gradients", "head", "prefetch", "optimizer", "apply", "token_tile", "mlp_block", "mlp_tile")


class Row(NamedTuple):
    """A kind of step of a run: its share of the steps and its seconds with the knobs of the run and with its own."""

    model: str
    device: str
    tokens: int
    device_memory: str
    kind: str
    share: float
    as_planned: float
    own_activations: float
    all_own: float


def rows_of(model: str, card: str | None, tokens: int, memory: str | None) -> list[Row]:
    """The rows of a run, one for each kind of step after the closing. Raises InputError(s)."""
    given = {"model": model, "max_seq_len": tokens, **COURSE} | ({"device_memory": memory} if memory else {})
    asked = question(load_config(None, given, placeholder=NOT_GIVEN), gpu=card)
    best = asked.search.within(asked.budget).best
    assert best is not None, f"{model} on {card} with {memory}: does not fit"
    workload, space = asked.search.workload, asked.search.space
    placed = Space(space.facts, space.device_type, {name: getattr(best.knobs, name) for name in PLACED})
    return [
        Row(
            model, card or "cpu", tokens, memory or "all", kind.name, round(share, 3),
            three_digits(workload.seconds(best.knobs, kind=kind).seconds),
            _alone(asked, kind, placed), _alone(asked, kind, space),
        )
        for kind, share in zip(workload.kinds, workload.course.shares, strict=True) if kind.closed
    ]  # fmt: skip


def _alone(asked: Question, kind: StepKind, space: Space) -> float:
    """The seconds of a kind of step whose knobs are the best of `space` for it alone."""
    workload = asked.search.workload
    one = replace(workload, course=replace(workload.course, kinds=(kind,), phases=()))
    best = Search(one, space).within(asked.budget).best
    assert best is not None, "what holds the largest kind of step holds this one"
    return three_digits(best.seconds.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="write the rows here, with the commit")
    options = parser.parse_args()
    rows = [row for run in RUNS for row in rows_of(*run)]
    print("model          device          tokens  memory  kind         as planned  own activations  all its own")
    for row in rows:
        run = f"{row.model:14s} {row.device:14s} {row.tokens:7d}  {row.device_memory:6s}  {row.kind:12s}"
        own, everything = row.own_activations / row.as_planned, row.all_own / row.as_planned
        print(f"{run} {row.as_planned:9.4g} s  {own:14.3f}x  {everything:10.3f}x")
    if options.csv is not None:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
        with options.csv.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("commit", *Row._fields))
            writer.writerows((commit.strip(), *row) for row in rows)


if __name__ == "__main__":
    main()
