"""The study of docs/methods.md: every method on two tasks, through `lopt-edge compare`, with the tables in tools/results.

    python tools/study.py --output /tmp/study            # all of it: about 340 runs, 90 minutes on two cores
    python tools/study.py --output /tmp/study --only e2e,frozen
    python tools/study.py --tables                       # those of docs/methods.md, from tools/results

The rule: each variant's learning rate is tuned on one seed's validation split (three points that bracket the optimum of e2e
and of frozen at rank 8), the numbers are those of three seeds on a test split that nothing was chosen by. The second part
is rank 64, and a boundary at three quarters of the depth. Finished runs are not run again.

Losses do not depend on what else the machine does; seconds do, so step times are measured by tools/bench_methods.py. The
model is the embedded one (3.6M parameters, 8 layers); what it says about 8B is a guess.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tools" / "results"
GRID, SEEDS = "1e-3,3e-3,1e-2", "0,1,2"
TASKS = {"narrow": ["--exact-match", "120"], "broad": []}
METHODS = (
    "e2e", "frozen", "lopt:lr_local=1x", "lopt:lr_local=0.1x", "lopt:lr_local=0.01x", "lcsb", "segprop", "let",
    "let-local:lr_local=0.1x", "mlaan", "repl", "lopt:local_every=0:open_every=4", "lopt:local_every=0:open_every=2",
    "top-layers:train_layers=2", "lopt:open_every=4:lr_local=0.01x", "lopt:local_every=4:lr_local=0.1x",
    "lopt:local_loss=next-token:lr_local=0.1x", "lopt:local_loss=align:lr_local=0.1x",
    "lopt:boundary_update=fresh:lr_local=0.1x", "lcsb:select_ratio=0.25", "lcsb:unselected=rest", "lcsb:selection=uniform",
    "lopt:boundary=auto",
)  # fmt: skip
MORE = (  # alpha / r as at rank 8
    "e2e:r=64:lora_alpha=256", "lopt:r=64:lora_alpha=256:lr_local=0.01x", "frozen:r=64:lora_alpha=256",
    "lopt:local_every=0:open_every=4:r=64:lora_alpha=256", "lopt:boundary_layers=6:lr_local=0.01x",
    "frozen:boundary_layers=6",
)  # fmt: skip
LAUNCH = "from lopt_edge.cli.main import main; main()"


def compare(task: str, name: str, methods: tuple[str, ...], options: argparse.Namespace) -> int:
    """Run one table's comparison, and return its exit code."""
    output = options.output / name
    command = [sys.executable, "-c", LAUNCH, "compare", f"examples/study/{task}.yaml", "--methods", ",".join(methods),
               "--seeds", SEEDS, "--lr-grid", GRID, "--test-data", f"examples/study/{task}-test.jsonl",
               "--output", str(output), "--jobs", str(options.jobs), *TASKS[task]]  # fmt: skip
    wanted = [method for method in methods if not options.only or method in options.only]
    if not wanted:
        return 0
    command += ["--only", ",".join(wanted)] if options.only else []
    done = subprocess.run(command, cwd=ROOT)
    for form in ("md", "csv"):
        if (output / f"compare.{form}").exists():
            shutil.copyfile(output / f"compare.{form}", RESULTS / f"study-{name}.{form}")
    return done.returncode


def tables() -> str:
    """The two tables of docs/methods.md. A test compares."""
    head = ("variant", "narrow: loss", "exact", "forgetting", "broad: loss", "forgetting", "lr")
    return "\n".join(
        "\n".join(_line(cells) for cells in (head, ("---", *["---:"] * 6), *_rows(part))) + "\n" for part in ("", "-more")
    )


def _rows(part: str) -> list[tuple[str, ...]]:
    narrow, broad = (_figures(f"{task}{part}") for task in TASKS)
    found = []
    for name, one in narrow.items():
        other = broad[name]
        rates = dict.fromkeys(f"{float(figures['lr']):g}" for figures in (one, other))
        exact = f"{100 * float(one['exact_match']):.0f} ± {100 * float(one['exact_match_std']):.0f}%"
        found.append(
            (
                f"`{name}`",
                _spread(one, "eval_loss"),
                exact,
                _spread(one, "forgetting"),
                _spread(other, "eval_loss"),
                _spread(other, "forgetting"),
                " / ".join(rates),
            )
        )
    return found


def _figures(name: str) -> dict[str, dict[str, str]]:
    with (RESULTS / f"study-{name}.csv").open(newline="", encoding="utf-8") as file:
        return {row["variant"]: row for row in csv.DictReader(file)}


def _spread(figures: dict[str, str], name: str) -> str:
    return f"{float(figures[name]):.3f} ± {float(figures[f'{name}_std']):.3f}"


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder of the runs")
    parser.add_argument("--tables", action="store_true", help="print the tables of docs/methods.md and stop")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, each with its share of the cores")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], help="variants whose cells are filled")
    options = parser.parse_args()
    if options.tables:
        print(tables(), end="")
        return
    if options.output is None:
        parser.error("--output is needed")
    codes = [compare(task, task, METHODS, options) for task in TASKS]
    codes += [compare(task, f"{task}-more", MORE, options) for task in TASKS]
    sys.exit(max(codes))


if __name__ == "__main__":
    main()
