"""Whole steps on a card in name (tests/fake_device): what CUDA would be asked to do, on a machine without a GPU.

- no tensor of the host meets one of the card, bitsandbytes' kernels get what they ask for, and no refusal of the driver is
  left behind: any of it fails the step
- where the host waits for the card, and how many kernels an op launches, is pinned: a number that grows is a regression,
  one that falls is to be lowered here
- design law 6 on the card's path: planned bytes equal tracked ones, but for what a fused kernel takes inside, which no
  tracker sees and the plan counts

A few steps run by default in one child process; every family and method with `-m long`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fake_device import shim

ROOT = Path(__file__).parents[2]
NORMS = "STEP: a copy cuda -> cpu is not asked to run beside"  # and the losses, which are read with them
# One, at a step's end, batches sent up and rows read ahead included. It was 5, 3, 7 (an lm_head on disk, in chunks) and 3.
WAITS = {name: {NORMS: 1} for name in ("resident", "on the host", "tiers and 8 bits", "Turing", "our kernels")} | {
    "two ranks": {NORMS.replace("STEP", "AGREE"): 1}
}
KERNELS = {  # by kind of op, over two layers; "-": of the batches, before the first one
    "resident": {"-": 5, "EMBED": 26, "FORWARD": 292, "LOSS": 220, "BACKWARD": 538, "STEP": 20},
    "on the host": {"-": 3, "EMBED": 13, "FETCH": 2, "FORWARD": 146, "PAGE_OUT": 8, "LOSS": 70, "PAGE_IN": 8,
                    "BACKWARD": 292, "STORE": 3, "LOAD": 5, "STEP": 11},
}  # fmt: skip
# One layer of an 8B, 2,048 tokens, its MLP in one block. Before the last changes: 307 and 787 kernels, 3.31 and 7.93 GB.
LAYER, OWN_LAYER = (f"layer llama-3.1-8b 2048 14336 {kernels}" for kernels in ("torch", "triton"))
COUNTS = {LAYER: ([72, 205], [1.28, 2.79]), OWN_LAYER: ([63, 177], [1.00, 1.79])}
KERNELS_OF_LAW_6 = {"bytes, flash": "flash", "bytes, deterministic": "efficient", "bytes, our kernels": "flash"}
REGISTERED = dict.fromkeys(WAITS, 1)
pytestmark = pytest.mark.skipif(shim.why_not() is not None, reason=shim.why_not() or "")


def run(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """The findings of cases, which run in a child process."""
    command = [sys.executable, "-m", "tests.fake_device.child", str(shim.build(folder)), str(folder), *names]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0 and len(found) == len(names), done.stderr[-3000:]
    for one in found:
        assert "error" not in one, f"{one['name']}: {one['error']}"
    return {one["name"]: one for one in found}


def test_steps_on_a_card_in_name(tmp_path):
    """One test: the child takes longer to start than a case to run."""
    found = run(tmp_path, [*WAITS, *KERNELS_OF_LAW_6, *COUNTS])
    for name, (n_kernels, gigabytes) in COUNTS.items():
        assert [sum(op["kernels"].values()) for op in found[name]["ops"]] == n_kernels
        assert [round(op["bytes_outside"] / 1e9, 2) for op in found[name]["ops"]] == gigabytes
    steps = {name: found[name]["kinds"]["step"] for name in WAITS}
    assert {name: step["waits"] for name, step in steps.items()} == WAITS
    assert {name: steps[name]["kernels"] for name in KERNELS} == KERNELS
    assert {name: step["n_registered"] for name, step in steps.items()} == REGISTERED
    for name, kernel in KERNELS_OF_LAW_6.items():
        check_bytes(found[name]["rows"])
        assert found[name]["attention"] and all(kernel in called for called in found[name]["attention"])


CONSTANTS = 2048  # bytes: code maps, offsets, rotary bases, which the card's allocator counts and no plan does


def check_bytes(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert -CONSTANTS <= row["held_predicted"] - row["held"] <= 64, row
        assert row["peak_predicted"] >= row["peak"] - CONSTANTS, row
    assert max(row["peak_predicted"] for row in rows) <= 1.1 * max(row["peak"] for row in rows), "a kernel's workspace"


@pytest.mark.long
def test_every_family_and_method(tmp_path):
    from tests.fake_device.cases import LAW_6, MORE

    found = run(tmp_path, [*MORE, *LAW_6])
    for name in LAW_6:
        check_bytes(found[name]["rows"])
    waits = found["mixed weights"]["kinds"]["step"]["waits"]
    assert max(waits.values()) <= 14, "once a product, whatever its blocks"
