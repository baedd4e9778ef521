"""Measures what sharing each step among ranks gains: tokens a second of 2 processes, a core each, against 1; into a CSV.

    python tools/make_model.py --shape qwen2.5-0.5b --output /tmp/model
    python tools/bench_parallel.py --model /tmp/model --repeats 3

The rule: all variants of a repeat do the same steps on the same rows, one after another, each as a whole `lopt-edge
finetune` in processes of its own; `ratio` is the seconds of the one process with one core in the same repeat over the
variant's. One process with all cores stands beside it: that is what the ranks must beat. Seconds are means over the steps
without the first, which warms up; peaks are the largest rank's. What all ranks take together on one machine is about that
many times as much. What the plan says of each variant stands beside: the seconds of a step, and the peak of a process.

It does not measure several GPUs unless run on them (`--device cuda --ranks 2`), nor a network. Seconds are only worth
something on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, median

from bench_child import Row
from bench_methods import LAUNCH, data_file
from bench_peers import append, check_csv, common_columns, usable_cores

N_STEPS = 4  # of a run; the first is left out
COLUMNS = ("date", "hardware", "threads", "versions", "commit", "model", "shape", "device", "dtype", "lora_r", "seq_len",
           "variant", "ranks", "repeat", "micro_batches", "step_seconds", "predicted_seconds", "tokens_per_second", "ratio",
           "peak_rss_bytes", "peak_device_bytes", "predicted_device_bytes", "same_adapter", "error")  # fmt: skip


def variants(options: argparse.Namespace) -> list[tuple[str, int, int]]:
    """The (name, number of ranks, threads of each): a core each, and one process with all of them."""
    n = options.ranks
    return [("1 process, 1 core", 1, 1), (f"1 process, {n} cores", 1, n), (f"{n} ranks, a core each", n, 1)]


def run_variant(options: argparse.Namespace, ranks: int, threads: int, output: Path) -> Row:
    """The figures of one run."""
    values = {
        "model": options.model, "data": data_file(options, options.scratch, sparse=False), "output": output,
        "max-seq-len": options.seq_len, "max-steps": options.n_steps, "batch-size": 1, "grad-accum": options.micro_batches,
        "epochs": 1000, "schedule": "constant", "warmup-ratio": 0, "lora-r": options.lora_r, "device": options.device,
        "compute-dtype": options.dtype, "cache-dir": options.cache_dir, "save-minutes": 0, "ranks": ranks,
    }  # fmt: skip
    arguments = ["finetune", "--no-packing", *(f"--{name}={value}" for name, value in values.items())]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", LAUNCH, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip()[-300:]}
    run, planned = (json.loads((output / name).read_text()) for name in ("run.json", "plan.json"))
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line][1:]
    seconds = mean(line["step_seconds"] for line in steps)
    return {
        "step_seconds": seconds,
        "tokens_per_second": round(mean(line["tokens"] for line in steps) / seconds, 1),
        "predicted_seconds": planned["plan"]["step_seconds"],
        "predicted_device_bytes": planned["plan"]["peak_bytes"]["device"],
        **{name: run["peaks"][name] for name in ("peak_rss_bytes", "peak_device_bytes")},
        "error": "",
    }


def run_all(options: argparse.Namespace) -> list[Row]:
    common, rows = common_columns(options), []
    for repeat in range(1, options.repeats + 1):
        seconds, first = 0.0, b""
        for name, ranks, threads in variants(options):
            output = options.scratch / f"{repeat}-{ranks}-{threads}"
            row = {**common, "threads": threads, "variant": name, "ranks": ranks, "repeat": repeat,
                   "micro_batches": options.micro_batches, **run_variant(options, ranks, threads, output)}  # fmt: skip
            if not row["error"]:
                adapter = (output / "adapter_model.safetensors").read_bytes()
                seconds, first = seconds or row["step_seconds"], first or adapter
                row["ratio"], row["same_adapter"] = round(seconds / row["step_seconds"], 3), adapter == first
                row["step_seconds"] = round(row["step_seconds"], 4)
            append(options.csv, [row], COLUMNS)
            rows.append(row)
            print(f"{repeat} {name}: {row.get('step_seconds', row['error'])} s, {row.get('ratio', '')}", flush=True)
    return rows


def show(options: argparse.Namespace, rows: list[Row]) -> None:
    """Print the medians over the repeats."""
    print(f"{'variant':24s} {'s a step':>9s} {'planned':>9s} {'tokens/s':>9s} {'x one core':>10s} {'peak MiB':>9s} planned")
    for name, _, _ in variants(options):
        if found := [row for row in rows if row["variant"] == name and not row["error"]]:
            names = (
                "step_seconds",
                "predicted_seconds",
                "tokens_per_second",
                "ratio",
                "peak_rss_bytes",
                "predicted_device_bytes",
            )
            step, told, speed, ratio, *peaks = (median(row[column] for row in found) for column in names)
            peak, most = (n_bytes / 2**20 for n_bytes in peaks)
            print(f"{name:24s} {step:9.3f} {told:9.3f} {speed:9.1f} {ratio:10.2f} {peak:9.0f} {most:7.0f}")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model folder with a tokenizer")
    parser.add_argument("--ranks", type=int, default=usable_cores())
    parser.add_argument("--micro-batches", type=int, default=4, help="of a step, over all ranks")
    parser.add_argument("--n-steps", type=int, default=N_STEPS)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--lora-r", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--cache-dir", type=Path, default=Path(tempfile.gettempdir()) / "lopt-edge-bench")
    parser.add_argument("--csv", type=Path, default=Path(__file__).parent / "results" / "parallel.csv")
    options = parser.parse_args(arguments)
    options.steps, options.threads = 0, 1
    return options


def main() -> None:
    options = parse(sys.argv[1:])
    check_csv(options.csv, COLUMNS)
    with tempfile.TemporaryDirectory(prefix="bench-parallel-") as scratch:
        options.scratch = Path(scratch)
        show(options, run_all(options))


if __name__ == "__main__":
    main()
