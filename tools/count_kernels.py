"""Counts what one decoder layer asks of a CUDA device, on a card in name (tests/fake_device): no GPU is needed.

    python tools/count_kernels.py [--tokens 2048] [--blocks 14336,4096,1024] [--kernels torch] [--label TREE]

For each block of MLP features (the planner's knob), a row is added to tools/results/kernels.csv: kernels in the layer's
FORWARD and in its BACKWARD, which makes the graph again, and the gigabytes that they read and write outside matrix products
and attention. It prints the kernels by name as well. The counts are of what torch is called for; a library may launch more
than one kernel in a call, which no count here sees. It measures no time.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.fake_device import shim  # noqa: E402

TABLE = Path(__file__).resolve().parent / "results" / "kernels.csv"
COLUMNS = (
    "tree", "preset", "tokens", "block", "kernels", "forward_kernels", "backward_kernels", "forward_gb", "backward_gb",
)  # fmt: skip


def counts(preset: str, n_tokens: int, blocks: list[int], kernels: str) -> list[dict[str, Any]]:
    """What the card in name counted for each block, in a child process: its shim comes before torch."""
    with tempfile.TemporaryDirectory(prefix="lopt-edge-count-") as folder:
        names = [f"layer {preset} {n_tokens} {block} {kernels}" for block in blocks]
        words = [sys.executable, "-m", "tests.fake_device.child", str(shim.build(Path(folder))), folder, *names]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    faults = [one["error"] for one in found if "error" in one]
    if faults or len(found) != len(names):
        raise SystemExit(faults[0] if faults else done.stderr[-2000:])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama-3.1-8b")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--blocks", default="14336,4096,1024")
    parser.add_argument("--kernels", choices=("torch", "triton"), default="torch", help="whose, where there are both")
    parser.add_argument("--label", default="", help="what the rows are called (default: the commit)")
    parser.add_argument("--csv", type=Path, default=TABLE)
    options = parser.parse_args()
    if (reason := shim.why_not()) is not None:
        raise SystemExit(reason)
    blocks = [int(block) for block in options.blocks.split(",")]
    label = options.label or _commit()
    is_new = not options.csv.exists()
    options.csv.parent.mkdir(parents=True, exist_ok=True)
    with options.csv.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(COLUMNS)
        for block, found in zip(blocks, counts(options.preset, options.tokens, blocks, options.kernels), strict=True):
            forward, backward = found["ops"]
            sums = [sum(op["kernels"].values()) for op in (forward, backward)]
            traffic = [op["bytes_outside"] / 1e9 for op in (forward, backward)]
            writer.writerow(
                (label, options.preset, options.tokens, block, options.kernels, *sums, *(f"{gb:.2f}" for gb in traffic))
            )
            print(f"blocks of {block}: {sum(sums)} kernels, {sum(traffic):.2f} GB outside products")
            for op in (forward, backward):
                print(f"  {op['op']}: " + ", ".join(f"{name} {n}" for name, n in op["kernels"].items()))


def _commit() -> str:
    words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
