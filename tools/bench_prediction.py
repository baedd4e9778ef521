"""How near the predicted memory of a CPU run is to what its whole process takes, over many runs: raw rows and histograms.

    python tools/bench_prediction.py run --model /tmp/q05 --lengths fixed,uniform,code --tokens 32,256 --shares 0,1
    python tools/bench_prediction.py run --model /tmp/q05 --tokens 512 --budget 560MiB    one stated budget
    python tools/bench_prediction.py show                                                 the ratios, and their histograms

`run` makes every combination that its lists name, each as one `lopt-edge finetune` in a process of its own, and appends a
row as soon as it is known. Budgets are shares of the way from the smallest predicted peak that the planner finds (0) to
that of its fastest plan (1); the system holds them, so a plan that fits by its figures alone fails its run. Lengths:
`fixed` (every sequence has `tokens`), `uniform` (an eighth of it to all of it), `code` (functions of Python's library as
they are, cut at `tokens`: the long tail of real data). Budgets are asked for in a process of the run's kind.

Measured is the kernel's count of the resident set (VmHWM, of the whole process, saving included), and its value until the
last step, with which `corrected` is compared. It does not matter that a machine is busy: no seconds are compared, and
`cpu_seconds` (user and system, of the process) are only there to show what a change costs.

validate_planner.py draws settings by chance and looks at seconds, too; the tensors of one step are its `tensors`.
"""

from __future__ import annotations

import argparse
import ast
import csv
import json
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_child import Row
from bench_memory_run import LAUNCH, environment, error_text
from bench_peers import append, check_csv, commit, usable_cores, versions
from validate_planner import BOUNDS, LIBRARY_WAVERS, histogram

from lopt_edge.units import parse_bytes

RESULTS = Path(__file__).resolve().parent / "results" / "prediction.csv"
COLUMNS = (
    "versions", "commit", "hardware", "model", "method", "lengths", "tokens", "batch_size", "steps", "flags", "share",
    "budget_bytes", "knobs", "library_bytes", "slack_bytes", "predicted_bytes", "corrected_bytes", "peak_bytes",
    "trained_peak_bytes", "step_peaks_mib", "step_tokens", "ratio", "corrected_ratio", "within_budget", "cpu_seconds",
    "error",
)  # fmt: skip
LENGTHS = ("fixed", "uniform", "code")
SHOWN = ("model", "lengths", "tokens", "share", "budget_bytes", "predicted_bytes", "corrected_bytes", "peak_bytes",
         "step_peaks_mib", "ratio", "corrected_ratio", "cpu_seconds", "error")  # fmt: skip
RATIOS = ("ratio", "corrected_ratio")
N_ROWS = 64  # of a data file
LEAST_SHARE = 8  # of uniform lengths: an eighth


@dataclass(frozen=True)
class Case:
    """One process to run: a model, a data file's kind of lengths, the longest sequence, and a share of the way from the
    smallest budget to the largest (None: the budget is stated)."""

    model: Path
    method: str
    lengths: str
    tokens: int
    share: float | None


# data --------------------------------------------------------------------------------------------------------------------


def data_file(lengths: str, tokens: int, folder: Path) -> Path:
    """A file of prompts and completions with such lengths; a word has four tokens of the little tokenizer, about."""
    path = folder / f"{lengths}-{tokens}.jsonl"
    if not path.exists():
        rows = _code(tokens) if lengths == "code" else _words(lengths, tokens)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _words(lengths: str, tokens: int) -> Iterator[dict[str, str]]:
    drawn = random.Random(f"{lengths} {tokens}")
    words = ["".join(drawn.choices("abcdefghijklmnopqrstuvwxyz", k=drawn.randint(2, 9))) for _ in range(5000)]
    for _ in range(N_ROWS):
        share = 1.0 if lengths == "fixed" else drawn.uniform(1 / LEAST_SHARE, 1.0) / 4
        yield {"prompt": "Words:", "completion": " " + " ".join(drawn.choices(words, k=max(1, round(share * tokens))))}


def _code(tokens: int) -> Iterator[dict[str, str]]:
    """Functions of Python's library with at least a line of body; one is longer than `tokens`, so it sets the peak."""
    rows = random.Random(tokens).sample(_functions(), N_ROWS)
    yield from rows
    if max(len(row["completion"]) for row in rows) < 4 * tokens:
        yield {"prompt": "def all():\n", "completion": "\n".join(row["completion"] for row in rows)[: 8 * tokens]}


@lru_cache
def _functions() -> list[dict[str, str]]:
    """The functions of more than one line in every third file. Each file's lines are split once:
    `ast.get_source_segment` would split all of them again for each function, 20 s in all."""
    found = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[::3]:
        text = path.read_text(encoding="utf-8", errors="ignore")
        lines = [line.encode() for line in text.split("\n")]  # columns are counted in bytes
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno > node.lineno:
                first, *middle, last = lines[node.lineno - 1 : node.end_lineno]
                body = b"\n".join([*middle, last[: node.end_col_offset]]).decode()
                found.append({"prompt": f"{first[node.col_offset :].decode()}\n", "completion": body})
    return found


# one process -------------------------------------------------------------------------------------------------------------


def words_of(options: Namespace, case: Case, data: Path) -> list[str]:
    """The words of the command line, the budget and the output aside."""
    values = {
        "model": case.model, "data": data, "method": case.method, "max-seq-len": case.tokens, "max-steps": options.steps,
        "batch-size": options.batch_size, "grad-accum": options.grad_accum, "lora-r": options.lora_r, "device": "cpu",
        "compute-dtype": "float32",
    }  # fmt: skip
    return ["finetune", *(f"--{name}={value}" for name, value in values.items()), *options.flag]


@lru_cache
def bounds(words: tuple[str, ...]) -> tuple[int, int]:
    """The device bytes of the smallest and of the fastest plan, as `finetune` would find them."""
    values = dict(word.removeprefix("--").split("=", 1) for word in words[1:])
    done = subprocess.run([sys.executable, "-c", BOUNDS, json.dumps(values)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the plan failed: {error_text(done.stderr)}")
    least, most, _ = json.loads(done.stdout)
    return least + LIBRARY_WAVERS, most


def one_process(options: Namespace, case: Case, folder: Path) -> Row:
    words = words_of(options, case, data_file(case.lengths, case.tokens, folder))
    if case.share is None:
        budget = parse_bytes(options.budget, free_bytes=None, where="--budget")
    else:
        least, most = bounds(tuple(words))
        budget = round(least + case.share * (most - least))
    row: Row = {
        "model": case.model.name, "method": case.method, "lengths": case.lengths, "tokens": case.tokens,
        "batch_size": options.batch_size, "steps": options.steps, "flags": " ".join(options.flag), "share": case.share,
        "budget_bytes": budget,
    }  # fmt: skip
    output = Path(tempfile.mkdtemp(dir=folder)) / "output"
    command = [sys.executable, "-c", LAUNCH, *words, f"--device-memory={budget}B", f"--output={output}"]
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(command, env=environment(options), stdout=subprocess.DEVNULL, stderr=errors)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        text = errors.read()
    row["cpu_seconds"] = f"{used.ru_utime + used.ru_stime:.1f}"
    if child.returncode:
        return row | {"within_budget": "no", "error": f"exit code {child.returncode}: {error_text(text)}"}
    return row | figures(output, budget) | {"error": ""}


def figures(output: Path, budget: int) -> Row:
    """The figures of a finished run's own files."""
    run = json.loads((output / "run.json").read_text())
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in steps if "loss" in line]
    predicted, peak = run["predicted"], run["peaks"]["peak_rss_bytes"]
    trained = max(line["peak_rss_bytes"] for line in steps)
    corrected = predicted["corrected_device_bytes"]
    return {
        "knobs": next(reason for reason in run["reasons"] if reason.startswith("memory: "))[8:].partition(" (the best")[0],
        "library_bytes": predicted["library_bytes"], "slack_bytes": predicted["slack_bytes"],
        "predicted_bytes": predicted["device_bytes"], "corrected_bytes": corrected, "peak_bytes": peak,
        "trained_peak_bytes": trained,
        "step_peaks_mib": " ".join(str(line["peak_rss_bytes"] >> 20) for line in steps),
        "step_tokens": " ".join(str(line["tokens"]) for line in steps),
        "ratio": f"{predicted['device_bytes'] / peak:.4f}", "corrected_ratio": f"{corrected / peak:.4f}",
        "within_budget": "yes" if peak <= budget else "no",
    }  # fmt: skip


def run(options: Namespace) -> None:
    from lopt_edge.doctor.check_machine import cpu_device

    check_csv(options.csv, COLUMNS)
    common = {"versions": ", ".join(versions()), "commit": commit(),
              "hardware": f"{cpu_device().model}, {options.threads} threads"}  # fmt: skip
    shares = [None] if options.budget else options.shares
    with tempfile.TemporaryDirectory(prefix="prediction-") as folder:
        for model, method, lengths, tokens, share in product(
            options.model, options.methods, options.lengths, options.tokens, shares
        ):
            row = common | one_process(options, Case(model, method, lengths, tokens, share), Path(folder))
            append(options.csv, [row], COLUMNS)
            print(*(_short(name, row.get(name, "")) for name in SHOWN), flush=True)


def _short(name: str, value: object) -> str:
    return f"{name.split('_')[0]} {value >> 20}" if name.endswith("_bytes") and isinstance(value, int) else str(value)


# the file's figures ------------------------------------------------------------------------------------------------------


def show(options: Namespace) -> None:
    """The least, middle and greatest ratio of all rows and of each model, and the histograms beside the file."""
    rows = list(csv.DictReader(options.csv.open()))
    named = {"all": rows} | {name: [row for row in rows if row["model"] == name] for name in _models(rows)}
    for column in RATIOS:
        for name, some in named.items():
            ratios = [float(row[column]) for row in some if row[column]]
            if ratios:
                print(
                    f"{column:16s} {name:16s} {len(ratios):3d} runs, {min(ratios):.3f} to {max(ratios):.3f}, median "
                    f"{statistics.median(ratios):.3f}; failed {sum(bool(row['error']) for row in some)}, over the budget "
                    f"{sum(row['within_budget'] == 'no' for row in some)}"
                )
        ratios = [float(row[column]) for row in rows if row[column]]
        title = f"{options.csv.stem}: {column.replace('_', ' ')}, predicted / measured"
        options.csv.with_name(f"{options.csv.stem}_{column}.svg").write_text(histogram(ratios, title=title))


def _models(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["model"] for row in rows))


def parse() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="whole processes")
    two = commands.add_parser("show", help="figures and histograms")
    for sub in (one, two):
        sub.add_argument("--csv", type=Path, default=RESULTS, help=f"the file of rows (default: {RESULTS.name})")
    one.add_argument("--model", type=Path, action="append", required=True, help="model folder; repeatable")
    one.add_argument("--methods", type=_words_of_list, default=["e2e"])
    one.add_argument("--lengths", type=_words_of_list, default=list(LENGTHS), help=", ".join(LENGTHS))
    one.add_argument("--tokens", type=lambda text: [int(word) for word in text.split(",")], default=[32, 256])
    one.add_argument("--shares", type=lambda text: [float(word) for word in text.split(",")], default=[0.0, 1.0])
    one.add_argument("--budget", help="a stated budget instead of shares")
    one.add_argument("--flag", action="append", default=[], help="a further word, as --flag=--apply=layer")
    one.add_argument("--steps", type=int, default=8)
    one.add_argument("--batch-size", type=int, default=1)
    one.add_argument("--grad-accum", type=int, default=1)
    one.add_argument("--lora-r", type=int, default=16)
    one.add_argument("--threads", type=int, default=usable_cores())
    return parser.parse_args()


def _words_of_list(text: str) -> list[str]:
    return text.split(",")


def main() -> None:
    options = parse()
    {"run": run, "show": show}[options.command](options)


if __name__ == "__main__":
    main()
