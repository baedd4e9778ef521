"""One measured run of the real command line: what bench_memory.py repeats, and validate_planner.py too.

The rule: a run is a process of its own with a data file of its own, and its figures are those of its whole life. Its peak
comes twice: from `/usr/bin/time -v`, where that exists, and from the run's own run.json. Every row of the data file is
longer than `seq_len`, so that each step has exactly that many tokens; a run whose steps have others gets an `error`.

What it does not do: it compares nothing and writes no CSV.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench_child import CLIP, SEED, Row

TIME = Path("/usr/bin/time")  # GNU time; its -v tells the peak
# The console script's content; with a cap, CUDA has to know before the command line makes its first tensor.
LAUNCH = "from lopt_edge.cli.main import main; main()"
CAPPED = f"import sys, torch; torch.cuda.set_per_process_memory_fraction(float(sys.argv.pop(1))); {LAUNCH}"


@dataclass(frozen=True)
class Case:
    """A case: what the runs that are compared with each other share."""

    model: Path
    seq_len: int


# --- one run of the command line --------------------------------------------------------------------------------------


def run_ours(options: Namespace, case: Case, method: str, flags: list[str], scratch: Path) -> Row:
    """The figures of one `lopt-edge finetune`; an `error` when it failed."""
    with tempfile.TemporaryDirectory(prefix="run-", dir=scratch) as folder:
        output, times = Path(folder) / "output", Path(folder) / "time.txt"
        launch = ["-c", CAPPED, str(options.memory_fraction)] if options.memory_fraction else ["-c", LAUNCH]
        command = [sys.executable, *launch, *finetune_arguments(options, case, method, data_file(case, options, scratch))]
        command += ["--output", str(output), *flags]
        started = time.perf_counter()
        done = subprocess.run(
            [*([str(TIME), "-v", "-o", str(times)] if TIME.exists() else []), *command],
            env=environment(options),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        measured: Row = {"wall_seconds": time.perf_counter() - started, "peak_rss_time_bytes": peak_of_time(times)}
        if done.returncode:
            print(done.stderr[-4000:], file=sys.stderr)
            return {**measured, "error": f"exit code {done.returncode}: {error_text(done.stderr)}"}
        return measured | run_figures(output, case)


def finetune_arguments(options: Namespace, case: Case, method: str, data: Path) -> list[str]:
    """The words of the command line that are the same in every setting."""
    values = {
        "model": case.model, "data": data, "method": method, "max-seq-len": case.seq_len, "max-steps": options.steps,
        "batch-size": 1, "grad-accum": 1, "lr": options.lr, "schedule": "constant", "warmup-ratio": 0, "clip": CLIP,
        "lora-r": options.lora_r, "lora-alpha": 2 * options.lora_r, "device": options.device,
        "compute-dtype": options.dtype, "cache-dir": options.cache_dir, "page-dir": options.page_dir,
    }  # fmt: skip
    return ["finetune", *(f"--{name}={value}" for name, value in values.items() if value is not None)]


def environment(options: Namespace) -> dict[str, str]:
    """The environment of a run. The waiting policy is what our command line sets itself, but too late where a cap has
    imported torch."""
    fixed = {"OMP_NUM_THREADS": str(options.threads), "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **fixed, "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "200"}


def data_file(case: Case, options: Namespace, scratch: Path) -> Path:
    """The data file of a case: one row a step, of more tokens than `seq_len` (a word is at least one)."""
    path = scratch / f"words-{case.seq_len}.jsonl"
    if not path.exists():
        drawn = random.Random(SEED)
        words = ["".join(drawn.choices("abcdefghijklmnopqrstuvwxyz", k=drawn.randint(2, 9))) for _ in range(5000)]
        rows = [
            {"prompt": "Words:", "completion": " " + " ".join(drawn.choices(words, k=case.seq_len))}
            for _ in range(options.steps)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def peak_of_time(path: Path) -> int | None:
    """The peak in bytes from GNU time's report; None where there is none."""
    for line in path.read_text().splitlines() if path.exists() else []:
        name, _, value = line.strip().rpartition(": ")
        if name == "Maximum resident set size (kbytes)":
            return int(value) * 1024
    return None


def error_text(stderr: str) -> str:
    """The message of a failed run, on one line; without one, its last words."""
    lines = [line.strip(" │") for line in stderr.splitlines() if any(map(str.isalnum, line))]  # typer draws a box
    named = [index for index, line in enumerate(lines) if line.startswith("error:")]
    return " ".join(lines[named[0] :] if named else lines[-1:])[:300] or "no message"


def run_figures(output: Path, case: Case) -> Row:
    """The figures that the finished run's own files report."""
    run = json.loads((output / "run.json").read_text())
    peaks, predicted = run["peaks"], run["predicted"]["device_bytes"]
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    seconds, tokens = [line["step_seconds"] for line in steps], {line["tokens"] for line in steps}
    typical = median(seconds[1:] if len(seconds) >= 3 else seconds)
    return {
        "peak_rss_bytes": peaks["peak_rss_bytes"],
        "peak_device_bytes": peaks["peak_device_bytes"],
        "peak_disk_bytes": peaks["peak_disk_bytes"],
        "predicted_device_bytes": predicted,
        "predicted_ratio": predicted / peaks["peak_device_bytes"],
        "step_seconds": typical,
        "first_step_seconds": seconds[0],
        "tokens_per_second": case.seq_len / typical,
        "losses": [(line["loss"], line["local_loss"]) for line in steps],
        "error": "" if tokens == {case.seq_len} else f"steps of {sorted(tokens)} tokens, not of {case.seq_len}",
    }
