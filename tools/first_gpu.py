"""The first minutes on a card: its proofs, the GPU tests, a model in a real shape and the benches, one after the other.

    python tools/first_gpu.py --output first-gpu --minutes 10

Each part is a process of its own with what is left of the time; a part that fails, or has no time left, is a row like
others, and the next one runs. Rows go to steps.csv (part, exit code, seconds, the last line it said), what each wrote to a
log of its own, the proofs to proofs.json; the benches keep their own CSV files. It exits with 1 if a part failed. Where
torch sees no card, the parts that need one are left out and said so; the proofs then are those of the CPU.

The rule: a number that it measures goes to tools/results with the card's name, never into a table of predictions.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT, TIMED_OUT = -1, 124  # for want of a card or of time; killed at its limit


@dataclass(frozen=True)
class Part:
    """A command to run; `share` of the time that is left is its limit. `needs_card`: it is left out without one."""

    name: str
    command: tuple[str, ...]
    share: float
    needs_card: bool = True


@dataclass(frozen=True)
class Row:
    """What became of a part."""

    part: str
    exit_code: int
    seconds: float
    last_line: str


def parts(output: Path) -> list[Part]:
    """The parts, the cheapest and most telling first."""
    python, model = sys.executable, str(output / "llama-3.2-1b")
    tool = [str(ROOT / "tools" / f"{name}.py") for name in ("make_model", "bench_peers", "bench_context")]
    on_card, start = ("--device", "cuda", "--seq-len", "2048"), "from lopt_edge.cli.main import main; main()"
    bench = (python, tool[1], "--model", model, *on_card, "--steps", "5", "--repeats", "1")
    context = (
        python,
        tool[2],
        "--model",
        model,
        "--device",
        "cuda",
        "--settings",
        "resident,streamed",
        "--seq-len",
        "2048",
    )
    return [
        Part("proofs", (python, "-c", start, "doctor", "--prove", "--json"), 0.5, needs_card=False),
        Part("tests", (python, "-m", "pytest", "-q", "-n", "0", "-m", "gpu", str(ROOT / "tests" / "test_cuda.py")), 0.4),
        Part("model", (python, tool[0], "--shape", "llama-3.2-1b", "--output", model), 0.4),
        Part("peers", (*bench, "--csv", str(output / "peers.csv")), 0.6),
        Part("context", context, 1.0),
    ]


def run_parts(found: Sequence[Part], output: Path, *, seconds: float, has_card: bool) -> list[Row]:
    """Run the parts one after the other, and write a row for each as it ends."""
    end, rows = time.monotonic() + seconds, []
    output.mkdir(parents=True, exist_ok=True)
    with (output / "steps.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in fields(Row)])
        for part in found:
            left = end - time.monotonic()
            if part.needs_card and not has_card:
                row = Row(part.name, LEFT_OUT, 0.0, "left out: torch sees no CUDA device")
            elif left < 1:
                row = Row(part.name, LEFT_OUT, 0.0, "left out: no time")
            else:
                row = _run(part, output, limit_seconds=part.share * left)
            rows.append(row)
            writer.writerow(astuple(row))
            file.flush()
            print(f"{row.part:8s} {row.exit_code:4d} {row.seconds:7.1f} s  {row.last_line}", flush=True)
    return rows


def _run(part: Part, output: Path, *, limit_seconds: float) -> Row:
    started, log = time.monotonic(), output / f"{part.name}.log"
    target = output / "proofs.json" if part.name == "proofs" else log
    with target.open("w", encoding="utf-8") as out, log.open("a", encoding="utf-8") as errors:
        try:
            code = subprocess.run(
                part.command, cwd=ROOT, stdout=out, stderr=errors, timeout=limit_seconds, env=os.environ
            ).returncode
        except subprocess.TimeoutExpired:
            code = TIMED_OUT
        except OSError as error:
            errors.write(f"{error}\n")
            code = 127
    said = [line for path in (log, target) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return Row(part.name, code, round(time.monotonic() - started, 1), said[-1].strip()[:200] if said else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("first-gpu"))
    parser.add_argument("--minutes", type=float, default=10.0)
    options = parser.parse_args()
    if not options.minutes > 0:
        parser.error("--minutes: must be above 0")
    import torch

    output = options.output.absolute()
    rows = run_parts(parts(output), output, seconds=60 * options.minutes, has_card=torch.cuda.is_available())
    if any(row.exit_code not in (0, LEFT_OUT) for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
