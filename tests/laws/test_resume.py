"""Design law 7: a resumed run equals an uninterrupted one, bitwise: the adapter's bytes and the log, times and peaks aside.

Runs are stopped for real, by SIGTERM in this process, at a chosen micro-batch of a chosen step, and go on with other
memory settings than they began with. Each runs four windows of two micro-batches (one epoch and a bit).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lopt_edge import finetune
from lopt_edge.config.settings import Config
from lopt_edge.errors import Interrupted
from lopt_edge.run.model.lora import ADAPTER_NAME
from lopt_edge.training.checkpoint.folder import CHECKPOINTS
from lopt_edge.training.prepare.read import read_inputs
from tools.tiny_runs import log_of, make_config, make_model, write_rows

PAGED = {"weights": "disk", "activations": "page", "saved_inputs": "disk", "optimizer_states": "disk", "gradients": "disk"}
MIXED = {"weights": "resident,2-3=disk", "activations": "recompute,1=page", "gradients": "disk"}
KEPT = {"weights": "resident", "activations": "keep", "optimizer_states": "device", "gradients": "device"}
Stop = Callable[[int, int], None]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


def what_is_left(config: Config) -> tuple[bytes, list[dict[str, Any]]]:
    """The adapter's bytes, and the log without what is measured."""
    return (Path(config.output) / ADAPTER_NAME).read_bytes(), log_of(config)


class Runs:
    """Undisturbed runs, made once for each set of settings."""

    def __init__(self, model: Path, root: Path) -> None:
        self.model, self.root, self.known = model, root, {}

    def config(self, name: str, **settings: Any) -> Config:
        values = {"n_rows": 15, "max_steps": 4, **settings}
        return make_config(self.model, self.root, output=name, **values)

    def undisturbed(self, **settings: Any) -> tuple[bytes, list[dict[str, Any]]]:
        key = json.dumps(settings, sort_keys=True)
        if key not in self.known:
            config = self.config(f"whole-{len(self.known)}", **settings)
            finetune(config)
            self.known[key] = what_is_left(config)
        return self.known[key]


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory) -> Runs:
    return Runs(model, tmp_path_factory.mktemp("runs"))


def stopped(config: Config, *, in_folder: str) -> None:
    with pytest.raises(Interrupted) as caught:
        finetune(config)
    assert caught.value.exit_code == 143
    assert f"{CHECKPOINTS}/{in_folder}" in str(caught.value) and "lopt-edge resume" in str(caught.value)


def resumed(config: Config, **changes: Any) -> Config:
    return config.model_copy(update={"resume": "auto", **changes})


@pytest.mark.parametrize(
    ("method", "before", "after"),
    [
        ("lopt", PAGED, KEPT),
        ("lopt", MIXED, PAGED),
        ("e2e", KEPT, PAGED),
        ("e2e", PAGED, MIXED),
        ("frozen", KEPT, MIXED),
        ("mlaan", KEPT, PAGED),
    ],
)
def test_inside_a_window_with_other_paging_afterwards(runs, tmp_path, stop_in, method, before, after):
    settings = {"method": method, "eval_fraction": 0.2, "eval_every": 2}
    whole = runs.undisturbed(**settings)
    config = runs.config(f"{tmp_path.name}", **settings)
    stop_in(3, 0)
    stopped(config.model_copy(update=before), in_folder="step-000002+2")
    finetune(resumed(config, **after))
    assert what_is_left(config) == whole


def test_a_run_goes_on_with_the_rows_that_it_began_with(runs, tmp_path, stop_in):
    config = runs.config(f"{tmp_path.name}", packing=True, row_tokens=48)
    stop_in(2, 0)
    with pytest.raises(Interrupted):
        finetune(config)
    inputs, start = read_inputs(resumed(config, packing=False, row_tokens=None))
    assert start is not None and inputs.config.packing and inputs.config.row_tokens == 48
    assert any("packing has no effect: the run goes on as it began, rows of 48" in text for text in inputs.warnings)


@pytest.mark.parametrize(
    "settings",  # several kinds of state in a run; long: those of which another case has all, and more
    [
        pytest.param({"optimizer": "adamw8bit"}, marks=pytest.mark.long),
        {"lora_dropout": 0.3, "apply": "segment"},
        {"apply": "layer", "clip": 0.0, "grad_accum": 1},
        {
            "clip_scope": "global",
            "num_segments": 4,
            "schedule": "linear",
            "weight_decay": 0.1,
            "batch_size": 3,
            "grad_accum": 3,
            "sample_prompt": "What is 3?",
            "seed": 9,
        },
        {"eval_fraction": 0.3, "eval_every": 1, "keep_best": True},
        pytest.param({"method": "lcsb"}, marks=pytest.mark.long),
        {"method": "lcsb", "selection": "uniform", "unselected": "rest"},
        pytest.param({"method": "top-layers", "train_layers": 3}, marks=pytest.mark.long),
        {"local_every": 2, "open_every": 3},
        {"open_until": 0.5, "n_rows": 4, "max_steps": 5},
        {"reach": "0.5:all,0.8:3,1:half", "optimizer": "adamw8bit"},
        {"reach": "auto", "max_steps": 12, "lr": 3e-2},
        {"boundary_update": "fresh"},
        pytest.param({"method": "segprop", "tail_layers": 1, "stages": 3}, marks=pytest.mark.long),
        {"method": "let", "align_layer": 1},
        pytest.param({"method": "let-local", "align_until": 0.75}, marks=pytest.mark.long),
        {"method": "segprop", "tail_layers": 2, "stages": 2, "eval_fraction": 0.3, "eval_every": 1, "stage_patience": 1},
        {"local_loss": "next-token", "num_segments": 3, "packing": True, "row_tokens": 48, "eval_fraction": 0.2},
    ],
    ids=lambda settings: "-".join(map(str, list(settings.items())[-1])),
)
def test_every_kind_of_state_is_kept(runs, tmp_path, stop_in, settings):
    """Two stops: in the second window's first micro-batch, and in the fourth one's last."""
    whole = runs.undisturbed(**settings)
    config = runs.config(f"{tmp_path.name}", **settings)
    for step, micro_batch in ((2, 0), (4, 1 if config.grad_accum > 1 else 0)):
        stop_in(step, micro_batch)
        with pytest.raises(Interrupted):
            finetune(resumed(config))
    finetune(resumed(config, **PAGED))
    assert what_is_left(config) == whole


def test_three_resumes_within_an_epoch_and_one_at_its_end(runs, tmp_path, stop_in):
    settings = {"n_rows": 16, "max_steps": 7, "grad_accum": 2}  # four windows an epoch
    whole = runs.undisturbed(**settings)
    config = runs.config(f"{tmp_path.name}", **settings)
    for step, micro_batch in ((1, 0), (2, 1), (3, 0), (4, 1), (6, 0)):  # (4, 1): the epoch's last micro-batch
        stop_in(step, micro_batch)
        with pytest.raises(Interrupted):
            finetune(resumed(config))
    finetune(resumed(config))
    assert what_is_left(config) == whole


def test_a_finished_run_that_is_resumed_stays_as_it_is(runs, tmp_path):
    config = runs.config(f"{tmp_path.name}")
    finetune(config)
    before = what_is_left(config)
    finetune(resumed(config))
    assert what_is_left(config) == before == runs.undisturbed()


def test_more_steps_go_on_from_the_end(runs, tmp_path):
    """With a constant rate the steps of a longer run are the same ones."""
    settings = {"schedule": "constant", "warmup_ratio": 0.0}
    config = runs.config(f"{tmp_path.name}", **settings)
    finetune(config)
    finetune(resumed(config, max_steps=6))
    assert what_is_left(config) == runs.undisturbed(**settings, max_steps=6)


def test_another_number_of_rows_changes_the_run_and_is_refused(runs, tmp_path, stop_in):
    config = runs.config(f"{tmp_path.name}")
    stop_in(3, 0)
    stopped(config, in_folder="step-000002+2")
    write_rows(Path(config.data), 16)
    from lopt_edge.errors import InputErrors

    with pytest.raises(InputErrors, match="gave 15 examples before and 16 now"):
        finetune(resumed(config))
    write_rows(Path(config.data), 15)
    finetune(resumed(config))
    assert what_is_left(config) == runs.undisturbed()
