"""The screen of a run: it fits its terminal, nothing is lost, and what is shown is what was reported."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from lopt_edge.cli.progress import Smoothed, TerminalProgress, fitted, in_clock, used

FACTS = [("model", "a-model-with-a-name: LlamaForCausalLM, 8 layers"), ("data", "words of some length " * 8)]


def metrics(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 4.0 - step / 1000, "local_loss": [0.5, 0.25], "lr": [2e-3, 2e-5], "tokens": 900,
            "step_seconds": 0.5, "peak_device_bytes": 500 << 20, **more}  # fmt: skip


def shown(width: int, *, terminal: bool, verbose: bool = False) -> list[str]:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=width, color_system=None, legacy_windows=False)
    progress = TerminalProgress(console, verbose=verbose)
    progress.phase("load")
    progress.facts(FACTS)
    progress.detail("why it was chosen")
    progress.warn("a long warning " * 10)
    progress.start(1000, budget_bytes=16 << 30)
    for step in (1, 2, 1000):
        progress.step(metrics(step))
    progress.evaluated(1000, {"eval_loss": 3.5, "retention_loss": 3.25})
    progress.step(metrics(1000))
    progress.stop()
    return re.split("[\\r\\n]", re.sub("\x1b\\[[0-9?]*[a-zA-Z]", "", file.getvalue()))


@pytest.mark.parametrize("width", [60, 80, 120])
def test_it_fits_the_terminal_and_breaks_no_word(width):
    lines = shown(width, terminal=True)
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    assert "words of some length words" in text and "a long warning a long warning" in text
    assert "step 1000: held-out loss 3.5000, retention loss 3.2500" in text
    assert "why it was chosen" not in text
    live = [line for line in lines if "1000/1000" in line][-1]
    assert "loss 3." in live and "0:00 left" in live
    assert ("lr 2.0e-3" in live and "1,800 tok/s" in live and "0.5/16.0 GiB" in live) == (width >= 80)
    assert ("held-out 3.500" in live) == (width >= 120)


def test_without_a_terminal_each_thing_is_one_line():
    lines = shown(80, terminal=False, verbose=True)
    assert any(line.startswith("data    words of some length") and len(line) > 100 for line in lines)
    assert "why it was chosen" in lines
    assert any(line.startswith("step 1000/1000  loss ") and "local 0.5000 0.2500" in line for line in lines)


def test_the_shown_loss_is_the_mean_of_the_last_ones():
    mean = Smoothed()
    assert mean.add(4.0) == 4.0
    assert mean.add(2.0) == pytest.approx((0.9 * 4 + 2) / 1.9)


def test_small_words():
    assert fitted([(0, "loss"), (2, "x" * 9), (1, "left")], 12) == "loss  left"
    assert (in_clock(42), in_clock(725), in_clock(11240)) == ("0:42", "12:05", "3:07:20")
    assert (used(500 << 20, None), used(500 << 20, 2 << 30)) == ("500 MiB", "500/2,048 MiB")
