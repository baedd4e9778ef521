"""SegProp as runs: stages, their learning rates, their evaluations, early ends, and a cache for each stage."""

from __future__ import annotations

from pathlib import Path

import pytest

from lopt_edge import finetune
from lopt_edge.errors import InputError
from lopt_edge.run.model.lora import ADAPTER_NAME
from tools.tiny_runs import make_config, make_model, metrics_of

STEPS = {"method": "segprop", "tail_layers": 1, "n_rows": 8, "batch_size": 2, "grad_accum": 2}  # two steps an epoch


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


def test_each_stage_has_its_share_and_its_own_schedule(model, tmp_path):
    config = make_config(model, tmp_path, stages=3, max_steps=9, **STEPS)
    finetune(config)
    steps, _ = metrics_of(config)
    assert [step["kind"] for step in steps] == ["stage-1"] * 3 + ["stage-2"] * 3 + ["stage-3"] * 3
    rates = [max(step["lr"]) for step in steps]
    assert rates[:3] == rates[3:6] == rates[6:]


def test_a_stage_is_evaluated_as_the_network_that_it_is(model, tmp_path):
    """Before the run and after the last stage that is the whole model."""
    settings = {"eval_data": str(tmp_path / "train.jsonl"), "eval_every": 1, **STEPS}
    config = make_config(model, tmp_path, stages=2, max_steps=4, lr=1e-9, **settings)
    finetune(config)  # next to nothing is learned: what differs is the network
    _, evaluations = metrics_of(config)
    losses = [line["eval_loss"] for line in evaluations]
    assert losses[0] == pytest.approx(losses[4], abs=1e-4) == pytest.approx(losses[3], abs=1e-4)
    assert losses[1] == pytest.approx(losses[2], abs=1e-4)
    assert abs(losses[1] - losses[0]) > 1e-3


def test_a_stage_ends_where_its_loss_does_not_fall(model, tmp_path):
    settings = {"eval_fraction": 0.3, "eval_every": 1, "stage_patience": 2, **STEPS}
    config = make_config(model, tmp_path, stages=2, max_steps=16, **{**settings, "lr": 0.3, "n_rows": 12})
    finetune(config)  # at that rate the loss rises soon
    steps, _ = metrics_of(config)
    first = [step["kind"] for step in steps].count("stage-1")
    assert 3 <= first < 8 and steps[-1]["kind"] == "stage-2"
    assert "stage ended" in (Path(config.output) / "events.jsonl").read_text()


def test_the_stages_of_a_run_under_way_do_not_move(model, tmp_path):
    config = make_config(model, tmp_path, stages=2, max_steps=4, save_every=1, **STEPS)
    finetune(config)
    with pytest.raises(InputError, match="max_steps: was 4, is 8 now"):
        finetune(config.model_copy(update={"resume": "auto", "max_steps": 8}))


def test_each_stage_has_a_cache_and_it_changes_nothing_beyond_rounding(model, tmp_path):
    cache = tmp_path / "cache"
    config = make_config(model, tmp_path, stages=2, epochs=6, boundary_cache=str(cache), **STEPS)
    finetune(config)
    steps, _ = metrics_of(config)
    kinds = ["stage-1"] * 6 + ["stage-2-fill"] * 2 + ["stage-2-read"] * 4
    assert [step["kind"] for step in steps] == kinds
    assert len(list(cache.glob("stage-*"))) == 1
    again = make_config(model, tmp_path, output="again", stages=2, epochs=6, boundary_cache=str(cache), **STEPS)
    finetune(again)
    assert [step["kind"] for step in metrics_of(again)[0]] == ["stage-1"] * 6 + ["stage-2-read"] * 6
    first, second = ((Path(one.output) / ADAPTER_NAME).read_bytes() for one in (config, again))
    assert first == second
    other = make_config(model, tmp_path, output="other", boundary_cache=str(cache), stages=2, **{**STEPS, "n_rows": 9})
    with pytest.raises(InputError, match="cache of another run: data"):
        finetune(other)


@pytest.mark.parametrize(("settings", "match"), [
    ({"stages": 4}, "4 are more than the 3 layers"),
    ({"stages": 3, "max_steps": 2}, "3 stages need as many steps"),
    ({"boundary_cache": "x", "lora_dropout": 0.1}, "dropout changes it each time"),
    ({"tail_layers": 4}, "leave no layer before them"),
    ({"stage_patience": 1}, "needs evaluations"),
    ({"keep_best": True, "eval_fraction": 0.3}, "keep-best"),
])  # fmt: skip
def test_what_cannot_be_is_refused(model, tmp_path, settings, match):
    with pytest.raises(InputError, match=match):
        finetune(make_config(model, tmp_path, **{**STEPS, **settings}))
