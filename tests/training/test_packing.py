"""Packed runs: the steps, losses and adapter of an unpacked one; when it is chosen; what is refused and warned of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lopt_edge import finetune
from lopt_edge.data import packed_window
from lopt_edge.errors import InputError
from lopt_edge.planning.packing import micro_batches
from lopt_edge.run.model.lora import ADAPTER_NAME
from lopt_edge.training.prepare.read import read_inputs
from lopt_edge.training.recovery import smaller_plan
from tools.tiny_runs import make_config, make_model, metrics_of


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.parametrize("method", ["lopt", "frozen"])
def test_a_packed_run_is_the_unpacked_one_up_to_rounding(model, tmp_path, method):
    found = {}
    cached = {"boundary_cache": str(tmp_path / "cache")} if method == "frozen" else {}
    for name, packing in (("packed", True), ("padded", False)):  # the second one reads what the first one cached
        config = make_config(
            model, tmp_path, output=name, method=method, packing=packing, epochs=2, eval_fraction=0.2, lr=1e-4, **cached
        )
        finetune(config)
        steps, evaluations = metrics_of(config)
        found[name] = steps, evaluations, load_file(Path(config.output) / ADAPTER_NAME)
    (steps, evaluations, adapter), (others, other_evaluations, expected) = found["packed"], found["padded"]
    assert len(steps) == len(others) == 4
    for one, other in zip(steps, others, strict=True):
        assert (one["tokens"], one["supervised_tokens"]) == (other["tokens"], other["supervised_tokens"])
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["local_loss"] == pytest.approx(other["local_loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3, abs=1e-9)
    for one, other in zip(evaluations, other_evaluations, strict=True):
        assert one["eval_loss"] == pytest.approx(other["eval_loss"], rel=1e-4)
    assert adapter.keys() == expected.keys()


def test_rows_hold_every_sequence_once_within_their_length():
    lengths = [5, 3, 9, 1, 12, 7, 2, 30]
    rows = packed_window(((0, 1, 2), (3, 4, 5, 6, 7)), lengths, row_tokens=14, alone_from=9)
    assert sorted(index for row in rows for index in row) == list(range(8))
    assert {row for row in rows if len(row) == 1} >= {(7,), (4,), (2,)}, "long ones lie alone"
    assert all(sum(lengths[i] for i in row) <= 14 or row == (7,) for row in rows)
    assert len(rows) == 5 and rows[0] == (7,)
    assert rows == packed_window(((7, 6, 5), (4, 3, 2, 1, 0)), lengths, row_tokens=14, alone_from=9)


def test_the_planner_packs_short_sequences_and_keeps_to_its_bound(model, tmp_path):
    config = make_config(model, tmp_path, packing=None, batch_size=1, grad_accum=8, n_rows=30)
    inputs, _ = read_inputs(config)
    assert inputs.config.packing and inputs.config.row_tokens >= max(inputs.train.lengths)
    assert any(reason.startswith("packed: ") for reason in inputs.reasons)
    first, windows = inputs.workload.batches[0], inputs.windows(first=0)
    for window in (next(windows) for _ in range(4)):
        assert len(window) <= 8
        for indices in window:
            size = inputs.batch(inputs.train, indices).size
            assert size.n_tokens <= first.n_tokens and size.n_supervised <= first.n_supervised
            assert size.longest <= first.longest
    shorter, what = smaller_plan(inputs)  # what comes after memory ran out
    assert shorter.predict().device_bytes <= inputs.predict().device_bytes and what


def test_one_sequence_a_step_is_not_packed(model, tmp_path):
    inputs, _ = read_inputs(make_config(model, tmp_path, packing=None, batch_size=1, grad_accum=1))
    assert not inputs.config.packing


def test_frequencies_that_turn_with_the_length_keep_long_sequences_alone(model, tmp_path):
    inputs, _ = read_inputs(make_config(model, tmp_path, packing=True))
    facts = replace(inputs.source.facts, rotary_turn=10)
    window = next(inputs.windows(first=0))
    rows = micro_batches(window, inputs.train, inputs.config, facts)
    assert all(len(row) == 1 for row in rows if max(inputs.train.lengths[i] for i in row) >= 10)


def test_what_cannot_be_packed_is_refused_and_what_changes_nothing_is_told(model, tmp_path):
    with pytest.raises(InputError, match=r"packing.*apply layer"):
        finetune(make_config(model, tmp_path, packing=True, apply="layer", clip=0.0, grad_accum=1))
    inputs, _ = read_inputs(make_config(model, tmp_path, packing=True, batch_size=1, grad_accum=1))
    assert any("packing has no effect: a step has one sequence" in text for text in inputs.warnings)
    inputs, _ = read_inputs(make_config(model, tmp_path, packing=False, row_tokens=64))
    assert any("row_tokens has no effect: packing is off" in text for text in inputs.warnings)


def test_the_flag(command, model, tmp_path):
    config = make_config(model, tmp_path)
    words = ("--model", config.model, "--data", config.data, "--output", config.output, "--cache-dir", config.cache_dir)
    code, out, err = command("finetune", *words, "--packing", "--row-tokens", "64", "--grad-accum", "4", "--dry-run")
    assert code == 0, err
    assert "packed in rows of" in out + err
    code, _, err = command("finetune", *words, "--packing", "maybe")
    assert code == 2
    code, _, err = command("finetune", *words, "--row-tokens", "1")
    assert code == 2 and "row_tokens" in err.replace("-", "_")
