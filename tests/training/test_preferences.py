"""Runs that learn preferences: what they begin with, what they measure, that they resume bitwise, and what is refused."""

from __future__ import annotations

import json
from math import log
from pathlib import Path
from typing import Any

import pytest

from lopt_edge import finetune
from lopt_edge.config.settings import Config
from lopt_edge.errors import InputError, Interrupted
from lopt_edge.run.model.lora import ADAPTER_NAME
from lopt_edge.training.checkpoint.output_folder import REFERENCES_NAME, remove_run
from lopt_edge.training.prepare.read import read_inputs
from tools.tiny_runs import log_of, make_config, make_model, metrics_of

OBJECTIVES = ("dpo", "simpo", "orpo", "kto")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


def pairs(path: Path, n_rows: int) -> str:
    rows = [
        {"prompt": f"What is {i}? " * (1 + i % 3), "chosen": f"It is {i} and no more.", "rejected": "No " * (1 + i % 4)}
        for i in range(n_rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def labelled(path: Path, n_rows: int) -> str:
    rows = [{"prompt": f"What is {i}?", "completion": " It is." if i % 2 else " No " * (i % 5 + 1), "label": bool(i % 2)}
            for i in range(n_rows)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config_of(model: Path, root: Path, objective: str, **changes: Any) -> Config:
    rows = labelled if objective == "kto" else pairs
    values = {"objective": objective, "method": "e2e", "data": rows(root / f"{objective}.jsonl", 12), "max_steps": 5}
    return make_config(model, root, **{"output": f"out-{objective}", **values, **changes})


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_prefers_what_is_chosen(model, tmp_path, objective):
    """A fresh adapter is the reference, so DPO begins at log 2 and KTO at a half; then chosen replies gain on others."""
    config = config_of(model, tmp_path, objective, eval_fraction=0.25, eval_every=5)
    finetune(config)
    steps, (before, after) = metrics_of(config)
    if objective in ("dpo", "kto"):
        assert steps[0]["loss"] == pytest.approx(log(2) if objective == "dpo" else 0.5, abs=1e-6)
        assert steps[0]["rewards_chosen"] == pytest.approx(0.0, abs=1e-5)
    assert after["eval_loss"] < before["eval_loss"]
    gained = "eval_logps_chosen" if objective == "orpo" else "eval_rewards_margin"  # ORPO's likelihood leads at first
    assert after[gained] > before[gained]
    assert ("eval_rewards_accuracy" in after) == (objective != "kto")
    assert steps[-1]["loss"] < steps[0]["loss"]
    report = (Path(config.output) / "report.html").read_text()
    assert ("Share of pairs" in report) == (objective != "kto") and "rewarded more" in report
    assert not (Path(config.output) / REFERENCES_NAME).exists()


@pytest.mark.parametrize(("objective", "method"), [("dpo", "lopt"), ("kto", "e2e")])
def test_a_resumed_run_is_the_undisturbed_one(model, tmp_path, stop_in, objective, method):
    settings = {"method": method, "max_steps": 4, "eval_fraction": 0.2, "eval_every": 2}
    whole = config_of(model, tmp_path, objective, output="whole", **settings)
    finetune(whole)
    config = config_of(model, tmp_path, objective, output="stopped", **settings)
    stop_in(3, 0)
    with pytest.raises(Interrupted):
        finetune(config.model_copy(update={"weights": "disk", "activations": "page"}))
    (values,) = (Path(config.output) / REFERENCES_NAME / "train").glob("values.bin")
    damaged = bytearray(values.read_bytes())
    damaged[3] ^= 1  # one number does not agree with its sum, so it is computed again
    values.write_bytes(damaged)
    finetune(config.model_copy(update={"resume": "auto"}))
    (Path(whole.output) / REFERENCES_NAME).mkdir()
    assert log_of(config) == log_of(whole)
    assert (Path(config.output) / ADAPTER_NAME).read_bytes() == (Path(whole.output) / ADAPTER_NAME).read_bytes()
    assert (
        remove_run(Path(whole.output)) == []
    )  # what --overwrite removes, the references of a run that was killed among it


def test_a_pair_stays_in_one_micro_batch_and_the_plan_holds_it(model, tmp_path):
    inputs, _ = read_inputs(config_of(model, tmp_path, "dpo", batch_size=2, grad_accum=2))
    assert inputs.train.n_units == 12 and inputs.n_steps == 5 and len(inputs.train.examples) == 24
    first, windows = inputs.workload.batches[0], inputs.windows(first=0)
    seen = [next(windows) for _ in range(3)]
    assert sorted(index for window in seen for batch in window for index in batch) == list(range(24))
    for window in seen:
        for indices in window:
            assert all(
                chosen % 2 == 0 and rejected == chosen + 1 for chosen, rejected in zip(*[iter(indices)] * 2, strict=True)
            )
            size = inputs.batch(inputs.train, indices).size
            assert size.n_rows <= first.n_rows and size.n_supervised <= first.n_supervised and size.scored == 2
    assert inputs.config.lr == 1e-2 and Config(model="m", data="d", output="o", objective="orpo").lr == 8e-6


def test_mismatched_replies_are_those_of_the_row_before(model, tmp_path):
    inputs, _ = read_inputs(config_of(model, tmp_path, "kto"))
    own, other = inputs.train.examples, inputs.mismatched["train"].examples
    for index, example in enumerate(other):
        prompt, reply = own[index], own[index - 1]
        begin = prompt.supervised.index(1)
        assert example.input_ids[:begin] == prompt.input_ids[:begin] and example.supervised[:begin] == bytes(begin)
        assert example.input_ids[begin:] == reply.input_ids[reply.supervised.index(1) :]
    assert inputs.workload.evaluation is not None  # the pass before a step is planned as an evaluation


REFUSED = (
    ({"beta": 0.2, "objective": "orpo"}, r"beta.*belongs to objective dpo or simpo or kto, this is orpo"),
    ({"simpo_gamma": 0.2}, r"simpo-gamma.*belongs to objective simpo, this is dpo"),
    ({"method": "mlaan", "objective": "simpo", "num_segments": 2}, r"simpo cannot be with method mlaan: its local losses"),
    ({"method": "segprop"}, r"dpo cannot be with method segprop: a stage"),
    ({"method": "repl", "objective": "dpo", "replace_layers": "1"}, r"dpo cannot be with method repl"),
    (
        {"method": "lopt", "local_loss": "next-token"},
        r"local-loss.*next-token cannot be with objective dpo",
    ),
    ({"method": "lopt", "pipeline": 2}, r"dpo cannot be with pipeline"),
    ({"packing": True}, r"packing.*cannot be with objective dpo"),
)


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=["-".join(changes) for changes, _ in REFUSED])
def test_what_cannot_be_is_refused_by_name(model, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        finetune(config_of(model, tmp_path, **{"objective": "dpo", "dry_run": True, **changes}))


def test_data_of_another_form_are_refused_with_their_place(model, tmp_path):
    for objective, rows, message in (
        (
            "sft",
            pairs,
            r"(?s)pairs.jsonl.*preferences \(preference\).*--columns completion=chosen --ignore-columns rejected",
        ),
        ("dpo", labelled, "needs rows with prompt, chosen and rejected"),
    ):
        path = rows(tmp_path / f"{rows.__name__}.jsonl", 6)
        with pytest.raises(InputError, match=message):
            read_inputs(config_of(model, tmp_path, objective, data=path))
    chosen = {"columns": "completion=chosen", "ignore_columns": "rejected"}
    inputs, _ = read_inputs(config_of(model, tmp_path, "sft", data=pairs(tmp_path / "pairs.jsonl", 6), **chosen))
    assert len(inputs.train.examples) == 6
    inputs, _ = read_inputs(config_of(model, tmp_path, "kto", data=pairs(tmp_path / "pairs.jsonl", 6)))
    assert inputs.train.labels == (True,) * 6 + (False,) * 6  # pairs serve as labelled rows
    inputs, _ = read_inputs(config_of(model, tmp_path, "kto", packing=True))
    assert inputs.config.packing
