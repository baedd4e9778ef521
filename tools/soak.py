"""Trains thousands of steps in one process with everything paged, and looks whether anything grows: memory, handles, time.

    python tools/soak.py                       5,000 steps, four minutes and more, a row in tools/results/soak.csv
    python tools/soak.py --steps 1000 --csv /tmp/soak.csv --samples /tmp/samples.csv

The run is that of chaos.py (a tiny model, weights, activations, saved inputs, moments and gradients on disk), with a
checkpoint and an evaluation every tenth of the steps. At every 50th step the process looks at itself: resident set, private
memory (VmData), open descriptors, threads, bytes of its page files, and the median seconds of these 50 steps.

The rule: the medians of the last tenth of the samples are compared with those of the first tenth, after 1% of warm-up.
Memory and page files may be larger by 1%, descriptors and threads must be equal in number, a step may take 5% more or less
(a quicker end is no growth, but says that the machine was not the same, and then the figure is worth nothing). The seconds
are those of the clock, so the machine must be quiet; the CPU's seconds stand beside them in the row: where they change by
the same, and rise above the clock's, others were at work on it. Linux only: it reads /proc.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench_peers import append, check_csv, commit, versions
from chaos import ALONE, N_ROWS, SETTINGS

from lopt_edge.config.load import load_config
from lopt_edge.config.settings import Config
from lopt_edge.doctor.check_machine import cpu_device
from lopt_edge.training.session.progress import Progress

EVERY = 50  # steps of a sample
WARM_UP_SHARE, PART = 0.01, 0.1  # of the samples: left out, and compared
MOST_GROWTH, MOST_SECONDS_CHANGE = 0.01, 0.05
LEAST_SAMPLES = 20  # two in a tenth


@dataclass(frozen=True)
class Sample:
    """A sample: what the process takes after `step` steps; seconds are of the steps since the sample before, each."""

    step: int
    resident_bytes: int
    private_bytes: int
    descriptors: int
    threads: int
    page_bytes: int
    step_seconds: float
    cpu_seconds: float


GROWING = ("resident_bytes", "private_bytes", "page_bytes")
COUNTED = ("descriptors", "threads")
WATCHED = (*GROWING, *COUNTED, "step_seconds", "cpu_seconds")
COLUMNS = ("date", "hardware", "versions", "commit", "steps", "samples",
           *(f"{when}_{name}" for when in ("first", "last") for name in WATCHED),
           "step_seconds_ratio", "cpu_seconds_ratio", "seconds", "faults")  # fmt: skip


class Sampler(Progress):
    """A listener that hears of every step and takes a sample at some."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self._seconds: list[float] = []
        self._cpu_seconds = time.process_time()

    def step(self, metrics: Mapping[str, Any]) -> None:
        self._seconds.append(metrics["step_seconds"])
        if metrics["step"] % EVERY:
            return
        cpu_seconds = time.process_time()
        self.samples.append(take(metrics["step"], median(self._seconds), (cpu_seconds - self._cpu_seconds) / EVERY))
        self._seconds, self._cpu_seconds = [], cpu_seconds


def take(step: int, step_seconds: float, cpu_seconds: float) -> Sample:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    resident, private = (int(status[name].split()[0]) << 10 for name in ("VmRSS", "VmData"))  # given in KiB
    links = {entry: _target(entry) for entry in Path("/proc/self/fd").iterdir()}
    page_bytes = sum(entry.stat().st_size for entry, target in links.items() if "lopt-pages-" in target)
    descriptors = sum(target != "" for target in links.values())
    return Sample(step, resident, private, descriptors, int(status["Threads"]), page_bytes, step_seconds, cpu_seconds)


def _target(entry: Path) -> str:
    """The target that a descriptor points at; empty for the one that listed the folder and is closed again."""
    try:
        return os.readlink(entry)
    except FileNotFoundError:
        return ""


def ends(samples: Sequence[Sample]) -> tuple[dict[str, float], dict[str, float]]:
    """The medians of the first tenth, after the warm-up, and of the last one."""
    warm, part = max(1, round(WARM_UP_SHARE * len(samples))), max(1, round(PART * len(samples)))
    tenths = samples[warm : warm + part], samples[-part:]
    first, last = ({name: median(getattr(sample, name) for sample in tenth) for name in WATCHED} for tenth in tenths)
    return first, last


def verdict(samples: Sequence[Sample]) -> list[str]:
    """The sentences about what grew; empty if nothing did."""
    if len(samples) < LEAST_SAMPLES:
        return [f"{len(samples)} samples are too few: {LEAST_SAMPLES * EVERY} steps are the least"]
    first, last = ends(samples)
    said = [
        f"{name} grew from {first[name]:,.0f} to {last[name]:,.0f}"
        for name in GROWING
        if last[name] > first[name] * (1 + MOST_GROWTH)
    ]
    said += [f"{name} went from {first[name]:g} to {last[name]:g}" for name in COUNTED if last[name] != first[name]]
    if abs(last["step_seconds"] / first["step_seconds"] - 1) > MOST_SECONDS_CHANGE:
        said.append(f"a step took {first['step_seconds']:.4f} s first and {last['step_seconds']:.4f} s at the end")
    return said


def soak(options: Namespace, folder: Path) -> list[Sample]:
    from lopt_edge.training.run import finetune
    from tools.tiny_runs import make_model, write_rows

    made = {"model": make_model(folder / "model"), "data": write_rows(folder / "train.jsonl", N_ROWS)}
    places = {**made, "cache_dir": folder / "cache", "output": folder / "out"}
    often = max(1, options.steps // 10)
    changes = {"resume": None, "save_every": often, "save_minutes": 0, "eval_every": often, "max_steps": options.steps}
    config: Config = load_config(None, {**SETTINGS, **{name: str(at) for name, at in places.items()}, **changes})
    sampler = Sampler()
    finetune(config, sampler)
    return sampler.samples


def row_of(samples: Sequence[Sample], options: Namespace, seconds: float) -> dict[str, Any]:
    cpu, (first, last) = cpu_device(), ends(samples)
    ratios = {f"{name}_ratio": round(last[name] / first[name], 4) for name in ("step_seconds", "cpu_seconds")}
    medians = {
        f"{when}_{name}": round(value, 5) if "seconds" in name else round(value)
        for when, found in (("first", first), ("last", last))
        for name, value in found.items()
    }
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": f"{cpu.model}, {cpu.cores} cores",
        "versions": ", ".join([f"python {sys.version.split()[0]}", *versions()]),
        "commit": commit(),
        "steps": options.steps,
        "samples": len(samples),
        **medians,
        **ratios,
        "seconds": round(seconds, 1),
        "faults": "; ".join(verdict(samples)),
    }


def show(row: Mapping[str, Any]) -> None:
    print(f"{'':16}{'first tenth':>16}{'last tenth':>16}")
    for name in WATCHED:
        print(f"{name:16}{row[f'first_{name}']:>16,}{row[f'last_{name}']:>16,}")


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Sample))
        writer.writerows(astuple(sample) for sample in samples)


def parse() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000, help="(default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="on a disk, for everything (default: the temporary folder)")
    parser.add_argument("--csv", type=Path, default=Path(__file__).parent / "results" / "soak.csv", help="appended to")
    parser.add_argument("--samples", type=Path, help="write all samples there, as CSV")
    options = parser.parse_args()
    if options.steps < LEAST_SAMPLES * EVERY:
        parser.error(f"--steps must be at least {LEAST_SAMPLES * EVERY}")
    return options


def main() -> None:
    options = parse()
    check_csv(options.csv, COLUMNS)
    if any(os.environ.get(name) != value for name, value in ALONE.items()):  # they count when libraries are loaded
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALONE})
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-", dir=options.folder) as folder:
        samples = soak(options, Path(folder))
    row = row_of(samples, options, time.monotonic() - began)
    show(row)
    append(options.csv, [row], COLUMNS)
    if options.samples:
        write_samples(options.samples, samples)
    if said := verdict(samples):
        sys.exit("\n".join(["FAILED", *said]))
    print("nothing grew")


if __name__ == "__main__":
    main()
