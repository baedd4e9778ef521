"""Measures what the host's Python costs: processor time of a step on tiny tensors, for each call that a GPU would launch.

    python tools/bench_host.py --before OTHER_CHECKOUT [--rounds 5] [--steps 20]

A kernel on tiny tensors takes next to nothing, so the time of a step is that of Python, torch's dispatcher and the launch;
on a GPU it is what a launch-bound run waits for. The rule: both trees run the same step (a family's tiny model, end to end
with recomputation, two micro-batches of a few tokens, one thread) in processes of their own, in turns, so that a slower
minute meets both; what is compared is processor time, medians over rounds, as a ratio in one run. Calls are counted in a
step of their own by a dispatch mode: those that make or change numbers, no views.

It says nothing of a GPU's own time, and its seconds are this machine's. `OTHER_CHECKOUT` is a git worktree. Rows go to
tools/results/host.csv.
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
from datetime import UTC, datetime
from pathlib import Path

from bench_peers import append

from lopt_edge.doctor.check_machine import cpu_device
from lopt_edge.system.versions import versions

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tools" / "results" / "host.csv"
COLUMNS = (
    "date", "hardware", "threads", "versions", "commit", "family", "tree", "steps", "rounds", "calls", "step_seconds",
    "us_a_call", "times_before",
)  # fmt: skip
CHILD = """
import json, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from torch.utils._python_dispatch import TorchDispatchMode
from lopt_edge.models.folder import find_model
from lopt_edge.models.four_bit import quantise_model
from tests.laws.bench import make_bench, random_batch
from tools.tiny_models import make_folder
family, root, n_steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
made = root / "packed"
quantise_model(find_model(str(make_folder(root / "source", family, num_hidden_layers=4))), made)
bench = make_bench(made, method="e2e", num_segments=1, n_micro_batches=2)
batches = [random_batch(lengths) for lengths in ((11, 7), (9, 9))]
VIEWS = ("view", "_unsafe_view", "expand", "slice", "select", "t", "transpose", "permute", "unsqueeze", "squeeze",
         "split", "split_with_sizes", "unbind", "as_strided", "detach", "alias", "_reshape_alias", "empty", "empty_like",
         "new_empty", "empty_strided", "set_", "chunk")
class Calls(TorchDispatchMode):
    n = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func._schema.name.partition("::")[2] not in VIEWS
        return func(*args, **(kwargs or {}))
def run(step):
    bench.executor.run(bench.plan, batches, step=step, learning_rates={0: 1e-3})
for step in (1, 2, 3):
    run(step)
calls = Calls()
with calls:
    run(4)
begin = time.process_time()
for step in range(n_steps):
    run(5 + step)
print(json.dumps({"calls": calls.n, "seconds": (time.process_time() - begin) / n_steps}))
"""


def measured(tree: Path, family: str, n_steps: int) -> tuple[int, float]:
    """The calls of a step in a checkout, and its processor seconds. Raises SystemExit with what the child said."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory(prefix="lopt-edge-host-") as folder:
        words = [sys.executable, "-c", CHILD, family, folder, str(n_steps)]
        done = subprocess.run(words, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{tree}: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return int(found["calls"]), float(found["seconds"])


def compare(before: Path | None, family: str, *, n_rounds: int, n_steps: int) -> list[dict[str, object]]:
    """A row for each tree: `before` first, if there is one, then this one."""
    trees = {**({} if before is None else {"before": before}), "now": ROOT}
    commits = {name: commit_of(tree) for name, tree in trees.items()}
    found: dict[str, list[tuple[int, float]]] = {name: [] for name in trees}
    for _ in range(n_rounds):
        for name, tree in trees.items():
            found[name].append(measured(tree, family, n_steps))
    cpu, rows, first = cpu_device(), [], 0.0
    shared = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "hardware": f"{cpu.model}, {cpu.cores} cores",
        "threads": 1, "versions": ", ".join(f"{name} {found}" for name, found in versions().items()), "family": family,
        "steps": n_steps, "rounds": n_rounds,
    }  # fmt: skip
    for name in trees:
        calls, seconds = found[name][0][0], statistics.median(each for _, each in found[name])
        first = first or seconds
        rows.append({
            **shared, "commit": commits[name], "tree": name, "calls": calls, "step_seconds": round(seconds, 5),
            "us_a_call": round(1e6 * seconds / calls, 2), "times_before": round(seconds / first, 3),
        })  # fmt: skip
    return rows


def commit_of(tree: Path) -> str:
    """The short name of a checkout's commit."""
    words = ["git", "-C", str(tree), "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, help="another checkout (git worktree add) to compare with")
    parser.add_argument("--family", default="llama")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--csv", type=Path, default=RESULTS)
    given = parser.parse_args(words)
    rows = compare(given.before, given.family, n_rounds=given.rounds, n_steps=given.steps)
    append(given.csv, rows, COLUMNS)
    for row in rows:
        print(f"{row['tree']:>6}: {row['calls']} calls, {row['us_a_call']} us a call, {row['times_before']} of before")


if __name__ == "__main__":
    main()
