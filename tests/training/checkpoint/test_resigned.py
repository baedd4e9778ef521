"""A checkpoint that somebody changed and whose sums were made right: a message and exit code 2, whatever was put into it.

What cannot be seen to be wrong (another loss, other moments) goes on; that is the price of a checkpoint that can be edited.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lopt_edge import finetune
from lopt_edge.config.settings import Config
from lopt_edge.training.checkpoint.folder import CHECKPOINTS, MANIFEST, STATE, name_of, new_checkpoint
from tools.tiny_runs import make_config, make_model

NAN, HUGE = float("nan"), 10**30
RUN: dict[str, tuple[Any, ...]] = {
    "steps": (-1, "2", 2.0, None, True, [], 10**9, HUGE), "sequences": (-1, "x"), "tokens": ("many", HUGE),
    "losses": ([], {"0": "x"}, {"0": NAN}), "seconds": ({"train": NAN}, {"train": "x"}, {"train": -1.0}, 3),
    "final_loss": ("x", NAN), "loss_scale": (0, -1.0, NAN, "x", None), "evaluated": (-2, "x"), "log_bytes": (-1, "x", HUGE),
    "level": (None, {"n_steps": "x", "mean": 0.0, "variance": 0.0}, {"n_steps": 1, "mean": 0.0, "variance": -1.0}),
    "best": (3, {"eval_loss": "x"}), "samples": ({"before": 3}, "x"), "skip": ("x", [-1], [1.5]), "stage_ends": ({}, ["x"]),
    "peak_rss_bytes": ("x", -5), "unlogged": ({"a": NAN}, 3), "before": ({"eval_loss": None},), "stage": (-1,),
}  # fmt: skip
SETTLED: dict[str, tuple[Any, ...]] = {
    "batch_size": (10**9, 0, -2, "2", 2.0, None, True), "grad_accum": (10**9, 0, "x"), "num_segments": (10**9, 0, "x"),
    "token_tile": (-1, "x", 10**12, 1.5),
}  # fmt: skip
OTHERS: dict[str, tuple[Any, ...]] = {
    "run": (None, [], "x"), "settled": (None, {}, []), "config": (None, [], {"lr": "x" * 10**6}), "data": (3, {}),
    "model": (3, "x" * 10**6), "compute_dtype": (3, "x\x1b[2J" * 10**5), "updates": (None, {}, {"layer.0": "x"}),
    "python_random": (None, [3, [0] * 625, "x"], [3, [10**18] * 625, None], [3, [], None]),
}  # fmt: skip
Change = Callable[[dict[str, Any]], None]


def put(*path: str, value: Any) -> Change:
    def change(state: dict[str, Any]) -> None:
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value

    return change


CHANGES = {
    f"{'.'.join((*place, key))} {str(value)[:20]!r}": put(*place, key, value=value)
    for place, group in (((("run",)), RUN), ((("settled",)), SETTLED), ((), OTHERS))
    for key, values in group.items()
    for value in values
}


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Config:
    root = tmp_path_factory.mktemp("done")
    config = make_config(make_model(root / "tiny"), root, n_rows=10, max_steps=2, save_every=1)
    finetune(config)
    return config


def resigned(config: Config, root: Path, change: Change) -> Path:
    """A copy of the run's folder, its newest checkpoint changed and signed."""
    output = Path(shutil.copytree(config.output, root / "out"))
    folder = output / CHECKPOINTS / name_of(2)
    state = json.loads((folder / STATE).read_text())
    change(state)
    shutil.move(folder, root / "before")
    with new_checkpoint(output / CHECKPOINTS, name_of(2)) as new:
        for path in (root / "before").iterdir():
            if path.name != MANIFEST:
                shutil.copy(path, new / path.name)
        (new / STATE).write_text(json.dumps(state))
    return output


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_absurd_values_are_refused(done, tmp_path, command, change):
    output = resigned(done, tmp_path, change)
    code, _, err = command("resume", output)
    assert code == 2 and len(err) < 4000 and "\x1b" not in err, err[:2000]
    assert "step-000002" in err.replace("\n", "") or "resume" in err


def test_a_checkpoint_that_was_signed_again_without_a_change_goes_on(done, tmp_path, command):
    assert command("resume", resigned(done, tmp_path, lambda state: None))[0] == 0


def test_settings_that_nobody_settles_are_not_taken_from_it(done, tmp_path, command):
    elsewhere = tmp_path / "elsewhere"
    output = resigned(done, tmp_path, put("settled", "output", value=str(elsewhere)))
    assert command("resume", output)[0] == 0 and not elsewhere.exists()
