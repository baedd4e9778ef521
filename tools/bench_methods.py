"""Measures what each method's step costs beside end to end: seconds and peak memory, appended to a CSV.

    python tools/make_model.py --shape qwen2.5-0.5b --output /tmp/model
    python tools/bench_methods.py --model /tmp/model --repeats 3

The rule: all variants of a repeat run on the same data, one after another, each as a whole `lopt-edge finetune` in a
process of its own; `ratio` is the seconds of `e2e` on the same data in the same repeat over the variant's. Seconds are
means over whole cycles (a method may have several kinds of step), without the run's first step, which warms up. With a
boundary cache they are those of the steps that read it. One sequence a step; all tokens supervised but the prompt's one,
or, for the variants marked `20%`, the last fifth of them.

It does not measure quality (that is `lopt-edge compare`). Seconds are only worth something on a machine that does nothing
else.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from bench_child import SEED, Row
from bench_peers import append, check_csv, common_columns, usable_cores

LAUNCH = "from lopt_edge.cli.main import main; main()"
CACHE = "BOUNDARY-CACHE"  # stands for a new folder


@dataclass(frozen=True)
class Variant:
    """A variant to run: `flags` of finetune, and `n_steps` of which the first is left out (of those named `kind`, where one
    is named)."""

    name: str
    flags: str
    n_steps: int
    kind: str = ""
    wanted: float | None = None  # times as fast as e2e
    base: str = "e2e"

    @property
    def sparse(self) -> bool:
        return "20%" in self.name


VARIANTS = (
    Variant("e2e", "--method e2e", 3),
    Variant("lopt", "--method lopt", 3),
    Variant("frozen", "--method frozen", 3, wanted=1.35),
    Variant("lcsb, half the layers", "--method lcsb", 3, wanted=1.25),
    Variant("lopt --local-every 4", "--method lopt --local-every 4", 5, wanted=1.2),
    Variant("lopt --local-every 0 --open-every 4", "--method lopt --local-every 0 --open-every 4", 5),
    Variant("lopt --boundary-update fresh", "--method lopt --boundary-update fresh", 3),
    Variant("frozen, boundary cache", f"--method frozen --boundary-cache {CACHE}", 3, "read", 1.55),
    Variant("segprop", "--method segprop", 5),
    Variant("let", "--method let --align-until 1", 3),
    Variant("let-local", "--method let-local --align-until 1", 3),
    Variant("mlaan", "--method mlaan", 3),
    Variant("repl", "--method repl", 3),
    Variant("top-layers, 6 of 24", "--method top-layers --train-layers 6", 3),
    Variant("lopt --pipeline 2", "--method lopt --pipeline 2", 3),  # with --threads 1: a core for each process
    Variant("e2e, 20%", "--method e2e", 3, base="e2e, 20%"),
    Variant("frozen, boundary cache, 20%", f"--method frozen --boundary-cache {CACHE}", 3, "read", 1.9, "e2e, 20%"),
)  # fmt: skip
COLUMNS = ("date", "hardware", "threads", "versions", "commit", "model", "shape", "device", "dtype", "lora_r", "seq_len",
           "variant", "repeat", "supervised_share", "step_seconds", "ratio", "peak_rss_bytes", "peak_device_bytes",
           "peak_disk_bytes", "error")  # fmt: skip


def run_variant(options: argparse.Namespace, variant: Variant, scratch: Path) -> Row:
    """The figures of one run; with a cache one to fill it goes before."""
    data = data_file(options, scratch, sparse=variant.sparse)
    with tempfile.TemporaryDirectory(prefix="run-", dir=scratch) as folder:
        flags = variant.flags.replace(CACHE, f"{folder}/cache").split()
        for name in ["fill", "run"] if variant.kind else ["run"]:
            done = finetune(options, flags, data, Path(folder) / name, n_steps=variant.n_steps)
            if done.returncode:
                return {"error": done.stderr.strip()[-300:]}
        run = json.loads((Path(folder) / "run" / "run.json").read_text())
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line and line.get("kind", "").startswith(variant.kind)][1:]
    share = sum(line["supervised_tokens"] for line in steps) / sum(line["tokens"] for line in steps)
    peaks = {name: run["peaks"][name] for name in ("peak_rss_bytes", "peak_device_bytes", "peak_disk_bytes")}
    return {
        "supervised_share": round(share, 3),
        "step_seconds": mean(line["step_seconds"] for line in steps),
        **peaks,
        "error": "",
    }


def finetune(options: argparse.Namespace, flags: list[str], data: Path, output: Path, *, n_steps: int) -> Any:
    values = {
        "model": options.model, "data": data, "output": output, "max-seq-len": options.seq_len, "max-steps": n_steps,
        "batch-size": 1, "grad-accum": 1, "schedule": "constant", "warmup-ratio": 0, "lora-r": options.lora_r,
        "device": options.device, "compute-dtype": options.dtype, "cache-dir": options.cache_dir, "save-minutes": 0,
    }  # fmt: skip
    arguments = ["finetune", *(f"--{name}={value}" for name, value in values.items()), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", LAUNCH, *arguments], env=environment, capture_output=True, text=True)


def data_file(options: argparse.Namespace, scratch: Path, *, sparse: bool) -> Path:
    """The data file: as many rows as a run has steps, each longer than a sequence; `sparse`: the prompt takes four fifths
    of it."""
    from tokenizers import Tokenizer

    path = scratch / f"words-{'sparse' if sparse else 'all'}.jsonl"
    if path.exists():
        return path
    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    drawn = random.Random(SEED)
    words = ["".join(drawn.choices("abcdefghijklmnopqrstuvwxyz", k=drawn.randint(2, 9))) for _ in range(5000)]
    rows = []
    for _ in range(max(variant.n_steps for variant in VARIANTS)):
        text = " ".join(drawn.choices(words, k=options.seq_len))
        prompt = "Words:"
        if sparse:
            offsets = tokenizer.encode(text).offsets
            prompt = text[: offsets[round(0.81 * options.seq_len)][0]].rsplit(" ", 1)[0]
        rows.append({"prompt": prompt, "completion": " " + " ".join(drawn.choices(words, k=options.seq_len))})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run_all(options: argparse.Namespace, scratch: Path) -> list[Row]:
    common, rows = common_columns(options), []
    wanted = [variant for variant in VARIANTS if not options.only or variant.name in (*options.only, "e2e", "e2e, 20%")]
    finetune(options, ["--method", "e2e"], data_file(options, scratch, sparse=False), scratch / "quantised", n_steps=1)
    for repeat in range(1, options.repeats + 1):
        seconds: dict[str, float] = {}
        for variant in wanted:
            row = {**common, "variant": variant.name, "repeat": repeat, **run_variant(options, variant, scratch)}
            if not row["error"]:
                seconds[variant.name] = row["step_seconds"]
                row["ratio"] = round(seconds[variant.base] / row["step_seconds"], 3) if variant.base in seconds else ""
                row["step_seconds"] = round(row["step_seconds"], 4)
            append(options.csv, [row], COLUMNS)
            rows.append(row)
            print(f"{repeat} {variant.name}: {row.get('step_seconds', row['error'])} s, {row.get('ratio', '')}", flush=True)
    return rows


def show(rows: list[Row]) -> None:
    """Print the medians over the repeats."""
    print(f"{'variant':38s} {'s a step':>9s} {'x e2e':>6s} {'asked':>6s} {'peak MiB':>9s}")
    for variant in VARIANTS:
        found = [row for row in rows if row["variant"] == variant.name and not row["error"]]
        if found:
            step, ratio = (median(row[name] for row in found) for name in ("step_seconds", "ratio"))
            peak = median(row["peak_rss_bytes"] for row in found) / 2**20
            print(f"{variant.name:38s} {step:9.3f} {ratio:6.2f} {variant.wanted or '':>6} {peak:9.0f}")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model folder with a tokenizer")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--lora-r", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", action="append", choices=[variant.name for variant in VARIANTS], help="and e2e")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--cache-dir", type=Path, default=Path(tempfile.gettempdir()) / "lopt-edge-bench")
    parser.add_argument("--csv", type=Path, default=Path(__file__).parent / "results" / "methods.csv")
    options = parser.parse_args(arguments)
    options.steps = 0
    return options


def main() -> None:
    options = parse(sys.argv[1:])
    check_csv(options.csv, COLUMNS)
    with tempfile.TemporaryDirectory(prefix="bench-methods-") as scratch:
        show(run_all(options, Path(scratch)))


if __name__ == "__main__":
    main()
