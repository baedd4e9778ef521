"""How honest the planner is: predicted against measured, over many runs, as raw rows (CSV) and histograms (SVG).

    python tools/validate_planner.py tensors --runs 260                   tracked tensor bytes of random settings (law 6)
    python tools/validate_planner.py process --model /tmp/q05 --runs 20   whole `finetune` processes under random budgets
    python tools/validate_planner.py process --device cuda --dtype bfloat16 --model /tmp/l8b --lengths 512,131072 --runs 40
    python tools/validate_planner.py show                                 the ratios of both files, and their histograms

`tensors` runs one step of a small random model in this process for each setting (timeline_settings.py) and
compares the peak and its op. `process` draws a model, a length, a method and a budget between the smallest and the
largest predicted peak, lets `finetune` plan and train under it, and compares peak (with what was predicted before the first
step, and as corrected after the second), page files and step seconds; the budget is kept by the system (RLIMIT_DATA, the
CUDA allocator's fraction), so a plan that fits by its figures alone fails its run. Ratios are predicted over measured: the
first over the whole process' peak, the corrected one over the peak until the last step (on a CPU with little memory it is
saving, which imports peft, that sets the process' peak). Every row is appended as soon as it is known, and a call goes on
with other draws (`--seed`).

What it does not do: seconds are only worth something on a machine that does nothing else, after `lopt-edge doctor
--measure`; on another one `--busy` leaves them out.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_memory_run import LAUNCH, Case, data_file, environment, error_text, finetune_arguments
from bench_peers import append, check_csv, commit, usable_cores, versions

from lopt_edge.pictures.svg import LEFT, RIGHT, axis_line, head, number, text, tick

RESULTS = Path(__file__).resolve().parent / "results"
TENSORS, PROCESS = RESULTS / "planner_tensors.csv", RESULTS / "planner_process.csv"
COMMON = ("versions", "commit")
TENSOR_COLUMNS = (
    *COMMON, "number", "setting", "family", "dtype", "method", "segments", "lengths", "knobs", "predicted_bytes",
    "measured_bytes", "ratio", "op_is_right",
)  # fmt: skip
PROCESS_COLUMNS = (
    *COMMON, "hardware", "profile", "model", "seq_len", "method", "dtype", "device", "least_bytes", "most_bytes",
    "budget_bytes", "knobs", "predicted_device_bytes", "slack_bytes", "peak_device_bytes", "ratio", "within_budget",
    "predicted_disk_bytes", "peak_disk_bytes", "predicted_seconds", "step_seconds", "seconds_ratio", "error", "steps",
    "corrected_device_bytes", "trained_peak_bytes", "corrected_ratio",
)  # fmt: skip
# What `finetune` itself would answer, with next to nothing and with all that is free.
BOUNDS = """
import json, sys
from lopt_edge.config.load import load_config
from lopt_edge.training.prepare.read import read_inputs
values = {name.replace("-", "_"): value for name, value in json.loads(sys.argv[1]).items()} | {"output": "never-written"}
least = {"device_memory": "1MB", "force": True}
found = [read_inputs(load_config(None, values | more))[0].run_plan for more in (least, {})]
print(json.dumps([*(one.peak_bytes["device"] for one in found), found[0].profile.partition(":")[0]]))
"""
LIBRARY_WAVERS = 8 << 20  # from process to process
MEASURED_SECONDS = ("step_seconds", "seconds_ratio")
Row = dict[str, Any]


def common() -> Row:
    return {"versions": ", ".join(versions()), "commit": commit()}


# tensors ---------------------------------------------------------------------------------------------------------------


def tensors(options: Namespace) -> None:
    import torch

    from tools.timeline_settings import compare, odd_setting, random_setting

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        for number_ in range(options.seed, options.seed + options.runs):
            kind = "odd" if number_ % 5 == 4 else "dropout" if number_ % 5 == 3 else "plain"
            setting = odd_setting(number_) if kind == "odd" else random_setting(number_, dropout=kind == "dropout")
            found = compare(setting, Path(root))
            row = common() | {
                "number": number_, "setting": kind, "family": setting.family, "dtype": str(setting.dtype)[6:],
                "method": setting.method, "segments": setting.num_segments, "lengths": setting.lengths,
                "knobs": setting.knobs.described(), "predicted_bytes": found.predicted.peak_bytes,
                "measured_bytes": found.peak, "ratio": f"{found.ratio:.6f}", "op_is_right": found.same_op,
            }  # fmt: skip
            append(options.csv, [row], TENSOR_COLUMNS)
            print(number_, kind, setting.family, row["ratio"], "" if found.same_op else "OTHER OP", flush=True)


# processes -------------------------------------------------------------------------------------------------------------


def process(options: Namespace) -> None:
    drawn = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="planner-") as scratch:
        for _ in range(options.runs):
            model, seq_len = drawn.choice(options.model), drawn.choice(options.lengths)
            method, share = drawn.choice(options.methods), drawn.choice([0.0, 1.0, *(drawn.random() for _ in range(6))])
            row = common() | one_process(options, Case(model, seq_len), method, share, Path(scratch))
            append(options.csv, [row], PROCESS_COLUMNS)
            shown = ("seq_len", "method", "budget_bytes", "peak_device_bytes", "ratio", "corrected_ratio", "seconds_ratio",
                     "error")  # fmt: skip
            print(model.name, *(row.get(name, "") for name in shown), flush=True)


def one_process(options: Namespace, case: Case, method: str, share: float, scratch: Path) -> Row:
    """The row of one run. Its budget is `share` of the way from the smallest to the largest predicted peak."""
    arguments = finetune_arguments(options, case, method, data_file(case, options, scratch))
    least, most, profile = bounds(arguments)
    budget = round(least + share * (most - least))
    row: Row = {
        "hardware": hardware(options), "profile": profile, "model": case.model.name, "seq_len": case.seq_len,
        "method": method, "dtype": options.dtype, "device": options.device, "least_bytes": least, "most_bytes": most,
        "budget_bytes": budget,
    }  # fmt: skip
    output = Path(tempfile.mkdtemp(dir=scratch)) / "output"
    command = [sys.executable, "-c", LAUNCH, *arguments, f"--device-memory={budget}B", f"--output={output}"]
    done = subprocess.run(command, env=environment(options), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        return row | {"within_budget": "no", "error": f"exit code {done.returncode}: {error_text(done.stderr)}"}
    found = row | figures(output, budget)
    return found | dict.fromkeys(MEASURED_SECONDS, "") if options.busy else found


def bounds(arguments: list[str]) -> tuple[int, int, str]:
    """The device bytes of the smallest and of the fastest plan, and the profile's name, in a process of the run's kind."""
    values = dict(word.removeprefix("--").split("=", 1) for word in arguments[1:])
    done = subprocess.run([sys.executable, "-c", BOUNDS, json.dumps(values)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the plan failed: {error_text(done.stderr)}")
    least, most, profile = json.loads(done.stdout)
    return least + LIBRARY_WAVERS, most, profile


def figures(output: Path, budget: int) -> Row:
    run = json.loads((output / "run.json").read_text())
    corrected = json.loads((output / "plan.json").read_text())["corrected_device_bytes"]
    predicted, peaks = run["predicted"], run["peaks"]
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    seconds = [line["step_seconds"] for line in lines if "loss" in line]
    typical = statistics.median(seconds[1:] or seconds)
    # CUDA's peak is the allocator's; the context, which the prediction contains, comes on top
    context = 0 if run["device"] == "cpu" else predicted["library_bytes"]
    measured = peaks["peak_device_bytes"] + context
    trained = max(line["peak_device_bytes"] for line in lines if "loss" in line) + context
    return {
        "knobs": next(reason for reason in run["reasons"] if reason.startswith("memory: "))[8:],
        "predicted_device_bytes": predicted["device_bytes"], "slack_bytes": predicted["slack_bytes"],
        "peak_device_bytes": measured,
        "ratio": f"{predicted['device_bytes'] / measured:.4f}", "within_budget": "yes" if measured <= budget else "no",
        "predicted_disk_bytes": predicted["disk_bytes"], "peak_disk_bytes": peaks["peak_disk_bytes"],
        "predicted_seconds": predicted["step_seconds"], "step_seconds": f"{typical:.3f}",
        "seconds_ratio": f"{predicted['step_seconds'] / typical:.3f}", "error": "", "steps": len(seconds),
        "corrected_device_bytes": corrected, "trained_peak_bytes": trained, "corrected_ratio": f"{corrected / trained:.4f}",
    }  # fmt: skip


def hardware(options: Namespace) -> str:
    from lopt_edge.doctor.check_machine import cpu_device

    if options.device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    return f"{cpu_device().model}, {options.threads} threads"


# figures of the files --------------------------------------------------------------------------------------------------


def show(options: Namespace) -> None:
    for path, column in ((TENSORS, "ratio"), (PROCESS, "ratio"), (PROCESS, "corrected_ratio"), (PROCESS, "seconds_ratio")):
        rows = list(csv.DictReader(path.open())) if path.exists() else []
        ratios = [float(row[column]) for row in rows if row.get(column)]  # older rows have no corrected one
        if not ratios:
            continue
        failed = sum(bool(row.get("error")) for row in rows)
        beyond = sum(row.get("within_budget") == "no" for row in rows)
        other = sum(row.get("op_is_right") == "False" for row in rows)
        middle = statistics.median(ratios)
        print(
            f"{path.name} {column}: {len(ratios)} runs, {min(ratios):.4f} to {max(ratios):.4f}, median {middle:.4f}; "
            f"failed {failed}, over the budget {beyond}, another op {other}"
        )
        picture = path.with_name(f"{path.stem}_{column}.svg")
        picture.write_text(histogram(ratios, title=f"{path.stem}: {column.replace('_', ' ')}, predicted / measured"))


def histogram(ratios: Sequence[float], *, title: str, n_bars: int = 40) -> str:
    """The histogram of ratios in bars of equal width, 1.0 marked."""
    low, high = min(0.99, *ratios), max(1.01, *ratios)
    width = (high - low) / n_bars
    counts = [0] * n_bars
    for ratio in ratios:
        counts[min(n_bars - 1, int((ratio - low) / width))] += 1
    return "\n".join(_bars(counts, low, high, title)) + "\n"


def _bars(counts: Sequence[int], low: float, high: float, title: str) -> Iterator[str]:
    top, bottom, tallest = 60.0, 300.0, max(counts)
    each = (RIGHT - LEFT) / len(counts)

    def x(ratio: float) -> float:
        return LEFT + (ratio - low) / (high - low) * (RIGHT - LEFT)

    yield from head(title, 350)
    for index, count in enumerate(counts):
        height = count / tallest * (bottom - top)
        if count:
            yield (
                f'<rect x="{number(LEFT + index * each)}" y="{number(bottom - height)}" width="{number(each - 1)}" '
                f'height="{number(height)}" fill="#0072b2"/>'
            )
    yield axis_line(bottom)
    place = f'x1="{number(x(1))}" x2="{number(x(1))}" y1="{top}" y2="{bottom}"'
    yield f'<line {place} stroke="#d55e00" stroke-dasharray="4 3"/>'
    for ratio in (low, 1.0, high):
        yield tick(x(ratio), bottom)
        yield text(x(ratio), bottom + 20, f"{ratio:.3g}", anchor="middle")
    yield text(LEFT - 8, top + 4, str(tallest), anchor="end")
    yield text(LEFT, bottom + 42, f"{sum(counts)} runs; the dashed line is 1")
    yield "</svg>"


def parse() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("tensors", help="tracked tensor bytes of random settings")
    two = commands.add_parser("process", help="whole processes under random budgets")
    for sub, path, seed in ((one, TENSORS, 0), (two, PROCESS, 1)):
        sub.add_argument("--runs", type=int, required=True, help="how many")
        sub.add_argument("--seed", type=int, default=seed, help="first setting, or seed of the draws")
        sub.add_argument("--csv", type=Path, default=path, help=f"file to append to (default: {path.name})")
    two.add_argument("--model", type=Path, action="append", required=True, help="model folder; repeatable")
    two.add_argument("--lengths", type=_numbers, default=[64, 128, 256, 512, 1024], help="comma-separated")
    two.add_argument("--methods", type=lambda words: words.split(","), default=["e2e", "lopt"])
    two.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    two.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    two.add_argument("--steps", type=int, default=2)
    two.add_argument("--busy", action="store_true", help="leave out measured seconds: others use this machine")
    two.add_argument("--threads", type=int, default=usable_cores())
    two.add_argument("--cache-dir", type=Path, help="of quantised copies")
    two.add_argument("--page-dir", type=Path)
    two.set_defaults(lr=1e-4, lora_r=16)
    commands.add_parser("show", help="figures and histograms")
    return parser.parse_args()


def _numbers(words: str) -> list[int]:
    return [int(word) for word in words.split(",")]


def main() -> None:
    options = parse()
    if options.command != "show":
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        check_csv(options.csv, TENSOR_COLUMNS if options.command == "tensors" else PROCESS_COLUMNS)
    {"tensors": tensors, "process": process, "show": show}[options.command](options)


if __name__ == "__main__":
    main()
