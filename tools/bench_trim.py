"""Measures what giving a CPU's heap back costs: a run that trims where it nears its prediction, and one that never does.

    python tools/bench_trim.py --model DIR [--lengths uniform] [--tokens 512] [--share 0] [--rounds 3]

The rule: the same `finetune` (same rows, plan and budget) in processes of their own, the two ways in turns, so that a
slower minute meets both. The system does not hold the budget in either, or the run that never trims would die of it.
Seconds are those of the whole process on a core, loading included (`cpu`, the system's part beside it), and those of the
steps after the first; medians over rounds. Peaks are the kernel's count of the whole process. Rows go to
tools/results/trim.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench_memory_run import environment, error_text
from bench_peers import append, common_columns
from bench_prediction import Case, bounds, data_file, words_of

RESULTS = Path(__file__).resolve().parent / "results" / "trim.csv"
COLUMNS = (
    "date", "hardware", "threads", "versions", "commit", "model", "lengths", "tokens", "share", "budget_bytes", "steps",
    "way", "trims", "cpu_seconds", "system_seconds", "step_seconds", "peak_bytes", "times_never",
)  # fmt: skip
CHILD = """
import sys
from pathlib import Path
from lopt_edge.plan.facts.budget import Budget
from lopt_edge.system.allocator import HeapWatch
from lopt_edge.training.session import session
hold = session.hold_budget
session.hold_budget = lambda budget, device, **context: hold(Budget(), device, **context)
way, count = sys.argv.pop(1), Path(sys.argv.pop(1))
if way == "never":
    HeapWatch.look = lambda self: None
watches = []
class Noted(HeapWatch):
    def __init__(self, *words, **named):
        super().__init__(*words, **named)
        watches.append(self)
session.HeapWatch = Noted
report = session.write_report
def reported(*words, **named):
    count.write_text(str(watches[-1].n_trims))
    report(*words, **named)
session.write_report = reported
from lopt_edge.cli.main import main
main()
"""


@dataclass(frozen=True)
class Run:
    """What one process took: seconds of a core, the system's share of them, seconds of a step; and how often it trimmed."""

    cpu_seconds: float
    system_seconds: float
    step_seconds: float
    peak_bytes: int
    trims: int


def one_process(options: argparse.Namespace, words: list[str], way: str, folder: Path) -> Run:
    """One run, in a process of its own."""
    output, count = Path(tempfile.mkdtemp(dir=folder)) / "output", folder / "trims"
    command = [sys.executable, "-c", CHILD, way, str(count), *words, f"--output={output}"]
    with tempfile.TemporaryFile("w+") as told:
        child = subprocess.Popen(command, env=environment(options), stdout=subprocess.DEVNULL, stderr=told)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        told.seek(0)
        if child.returncode:
            raise SystemExit(f"exit code {child.returncode}: {error_text(told.read())}")
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    seconds = [line["step_seconds"] for line in steps if "loss" in line][1:]
    peak = json.loads((output / "run.json").read_text())["peaks"]["peak_rss_bytes"]
    cpu = used.ru_utime + used.ru_stime
    return Run(cpu, used.ru_stime, statistics.median(seconds), peak, int(count.read_text()))


def median(runs: Sequence[Run], name: str) -> float:
    return statistics.median(getattr(one, name) for one in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--lengths", default="uniform", choices=("fixed", "uniform", "code"))
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--share", type=float, default=0.0, help="of the way from the smallest budget to the largest")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--csv", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.batch_size, options.grad_accum, options.lora_r, options.flag = 1, 1, 8, ["--seed=0"]
    options.device, options.dtype, options.seq_len = "cpu", "float32", options.tokens
    with tempfile.TemporaryDirectory(prefix="trim-") as name:
        folder = Path(name)
        case = Case(options.model, "e2e", options.lengths, options.tokens, options.share)
        words = words_of(options, case, data_file(options.lengths, options.tokens, folder))
        least, most = bounds(tuple(words))
        budget = round(least + options.share * (most - least))
        words.append(f"--device-memory={budget}B")
        found: dict[str, list[Run]] = {"as it is": [], "never": []}
        for _ in range(options.rounds):
            for way, some in found.items():
                some.append(one_process(options, words, way, folder))
                print(way, some[-1], flush=True)
    never, rows = median(found["never"], "cpu_seconds"), []
    for way, some in found.items():
        rows.append(
            common_columns(options)
            | {"model": options.model.name, "lengths": options.lengths, "tokens": options.tokens, "share": options.share}
            | {"budget_bytes": budget, "steps": options.steps, "way": way, "trims": max(one.trims for one in some)}
            | {name: f"{median(some, name):.2f}" for name in ("cpu_seconds", "system_seconds", "step_seconds")}
            | {"peak_bytes": max(one.peak_bytes for one in some)}
            | {"times_never": f"{median(some, 'cpu_seconds') / never:.3f}"}
        )
    append(options.csv, rows, COLUMNS)


if __name__ == "__main__":
    main()
