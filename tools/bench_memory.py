"""Measures the peak memory and the step time of whole `lopt-edge finetune` runs, and appends what it saw to a CSV.

    python tools/make_model.py --shape qwen2.5-0.5b --output /tmp/model
    python tools/bench_memory.py --model /tmp/model --seq-len 512 --seq-len 2048 --settings resident --settings smallest
    python tools/bench_memory.py --sweep-layers 4,8,16,24 --shape qwen2.5-0.5b --seq-len 512 --no-baseline

The rule: a peak is that of a whole process, from its start to its exit, as its user would run it: the real command line,
with its tokenizer, data file, imports and saving. Each runs alone, under `/usr/bin/time -v` where that exists, and its
peak there (`peak_rss_time_bytes`) must agree within 1% with what its own run.json says (`peak_rss_bytes`); a row where it
does not is marked (`peaks_agree`). The 4-bit copy is made once before, in a process of its own: no measured run quantises.

A setting is a set of flags, by name in SETTINGS; `--flag` adds more to all of them. Memory features must not change the
numbers: `losses_equal` tells whether every loss of a row is bitwise that of the first setting of this call, with the same
model, length and method (empty when that one failed). A step is one sequence of words drawn from a seed, each token but
the prompt's supervised; the rows of the data file are longer than the length and get truncated to it, so that every step
has exactly that many tokens.

The baseline is bench_peers' (transformers + peft + bitsandbytes QLoRA with gradient checkpointing, as a careful user
writes it), once per model, length and repeat, without tokenizer and data. The `_ratio` columns divide by it.

Columns: `step_seconds` is the median over the steps, without the first one when there are three; device bytes are what
torch reserved on CUDA and the resident set on a CPU. Two lengths or depths are enough for a growth line at the end:
least squares over all rows of a method and setting, with the worst distance of a row from the line. `--memory-fraction` and
`--cap-gib` make torch refuse more of the GPU than that, in the baseline too; the context comes on top.

What it does not do: it does not look inside a run (that is `--memory-report`), and it does not compare with another
machine. Seconds are only worth something on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

from bench_child import Row
from bench_memory_run import TIME, Case, environment, error_text, run_ours
from bench_peers import append, check_csv, check_dtype, common_columns, measure, usable_cores

from lopt_edge.errors import LoptError

METHODS = ("e2e", "lopt", "frozen")
PLACES = "--weights {0} --saved-inputs {1} --optimizer-states {2} --gradients {2} --activations {3} --prefetch 1"
SETTINGS = {
    name: PLACES.format(*places.split()).split()
    for name, places in {
        "resident": "resident device device recompute",
        "streamed": "disk disk device recompute",
        "smallest": "disk disk disk recompute",
        "keep": "resident device device keep",
        "page": "resident device device page",
        "recompute": "resident device device recompute",
    }.items()
}
COLUMNS = (
    "date", "hardware", "threads", "versions", "commit", "model", "shape", "n_layers", "hidden_size", "device",
    "dtype", "memory_fraction", "lora_r", "seq_len", "steps", "method", "settings", "flags", "repeat",
    "peak_rss_time_bytes", "peak_rss_bytes", "peaks_agree", "peak_device_bytes", "peak_disk_bytes",
    "predicted_device_bytes", "predicted_ratio", "step_seconds", "first_step_seconds", "tokens_per_second",
    "wall_seconds", "first_loss", "losses_equal", "step_ratio", "rss_ratio", "device_ratio", "error",
)  # fmt: skip
AGREE = 0.01
GPU = "import torch; p = torch.cuda.get_device_properties(0); print(p.total_memory, p.name)"


# --- rows -------------------------------------------------------------------------------------------------------------


def run_cases(options: Namespace, scratch: Path) -> list[Row]:
    """The rows of every process, run in turn; each row is appended as soon as it is known."""
    rows: list[Row] = []
    ready: set[Path] = set()
    for case in cases(options, scratch):
        common = case_columns(options, case)
        first_losses: dict[str, list[Any]] = {}  # by method: those of the first setting
        problem = "" if case.model in ready else quantise_once(options, case, scratch)
        ready.add(case.model)
        if problem:
            rows.append({**common, "method": "quantise", "error": problem})
            append(options.csv, rows[-1:], COLUMNS)
            continue
        for repeat in range(1, options.repeats + 1):
            for row in run_repeat(options, case, first_losses, scratch):
                rows.append(rounded({**common, "repeat": repeat, **row}))
                append(options.csv, rows[-1:], COLUMNS)
    return rows


def cases(options: Namespace, scratch: Path) -> Iterator[Case]:
    """The models that were named, then those of the depth sweep, each made when its turn comes and deleted after it."""
    lengths = dict.fromkeys([*options.seq_len, *options.sweep_seq])
    for model in options.model:
        yield from (Case(model, seq_len) for seq_len in lengths)
    for layers in options.sweep_layers:
        with tempfile.TemporaryDirectory(prefix="model-", dir=scratch) as folder:
            model = Path(folder) / f"{options.shape}-{layers}-layers"
            command = [sys.executable, str(Path(__file__).with_name("make_model.py")), "--shape", options.shape]
            command += ["--layers", str(layers), "--output", str(model)]
            command += [] if options.baseline else ["--quantized"]  # the baseline quantises by itself
            done = subprocess.run(command, env=environment(options), stdout=subprocess.DEVNULL)
            if done.returncode:
                sys.exit(f"{options.shape} with {layers} layers could not be made (see above)")
            yield from (Case(model, seq_len) for seq_len in lengths)


def case_columns(options: Namespace, case: Case) -> Row:
    """The columns that all rows of a case share."""
    from lopt_edge.models.folder import find_model

    facts = find_model(str(case.model)).facts
    common = common_columns(Namespace(**{**vars(options), "model": case.model, "seq_len": case.seq_len}))
    hardware = f"{options.gpu}; {common['hardware']}" if options.gpu else common["hardware"]
    return {
        **common,
        "hardware": hardware,
        "n_layers": facts.n_layers,
        "hidden_size": facts.hidden_size,
        "memory_fraction": options.memory_fraction,
    }


def quantise_once(options: Namespace, case: Case, scratch: Path) -> str:
    """Fill the cache with the 4-bit copy, and return what went wrong, if anything did."""
    return str(measure(options, peers_arguments(options, case), method="quantise", folder=scratch).get("error", ""))


def peers_arguments(options: Namespace, case: Case) -> list[str]:
    """The arguments of bench_peers.py for this case."""
    values = {"model": case.model, "seq-len": case.seq_len, "steps": max(2, options.steps), "device": options.device,
              "dtype": options.dtype, "lora-r": options.lora_r, "lr": options.lr,
              "memory-fraction": options.memory_fraction}  # fmt: skip
    return [f"--{name}={value}" for name, value in values.items() if value is not None]


def run_repeat(options: Namespace, case: Case, first_losses: dict[str, list[Any]], scratch: Path) -> Iterator[Row]:
    """The rows of the baseline, then of every method in every setting, with their ratios."""
    baseline: Row = {}
    if options.baseline:
        baseline = baseline_row(measure(options, peers_arguments(options, case), method="peers", folder=scratch), case)
        yield {**baseline, "method": "peers"}
    for method in options.methods:
        for setting in options.settings:
            flags = [*SETTINGS[setting], *options.flag]
            measured = run_ours(options, case, method, flags, scratch)
            print(f"{case.model.name} {case.seq_len} {method} {setting}: {measured['wall_seconds']:.0f} s", file=sys.stderr)
            losses = measured.pop("losses", None)
            row = {"method": method, "settings": setting, "flags": shlex.join(flags), **measured}
            if losses:
                if setting == options.settings[0]:
                    first_losses.setdefault(method, losses)  # its later repeats are compared with it as well
                equal = "yes" if losses == first_losses.get(method) else "no"
                row |= {"first_loss": repr(losses[0][0]), "losses_equal": equal if method in first_losses else ""}
            yield row | {"peaks_agree": agree(row)} | ratios(row, baseline)


def baseline_row(measured: Row, case: Case) -> Row:
    """A row of ours from what a child of bench_peers returns."""
    if measured.get("error"):
        return {"error": measured["error"]}
    seconds = measured["seconds"]
    typical = median(seconds[1:] if len(seconds) >= 3 else seconds)
    return {
        **{name: measured[name] for name in ("peak_rss_bytes", "peak_device_bytes")},
        "step_seconds": typical,
        "first_step_seconds": seconds[0],
        "tokens_per_second": case.seq_len / typical,
        "first_loss": repr(measured["losses"][0]),
    }


def agree(row: Row) -> str:
    """The word of `peaks_agree`: yes, no, or empty where one of the two peaks is missing."""
    ours, theirs = row.get("peak_rss_bytes"), row.get("peak_rss_time_bytes")
    if not ours or not theirs:
        return ""
    return "yes" if abs(ours - theirs) <= AGREE * theirs else "no"


def ratios(row: Row, baseline: Row) -> Row:
    """The `_ratio` columns of a row, as far as both it and the baseline were measured."""
    pairs = (("step_ratio", "step_seconds"), ("rss_ratio", "peak_rss_bytes"), ("device_ratio", "peak_device_bytes"))
    return {ratio: row[column] / baseline[column] for ratio, column in pairs if row.get(column) and baseline.get(column)}


def rounded(row: Row) -> Row:
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}


# --- what is printed at the end ---------------------------------------------------------------------------------------


def show(rows: list[Row]) -> None:
    """Print a table with a line per model, length, method and setting: medians over the repeats."""
    from rich.console import Console
    from rich.table import Table

    heads = ("model", "tokens", "method", "settings", "peak RSS MiB", "/peers", "device MiB", "/peers", "step s", "/peers",
             "first loss", "losses equal")  # fmt: skip
    columns = (("peak_rss_bytes", 1 << 20, 1), ("rss_ratio", 1, 3), ("peak_device_bytes", 1 << 20, 1),
               ("device_ratio", 1, 3), ("step_seconds", 1, 2), ("step_ratio", 1, 2))  # fmt: skip
    table = Table(*heads, box=None)
    keys = ("model", "seq_len", "method", "settings")
    for group in groups(rows, keys):
        mine = [row for row in group if not row.get("error")]
        names = [str(group[0].get(key, "")) for key in keys]
        if not mine:
            table.add_row(*names, "failed")
            continue
        found = [([row[column] / unit for row in mine if row.get(column)], digits) for column, unit, digits in columns]
        texts = [f"{median(values):,.{digits}f}" if values else "" for values, digits in found]
        texts[0] += " !" if any(row.get("peaks_agree") == "no" for row in mine) else ""
        equal = {row.get("losses_equal", "") for row in mine}
        table.add_row(*names, *texts, str(mine[0].get("first_loss", ""))[:10], "no" if "no" in equal else max(equal))
    console = Console(width=160, highlight=False)
    console.print(table)
    if any(row.get("peaks_agree") == "no" for row in rows):
        console.print(f"! {TIME} -v and the run's own peak differ by more than {AGREE:.0%}")
    for line in growth(rows):
        console.print(line, markup=False)


def groups(rows: list[Row], keys: tuple[str, ...]) -> Iterator[list[Row]]:
    """The rows in groups of equal values under these keys."""
    for values in dict.fromkeys(tuple(row.get(key, "") for key in keys) for row in rows):
        yield [row for row in rows if tuple(row.get(key, "") for key in keys) == values]


def growth(rows: list[Row]) -> Iterator[str]:
    """The growth lines: one for each method and setting that was measured at several lengths, or at several depths of one
    shape."""
    measured = [
        {**row, "family": row["shape"].replace(f" {row['n_layers']} x ", " ")}
        for row in rows
        if row.get("peak_rss_bytes") and not row.get("error")
    ]
    peaks = {"peak_rss_bytes": "peak RSS", "peak_device_bytes": "device"}
    if all(row["device"] == "cpu" for row in measured):  # there the two are one
        del peaks["peak_device_bytes"]
    for column, unit, unit_name in (("seq_len", 1000, "1,000 tokens"), ("n_layers", 1, "layer")):
        fixed = "n_layers" if column == "seq_len" else "seq_len"
        for group in groups(measured, ("family", "method", "settings", fixed)):
            if len({row[column] for row in group}) < 2:
                continue
            what = f"{group[0]['family']}, {fixed} {group[0][fixed]:,}: {group[0]['method']} {group[0].get('settings', '')}"
            for peak, name in peaks.items():
                slope, start, off = fit([row[column] / unit for row in group], [row[peak] / 2**20 for row in group])
                yield (
                    f"{what.strip()}: {name} {slope:+,.2f} MiB per {unit_name} (line from {start:,.0f} MiB at 0; "
                    f"{len(group)} rows, worst {off:,.1f} MiB off it)"
                )


def fit(x: list[float], y: list[float]) -> tuple[float, float, float]:
    """The slope and start of the least-squares line, and the largest distance from it."""
    slope, start = linear_regression(x, y)
    return slope, start, max(abs(start + slope * a - b) for a, b in zip(x, y, strict=True))


# --- the command line -------------------------------------------------------------------------------------------------


def numbers(text: str) -> list[int]:
    """The numbers of `512,1024`. Raises ArgumentTypeError for what is none, or below 1."""
    found = [int(part) for part in text.split(",") if part]
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: write numbers from 1, for example 512,1024")
    return found


def parse(arguments: list[str]) -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", action="append", default=[], type=Path, help="a model folder, e.g. of make_model.py; repeatable")
    add("--seq-len", action="append", default=[], type=int, help="tokens of the one sequence of a step; repeatable")
    add("--methods", default="e2e,lopt", help="which, in which order (default: %(default)s)")
    add("--settings", action="append", choices=SETTINGS, help="flag sets; the first is the reference (default: resident)")
    add("--flag", action="append", default=[], help='more finetune flags, as in --flag="--apply layer"; repeatable')
    add("--steps", type=int, default=2, help="steps of a run (default: %(default)s)")
    add("--repeats", type=int, default=1, help="run everything this often, in turn")
    add("--baseline", action=argparse.BooleanOptionalAction, default=True, help="transformers + peft + bitsandbytes")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="compute dtype")
    add("--memory-fraction", type=float, help="share of the GPU's memory that torch may take in a process")
    add("--cap-gib", type=float, help="the same in GiB")
    add("--lora-r", type=int, default=16, help="LoRA rank (default: %(default)s); alpha is twice that")
    add("--lr", type=float, default=2e-4)
    add("--threads", type=int, default=usable_cores(), help="CPU threads a process (default: %(default)s)")
    add("--page-dir", type=Path, help="where a run's pages lie (default: the run's own choice)")
    add("--cache-dir", type=Path, help="where our 4-bit copies lie (default: made anew, then deleted)")
    add("--sweep-seq", type=numbers, default=[], help="more lengths, e.g. 512,1024,2048: MiB per 1,000 tokens")
    add("--sweep-layers", type=numbers, default=[], help="depths of --shape to build and run, e.g. 4,8,16: MiB per layer")
    add("--shape", default="qwen2.5-0.5b", help="of --sweep-layers, a shape of make_model.py (default: %(default)s)")
    add("--csv", type=Path, default=Path(__file__).parent / "results" / "memory.csv", help="appended to")
    options = parser.parse_args(arguments)
    options.settings = list(dict.fromkeys(options.settings or ["resident"]))
    options.methods = [method for method in options.methods.split(",") if method]
    options.flag = [word for text in options.flag for word in shlex.split(text)]
    check(parser, options)
    return options


def check(parser: argparse.ArgumentParser, options: Namespace) -> None:
    if unknown := sorted(set(options.methods) - set(METHODS)):
        parser.error(f"--methods knows {', '.join(METHODS)}, not {', '.join(unknown)}")
    if not options.model and not options.sweep_layers:
        parser.error("name a --model, or --sweep-layers")
    if not options.seq_len and not options.sweep_seq:
        parser.error("name a --seq-len, or --sweep-seq")
    if min(*options.seq_len, *options.sweep_seq, 2) < 2:
        parser.error("a sequence needs at least 2 tokens")
    for name in ("steps", "repeats", "lora_r", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    capped = [value for value in (options.memory_fraction, options.cap_gib) if value is not None]
    if len(capped) > 1 or (capped and options.device == "cpu"):
        parser.error("give --memory-fraction or --cap-gib, and only with --device cuda")
    if (capped and capped[0] <= 0) or (options.memory_fraction or 0) > 1:
        parser.error("a cap must be more than nothing, and a fraction at most 1")


def check_models(options: Namespace) -> None:
    """Refuse what is no model, or no model for the baseline, before the first process."""
    from lopt_edge.models.folder import find_model

    for model in options.model:
        find_model(str(model))
        check_dtype(Namespace(model=model, dtype=options.dtype, methods=["peers"] if options.baseline else []))


def look_at_gpu(options: Namespace) -> None:
    """Set the GPU's name, and the cap as a fraction of its memory; both are asked in a child, so that this process has no
    context."""
    options.gpu = ""
    if options.device == "cuda":
        done = subprocess.run([sys.executable, "-c", GPU], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"torch finds no GPU: {error_text(done.stderr)}")
        total, _, options.gpu = done.stdout.strip().partition(" ")
        if options.cap_gib:
            options.memory_fraction = min(1.0, options.cap_gib * 2**30 / int(total))


def main() -> None:
    options = parse(sys.argv[1:])
    check_csv(options.csv, COLUMNS)
    look_at_gpu(options)
    with tempfile.TemporaryDirectory(prefix="bench-memory-") as scratch:
        options.cache_dir = options.cache_dir or Path(scratch) / "cache"
        try:
            check_models(options)
            rows = run_cases(options, Path(scratch))
        except LoptError as error:
            sys.exit(str(error))
    show(rows)
    print(f"{len(rows)} rows appended to {options.csv}")
    if any(row.get("error") for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
