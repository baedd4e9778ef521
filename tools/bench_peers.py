"""Measures lopt-edge beside transformers + peft + bitsandbytes QLoRA, and appends what it saw to a CSV.

    python tools/make_model.py --shape qwen2.5-0.5b --output /tmp/model
    python tools/bench_peers.py --model /tmp/model --seq-len 512 --steps 5 --repeats 3

The rule: every number comes from a process of its own that runs alone, so that a peak is one method's and nothing is warm
from another's. A process is this script again (`--child METHOD --result FILE`); what it does is in bench_child.py. All of
them see the same random token ids (a function of the step alone, every token supervised), one sequence a step, the same
LoRA shape on all linear layers, the same learning rate, fused AdamW, clipping at 1.0, fp32 adapters. B starts at zero, so
the first losses must agree.

Ours runs the package's own code on its 4-bit copy, which is made once, in a process whose row is called `quantise`.
The baseline is what a careful user writes: NF4 with double quantisation from the full-precision folder, the compute
dtype given explicitly, SDPA, gradient checkpointing without re-entry, no cache. In bfloat16 it runs under autocast, as
transformers' Trainer does (else peft would multiply its adapters in fp32).

Columns: `step_seconds` is the median without the first step (on CUDA the device is waited for); `import_seconds` count
from the process' start to the beginning of loading; `load_` columns end before the first step; peaks hold for the whole
life of the process, device bytes are what torch reserved on CUDA and the resident set on a CPU. The `_ratio` columns
divide by the baseline of the same repeat. Neither side loads a tokenizer or data. Seconds are only worth something on a
machine that does nothing else.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

from bench_child import Row, run_child

from lopt_edge.errors import LoptError

OURS = ("e2e", "lopt", "frozen")
METHODS = (*OURS, "peers")
PACKAGES = ("lopt-edge", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors")
N_LOSSES = 5  # losses kept of the first steps
COLUMNS = (
    "date", "hardware", "threads", "versions", "commit", "model", "shape", "method", "repeat", "device", "dtype",
    "lora_r", "seq_len", "batch_size", "steps", "step_seconds", "first_step_seconds", "tokens_per_second",
    "peak_rss_bytes", "peak_device_bytes", "import_seconds", "load_seconds", "load_peak_rss_bytes",
    "load_peak_device_bytes", "losses", "step_ratio", "rss_ratio", "device_ratio", "error",
)  # fmt: skip


# --- the parent: one process after the other, rows, table -------------------------------------------------------------


def measure(options: argparse.Namespace, arguments: list[str], *, method: str, folder: Path) -> Row:
    """Run one child and return what it measured, or an `error`."""
    result, started = folder / "result.json", time.perf_counter()
    result.unlink(missing_ok=True)
    command = [sys.executable, __file__, *arguments, "--child", method, "--result", str(result)]
    command += ["--cache-dir", str(options.cache_dir), "--threads", str(options.threads)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(options.threads),
        "HF_HUB_OFFLINE": "1",
        "OMP_WAIT_POLICY": "passive",  # as our command line sets it; for all alike
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    print(f"{method}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    if done.returncode == 0:
        return json.loads(result.read_text())
    print(done.stderr[-4000:], file=sys.stderr)
    named = [line for line in done.stderr.splitlines() if re.match(r"[\w.]+(Error|Exception)\b", line)]
    return {"error": f"exit code {done.returncode}: {named[-1][:300] if named else 'no message'}"}


def rows_of_repeat(options: argparse.Namespace, arguments: list[str], common: Row, folder: Path) -> list[Row]:
    """The rows of every method, run once, with their ratios to the baseline."""
    rows = []
    for method in options.methods:
        rows.append(as_row(measure(options, arguments, method=method, folder=folder), {**common, "method": method}))
    baseline = next((row for row in rows if row["method"] == "peers" and not row.get("error")), None)
    pairs = (("step_ratio", "step_seconds"), ("rss_ratio", "peak_rss_bytes"), ("device_ratio", "peak_device_bytes"))
    for row in rows:
        if baseline and not row.get("error"):
            row |= {ratio: round(row[column] / baseline[column], 4) for ratio, column in pairs}
    return rows


def as_row(measured: Row, common: Row) -> Row:
    """The row of a measured process: medians and speeds from its steps."""
    seconds, losses = measured.pop("seconds", []), measured.pop("losses", [])
    gpu = measured.pop("gpu", None)
    row = {**common, **measured, "hardware": f"{gpu}; {common['hardware']}" if gpu else common["hardware"]}
    if seconds:
        typical = median(seconds[1:])
        row |= {
            "step_seconds": typical,
            "first_step_seconds": seconds[0],
            "tokens_per_second": common["batch_size"] * common["seq_len"] / typical,
        }
        row["losses"] = " ".join(f"{loss:.6f}" for loss in losses[:N_LOSSES])
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}


def common_columns(options: argparse.Namespace) -> Row:
    """The columns that all rows of this call share."""
    from lopt_edge.doctor.check_machine import cpu_device
    from lopt_edge.models.folder import find_model

    facts, cpu = find_model(str(options.model)).facts, cpu_device()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": f"{cpu.model}, {cpu.cores} cores, {' '.join(cpu.features)}",
        "threads": options.threads,
        "versions": ", ".join([f"python {sys.version.split()[0]}", *versions()]),
        "commit": commit(),
        "model": options.model.resolve().name,
        "shape": f"{facts.model_type} {facts.n_layers} x {facts.hidden_size}/{facts.intermediate_size}, "
        f"vocabulary {facts.vocab_size}",
        "device": options.device,
        "dtype": options.dtype,
        "lora_r": options.lora_r,
        "seq_len": options.seq_len,
        "batch_size": getattr(options, "batch_size", 1),
        "steps": options.steps,
    }


def versions() -> Iterator[str]:
    """The versions of the packages that matter here, as `name version`."""
    for package in PACKAGES:
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            yield f"{package} missing"


def commit() -> str:
    """The working tree's commit, with a + when it was changed; empty where there is no git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def check_dtype(options: argparse.Namespace) -> None:
    """Refuse a dtype that the baseline would not compute in: it takes the one that a 4-bit folder records, whatever it is
    asked for."""
    quantised = json.loads((options.model / "config.json").read_text()).get("quantization_config") or {}
    recorded = str(quantised.get("bnb_4bit_compute_dtype", options.dtype)).removeprefix("torch.")
    if "peers" in options.methods and recorded != options.dtype:
        sys.exit(
            f"{options.model} is in 4 bits already and makes the baseline compute in {recorded}: run with --dtype "
            f"{recorded}, or give the full-precision folder"
        )


def check_csv(path: Path, columns: tuple[str, ...] = COLUMNS) -> None:
    """Refuse a file with other columns: it is never appended to."""
    if path.exists() and path.stat().st_size:
        with path.open(newline="", encoding="utf-8") as file:
            if tuple(next(csv.reader(file))) != columns:
                sys.exit(f"{path} has other columns than this version writes: move it away, or name another with --csv")


def append(path: Path, rows: list[Row], columns: tuple[str, ...] = COLUMNS) -> None:
    """Append rows to a CSV, with the heading where it is new; keys that are no columns are left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n", extrasaction="ignore")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)


def show(rows: list[Row]) -> None:
    """Print a table with a line per method: medians over the repeats."""
    from rich.console import Console
    from rich.table import Table

    heads = ("method", "step s", "/peers", "tokens/s", "peak RSS MiB", "/peers", "device MiB", "/peers", "load s",
             "load RSS MiB", "first loss")  # fmt: skip
    table = Table(*heads, box=None)
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method and not row.get("error")]
        if not mine:
            table.add_row(method, "failed")
            continue
        columns = (("step_seconds", 1), ("step_ratio", 1), ("tokens_per_second", 1), ("peak_rss_bytes", 1 << 20),
                   ("rss_ratio", 1), ("peak_device_bytes", 1 << 20), ("device_ratio", 1), ("load_seconds", 1),
                   ("load_peak_rss_bytes", 1 << 20))  # fmt: skip
        values = [[row[column] / unit for row in mine if column in row] for column, unit in columns]
        texts = [f"{median(found):.2f}" if found else "" for found in values]
        table.add_row(method, *texts, mine[0].get("losses", "").split(" ")[0])
    Console(width=140).print(table)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="a full-precision model folder, e.g. of make_model.py")
    parser.add_argument("--seq-len", required=True, type=int, help="tokens of a sequence")
    parser.add_argument("--batch-size", type=int, default=1, help="sequences of a step")
    parser.add_argument("--activations", choices=("keep", "recompute"), default="recompute", help="of our methods")
    parser.add_argument("--steps", required=True, type=int, help="steps of a process; the first is not in the median")
    parser.add_argument("--methods", default=",".join(METHODS), help="which, in which order (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=1, help="run all methods this often, in turn")
    parser.add_argument("--lora-r", type=int, default=16, help="LoRA rank (default: %(default)s); alpha is twice that")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="compute dtype")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="CPU threads a process (default: %(default)s)")
    parser.add_argument("--memory-fraction", type=float, help="share of the GPU's memory that a process may take")
    parser.add_argument("--csv", type=Path, default=Path(__file__).parent / "results" / "peers.csv", help="appended to")
    parser.add_argument("--cache-dir", type=Path, help="where our 4-bit copy lies (default: made anew, then deleted)")
    parser.add_argument("--child", choices=("quantise", *METHODS), help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.methods = [method for method in options.methods.split(",") if method]
    unknown = sorted(set(options.methods) - set(METHODS))
    if unknown or not options.methods:
        parser.error(f"--methods knows {', '.join(METHODS)}, not {', '.join(unknown) or 'nothing'}")
    for name, least in (("seq_len", 2), ("steps", 2), ("repeats", 1), ("lora_r", 1), ("threads", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    return options


def usable_cores() -> int:
    """The number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_parent(options: argparse.Namespace, arguments: list[str]) -> list[Row]:
    """The rows of all processes, run in turn; a repeat's rows are appended as soon as it is done."""
    common = common_columns(options)
    check_dtype(options)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="bench-peers-") as scratch:
        options.cache_dir = options.cache_dir or Path(scratch) / "cache"
        if set(options.methods) & set(OURS):
            measured = measure(options, arguments, method="quantise", folder=Path(scratch))
            if measured:
                rows.append(as_row(measured, {**common, "method": "quantise"}))
                append(options.csv, rows)
            if measured.get("error"):
                options.methods = [method for method in options.methods if method not in OURS]
        for repeat in range(1, options.repeats + 1):
            new = rows_of_repeat(options, arguments, {**common, "repeat": repeat}, Path(scratch))
            append(options.csv, new)
            rows += new
    return rows


def main() -> None:
    arguments = sys.argv[1:]
    options = parse(arguments)
    if options.child:
        options.result.write_text(json.dumps(run_child(options)))
        return
    check_csv(options.csv)
    try:
        rows = run_parent(options, arguments)
    except LoptError as error:
        sys.exit(str(error))
    show(rows)
    print(f"{len(rows)} rows appended to {options.csv}")
    if any(row.get("error") for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
