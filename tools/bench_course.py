"""Holds the seconds of whole runs against the planner's for them: end to end, and with a boundary that closes.

    python tools/make_model.py --shape smollm2-135m --output /tmp/model
    lopt-edge doctor --measure
    python tools/bench_course.py --model /tmp/model [--seq-len 512] [--rows 5] [--repeats 2]

Two epochs over the same rows, so that a boundary that closes after a quarter fills its cache and then reads it. The rule:
the courses of a repeat run one after another, each as a whole `lopt-edge finetune` in a process of its own; measured are
the seconds of all its steps, the first and slowest among them; predicted is what `plan` says of that run on that data, with
this machine's profile (`doctor --measure`, made on the same quiet machine). `of_e2e` is a course's measured share of the
end-to-end run of its repeat. Seconds are only worth something on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from bench_child import Row
from bench_methods import LAUNCH, data_file
from bench_peers import append, check_csv, common_columns, usable_cores

COURSES: dict[str, dict[str, Any]] = {
    "e2e": {"method": "e2e"},
    "open for a quarter, then cached": {"method": "lopt", "open_until": 0.25},
    "open for a quarter, no cache": {"method": "lopt", "open_until": 0.25, "closed_cache": False},
}
EPOCHS = 2
COLUMNS = ("date", "hardware", "threads", "versions", "commit", "model", "shape", "device", "dtype", "lora_r", "seq_len",
           "course", "repeat", "steps", "predicted_seconds", "measured_seconds", "ratio", "of_e2e", "error")  # fmt: skip


def settings(options: argparse.Namespace, course: str, output: Path) -> dict[str, Any]:
    """The settings of a run."""
    return {
        "model": str(options.model), "data": str(options.data), "output": str(output), "max_seq_len": options.seq_len,
        "epochs": EPOCHS, "batch_size": 1, "grad_accum": 1, "schedule": "constant", "warmup_ratio": 0,
        "lora_r": options.lora_r, "device": options.device, "compute_dtype": options.dtype, "packing": False,
        "cache_dir": str(options.cache_dir), "save_minutes": 0, **COURSES[course],
    }  # fmt: skip


def predicted(values: dict[str, Any]) -> float:
    """The planner's seconds for all steps of a run, on its own data."""
    from lopt_edge.comparison.equal import planned_duration
    from lopt_edge.config.load import load_config

    return planned_duration(load_config(None, values))[1]


def measured(options: argparse.Namespace, values: dict[str, Any]) -> Row:
    """The seconds of all steps of a run, in a process of its own."""
    import yaml

    output = Path(values["output"])
    config = output.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LAUNCH, "finetune", str(config)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip()[-300:]}
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line["step_seconds"] for line in lines if "step_seconds" in line]
    return {"steps": len(steps), "measured_seconds": round(sum(steps), 3), "error": ""}


def run_all(options: argparse.Namespace, scratch: Path) -> list[Row]:
    common, rows = common_columns(options), []
    for repeat in range(1, options.repeats + 1):
        of_e2e = 0.0
        for number, course in enumerate(COURSES):
            values = settings(options, course, scratch / f"{repeat}-{number}")
            row = {**common, "course": course, "repeat": repeat, **measured(options, values)}
            if not row["error"]:
                row["predicted_seconds"] = round(predicted(values), 3)
                row["ratio"] = round(row["measured_seconds"] / row["predicted_seconds"], 3)
                of_e2e = of_e2e or row["measured_seconds"]
                row["of_e2e"] = round(row["measured_seconds"] / of_e2e, 3)
            append(options.csv, [row], COLUMNS)
            rows.append(row)
            print(f"{repeat} {course}: {row.get('measured_seconds', row['error'])} s", flush=True)
    return rows


def show(rows: list[Row]) -> None:
    """Print the medians over the repeats."""
    print(f"{'course':34s} {'measured s':>10s} {'predicted s':>11s} {'ratio':>6s} {'of e2e':>7s}")
    for course in COURSES:
        if found := [row for row in rows if row["course"] == course and not row["error"]]:
            names = ("measured_seconds", "predicted_seconds", "ratio", "of_e2e")
            seconds, expected, ratio, share = (median(row[name] for row in found) for name in names)
            print(f"{course:34s} {seconds:10.1f} {expected:11.1f} {ratio:6.3f} {share:7.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model folder with a tokenizer")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rows", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--lora-r", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--cache-dir", type=Path, default=Path(tempfile.gettempdir()) / "lopt-edge-bench")
    parser.add_argument("--csv", type=Path, default=Path(__file__).parent / "results" / "course.csv")
    options = parser.parse_args()
    check_csv(options.csv, COLUMNS)
    options.steps = 0
    with tempfile.TemporaryDirectory(prefix="bench-course-") as folder:
        scratch = Path(folder)
        whole = data_file(options, scratch, sparse=False).read_text(encoding="utf-8").splitlines(keepends=True)
        if len(whole) < options.rows:
            parser.error(f"--rows is at most {len(whole)}: bench_methods.py draws no more")
        options.data = scratch / "rows.jsonl"
        options.data.write_text("".join(whole[: options.rows]), encoding="utf-8")
        show(run_all(options, scratch))


if __name__ == "__main__":
    main()
