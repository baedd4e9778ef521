"""The same runs in two checkouts, in turn: are plans, losses and adapter bytes identical, and is the new one as fast?

    git worktree add /tmp/before ebaa078
    python tools/compare_trees.py --before /tmp/before                       # identity: some 60 short runs, both trees
    python tools/compare_trees.py --before /tmp/before --seconds             # quick start: medians of its step seconds
    python tools/compare_trees.py --before /tmp/before --seconds --model /tmp/q05   # and a model of tools/make_model.py

The rule: a change that should alter no number is shown to alter none, by hashes: of each plan's text, of the log without
what is measured, of the adapter file. Both trees run as processes of their own, one after the other, each with the package
of its own checkout. Seconds are compared in turn (before, after, before, ...), medians over steps and repeats, so that a
machine that grows busy slows both. It needs nothing of either tree but the command line; it changes neither.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
# Before the package had folders its command line was one file.
LAUNCH = "try:\n    from lopt_edge.cli.main import main\nexcept ImportError:\n    from lopt_edge.cli import main\nmain()"
MEASURED = (
    "second",
    "bytes",
    "process_peaks",
)  # words in the names of what is measured, in a line of the log
SHORT = {
    "max_steps": 6,
    "eval_data": None,
    "retention_data": None,
    "save_minutes": 0,
    "device": "cpu",
}
METHODS: dict[str, dict[str, Any]] = {
    "e2e": {}, "frozen": {"method": "frozen"}, "lopt, paper's rate": {"method": "lopt", "lr_local": 3e-3},
    "lopt": {"method": "lopt"}, "lopt, 4 segments": {"num_segments": 4}, "lcsb": {"method": "lcsb"},
    "segprop": {"method": "segprop"}, "let": {"method": "let"}, "let-local": {"method": "let-local", "lr_local": 3e-4},
    "mlaan": {"method": "mlaan"}, "repl": {"method": "repl"}, "top-layers": {"method": "top-layers", "train_layers": 2},
    "opened": {"method": "lopt", "local_every": 0, "open_every": 4}, "seldom": {"method": "lopt", "local_every": 4},
    "next-token": {"method": "lopt", "local_loss": "next-token"}, "align": {"method": "lopt", "local_loss": "align"},
    "fresh": {"method": "lopt", "boundary_update": "fresh"}, "a quarter": {"method": "lcsb", "select_ratio": 0.25},
    "rest": {"method": "lcsb", "unselected": "rest"}, "uniform": {"method": "lcsb", "selection": "uniform"},
    "rank 64": {"lora_r": 64, "lora_alpha": 256}, "boundary 6": {"method": "frozen", "boundary_layers": [6]},
}  # fmt: skip


def memory_settings(n: int) -> dict[str, dict[str, Any]]:
    """Random combinations of what lies where, drawn the same way each time."""
    draw = random.Random(7).choice
    choices: dict[str, tuple[Any, ...]] = {
        "weights": ("resident", "disk", "disk,0-2=resident"), "activations": ("keep", "recompute", "page", "page,6-7=keep"),
        "saved_inputs": ("device", "disk"), "optimizer_states": ("device", "disk"), "gradients": ("device", "disk"),
        "optimizer": ("adamw", "adamw8bit"), "prefetch": (0, 1, 2), "lora_dropout": (0, 0.1), "grad_accum": (1, 2),
        "method": ("e2e", "lopt", "frozen", "lcsb", "mlaan"), "compute_dtype": ("float32", "bfloat16"),
    }  # fmt: skip
    return {f"memory {i}": {name: draw(values) for name, values in choices.items()} | {"batch_size": 4} for i in range(n)}


def run(tree: Path, settings: dict[str, Any], folder: Path) -> Path:
    """One `finetune` in a checkout; its output folder. Exits with its message if it fails."""
    output = folder / "run"
    shutil.rmtree(output, ignore_errors=True)
    file = folder / "run.yaml"
    given = {key: value for key, value in settings.items() if value is not None}
    file.write_text(yaml.safe_dump({**given, "output": str(output)}))
    command = [sys.executable, "-c", LAUNCH, "finetune", str(file)]
    done = subprocess.run(
        command,
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{tree}: {settings}\n{done.stderr}")
    return output


def fingerprint(output: Path) -> dict[str, str]:
    """What a run came to, without what is measured: hashes of its plans, of its log and of its adapter."""
    facts = json.loads((output / "run.json").read_text())
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    log = [{key: value for key, value in line.items() if not any(word in key for word in MEASURED)} for line in lines]
    values = {
        "plans": json.dumps([facts["plan"], facts["kinds_of_step"]]).encode(),
        "log": json.dumps(log).encode(),
        "adapter": (output / "adapter_model.safetensors").read_bytes(),
    }
    return {name: hashlib.sha256(value).hexdigest()[:16] for name, value in values.items()}


def step_seconds(output: Path) -> list[float]:
    """The seconds of each step but the first, which compiles and allocates."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["step_seconds"] for line in lines if "step_seconds" in line][1:]


def identical(trees: tuple[Path, Path], only: str, folder: Path) -> bool:
    """Run everything in both trees and print what differs; whether nothing does."""
    same = True
    for task in ("narrow", "broad"):
        base = yaml.safe_load((ROOT / "examples" / "study" / f"{task}.yaml").read_text())
        cases = {**METHODS, **(memory_settings(16) if task == "narrow" else {})}
        for name, changes in cases.items():
            if only not in f"{task}: {name}":
                continue
            before, after = (fingerprint(run(tree, {**base, **SHORT, **changes}, folder)) for tree in trees)
            differing = [part for part in before if before[part] != after[part]]
            print(
                f"{task}: {name}: {', '.join(differing) + ' differ' if differing else 'same ' + after['adapter']}",
                flush=True,
            )
            same &= not differing
    return same


def timed(trees: tuple[Path, Path], options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Rows of medians and their ratio: the quick start, and with --model that model at 512 tokens."""
    quick = yaml.safe_load((ROOT / "examples" / "quickstart.yaml").read_text())
    cases = {
        "quick start, 60 steps": {
            **quick,
            **SHORT,
            "max_steps": 60,
            "sample_prompt": None,
        }
    }
    if options.model is not None:
        shape = {
            "model": str(options.model),
            "max_seq_len": 512,
            "batch_size": 1,
            "max_steps": 4,
            "sample_prompt": None,
        }
        cache = {
            "cache_dir": str(options.model) + "-cache",
            "data": str(ROOT / "examples" / "data" / "retention.txt"),
        }
        cases[f"{options.model.name}, 1 x 512"] = {**quick, **SHORT, **shape, **cache}
    rows = []
    for name, settings in cases.items():
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(options.repeats):
            for tree, found in zip(trees, seconds, strict=True):
                found += step_seconds(run(tree, settings, folder))
        before, after = (median(found) for found in seconds)
        rows.append(
            {
                "date": date.today(),
                "case": name,
                "before_seconds": round(before, 5),
                "after_seconds": round(after, 5),
                "ratio": round(after / before, 3),
                "repeats": options.repeats,
                "load": round(os.getloadavg()[0], 1),
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="the other checkout")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--seconds", action="store_true", help="compare step seconds instead of bytes")
    parser.add_argument(
        "--model",
        type=Path,
        help="with --seconds: a model folder beside the quick start",
    )
    parser.add_argument("--repeats", type=int, default=3, help="with --seconds: runs of each tree")
    parser.add_argument(
        "--csv",
        type=Path,
        default=Path(__file__).parent / "results" / "trees.csv",
        help="appended to",
    )
    options = parser.parse_args()
    trees = (options.before.resolve(), ROOT)
    with tempfile.TemporaryDirectory() as folder:
        if not options.seconds:
            sys.exit(0 if identical(trees, options.only, Path(folder)) else 1)
        rows = timed(trees, options, Path(folder))
    is_new = not options.csv.exists()
    with options.csv.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
