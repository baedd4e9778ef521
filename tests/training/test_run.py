"""Whole runs on a tiny model: what is written, what is refused, what a seed fixes, how many steps there are.

Nothing is replaced by a stand-in: tokenizer, data file, quantising, training and saving are the real ones.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from lopt_edge import finetune
from lopt_edge.errors import InputError, RunError
from lopt_edge.plan.schedule.ops import parse_plan
from lopt_edge.run.model.load import load_model
from lopt_edge.run.model.lora import ADAPTER_NAME
from lopt_edge.training.prepare.build import build_executor
from lopt_edge.training.prepare.read import read_inputs
from lopt_edge.training.session.progress import Progress
from tools.tiny_runs import make_config, make_model, metrics_of, write_rows

STEP_KEYS = {"step", "loss", "local_loss", "lr", "grad_norm", "tokens", "supervised_tokens", "step_seconds",
             "peak_device_bytes", "peak_rss_bytes", "peak_host_bytes", "peak_pinned_bytes", "peak_disk_bytes"}  # fmt: skip
RUN_KEYS = {"base", "revision", "quantised_folder", "config", "model", "data", "plan", "versions", "device",
            "compute_dtype", "reasons", "totals", "evaluation", "best_eval_loss", "samples", "peaks",
            "seconds", "predicted", "quantised_cache_bytes"}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


class Listener(Progress):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def adapter_bytes(config) -> bytes:
    return (Path(config.output) / ADAPTER_NAME).read_bytes()


@pytest.mark.parametrize(
    ("method", "segments", "n_segments", "local"),
    [("lopt", {}, 2, 1), ("lopt", {"num_segments": 4}, 4, 3), ("lopt", {"boundary_layers": "1,3"}, 3, 2), ("e2e", {}, 1, 0),
     ("frozen", {}, 2, 0)],
)  # fmt: skip
def test_what_a_run_writes(model, tmp_path, method, segments, n_segments, local):
    evaluation = write_rows(tmp_path / "eval.jsonl", 3, first=50)
    config = make_config(model, tmp_path, method=method, max_steps=2, eval_data=str(evaluation), eval_every=1, **segments)
    result = finetune(config)
    output = Path(config.output)
    names = {path.name for path in output.iterdir()}
    assert names >= {ADAPTER_NAME, "adapter_config.json", "metrics.jsonl", "run.json", "README.md", "tokenizer.json"}
    assert not [name for name in names if "partial" in name]
    report = (output / "report.html").read_text()
    assert "<script" not in report and "src=" not in report and "href=" not in report
    before, after = (f"{result.evaluation[when]['eval_loss']:.4f}" for when in ("before", "after"))
    assert f"held-out loss from {before} to {after}" in report and report.count("<svg") == 5
    steps, evaluations = metrics_of(config)
    assert [line["step"] for line in steps] == [1, 2]
    for line in steps:
        assert set(line) == STEP_KEYS
        assert len(line["local_loss"]) == local
        assert len(line["lr"]) == len(line["grad_norm"]) == n_segments
        trained = [rate > 0 for rate in line["lr"]]
        assert sum(trained) == local + 1
        assert math.isfinite(line["loss"])
        assert [norm > 0 for norm in line["grad_norm"]] == trained
        assert 0 < line["supervised_tokens"] < line["tokens"]
        assert line["peak_rss_bytes"] > 100 << 20
    assert [line["step"] for line in evaluations] == [0, 1, 2]
    assert all(set(line) == {"step", "eval_loss"} for line in evaluations)
    assert result.evaluation == {
        "before": {"eval_loss": evaluations[0]["eval_loss"]},
        "after": {"eval_loss": evaluations[2]["eval_loss"]},
    }
    run = json.loads((output / "run.json").read_text())
    assert set(run) >= RUN_KEYS
    assert run["config"]["lr"] == 1e-2
    plan = parse_plan(run["plan"]["text"])
    assert (plan.hash(), plan.method, plan.n_micro_batches) == (run["plan"]["hash"], method, 2)
    assert run["totals"]["steps"] == result.steps == 2
    assert run["totals"]["tokens"] == sum(line["tokens"] for line in steps)
    assert run["totals"]["supervised_tokens"] == sum(line["supervised_tokens"] for line in steps)
    assert set(run["seconds"]) >= {"load", "quantise", "train", "save"}
    assert run["peaks"]["peak_rss_bytes"] >= steps[-1]["peak_rss_bytes"]
    card = (output / "README.md").read_text()
    assert f"{evaluations[2]['eval_loss']:.4f}" in card
    assert len(AutoTokenizer.from_pretrained(output)) == len(AutoTokenizer.from_pretrained(model))


def test_training_lowers_the_loss(model, tmp_path):
    for method in ("lopt", "e2e", "frozen"):
        config = make_config(model, tmp_path, output=method, method=method, epochs=8, n_rows=6, schedule="constant")
        finetune(config)
        steps, _ = metrics_of(config)
        assert steps[-1]["loss"] < 0.7 * steps[0]["loss"], method
        if method == "lopt":
            assert steps[-1]["local_loss"][0] < steps[0]["local_loss"][0]


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(model, tmp_path):
    runs = [
        make_config(model, tmp_path, output=name, seed=seed, max_steps=3, lora_dropout=0.2)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    for config in runs:
        finetune(config)
    a, b, c = map(adapter_bytes, runs)
    assert a == b
    assert a != c
    first, second = (metrics_of(config)[0] for config in runs[:2])
    for one, other in zip(first, second, strict=True):
        assert [one[key] for key in ("loss", "local_loss", "grad_norm")] == [
            other[key] for key in ("loss", "local_loss", "grad_norm")
        ]


def test_the_seed_reaches_the_dropout_masks(model, tmp_path):
    inputs, _ = read_inputs(make_config(model, tmp_path, seed=11, lora_dropout=0.2))
    loaded = load_model(model, inputs.source.facts, device=inputs.device, dtype=inputs.dtype)
    executor, _ = build_executor(inputs, loaded)
    assert executor.model.clock.seed == 11


@pytest.mark.parametrize(
    ("changes", "sequences"),
    [
        ({"n_rows": 10}, [4, 4, 2]),  # one epoch, the last window short
        ({"n_rows": 9}, [4, 4, 1]),  # a micro-batch of one in it
        ({"n_rows": 5, "epochs": 2}, [4, 1, 4, 1]),
        ({"n_rows": 10, "max_steps": 2}, [4, 4]),
        ({"n_rows": 5, "max_steps": 5, "epochs": 1}, [4, 1, 4, 1, 4]),  # max_steps wins over epochs
        ({"n_rows": 3, "grad_accum": 8}, [3]),
        ({"n_rows": 1}, [1]),
    ],
)
def test_steps_and_windows(model, tmp_path, changes, sequences):
    config = make_config(model, tmp_path, **changes)
    finetune(config)
    steps, _ = metrics_of(config)
    assert len(steps) == len(sequences)
    dataset = read_inputs(config.model_copy(update={"output": str(tmp_path / "other")}))[0].train
    if "epochs" not in changes and "max_steps" not in changes:  # every example once
        assert sum(line["tokens"] for line in steps) == dataset.n_tokens
        assert sum(line["supervised_tokens"] for line in steps) == dataset.n_supervised
    shortest, longest = min(dataset.lengths), max(dataset.lengths)
    for line, n_sequences in zip(steps, sequences, strict=True):
        assert n_sequences * shortest <= line["tokens"] <= n_sequences * longest


def test_the_schedule_is_that_of_the_settings(model, tmp_path):
    config = make_config(model, tmp_path, max_steps=4, schedule="linear", warmup_ratio=0.25, lr=0.4, lr_local=0.1)
    finetune(config)
    rates = [line["lr"] for line in metrics_of(config)[0]]
    assert rates == [pytest.approx([0.1 * share, 0.4 * share]) for share in (1, 1, 2 / 3, 1 / 3)]


def test_keep_best_keeps_the_best(model, tmp_path):
    """Held-out text that the run unlearns: the last adapter is worse than an earlier one, and the earlier one is kept."""
    evaluation = tmp_path / "eval.jsonl"
    rows = [{"prompt": f"What is {i}?", "completion": "ZQXZ QXZQ JKZX"} for i in range(6)]
    evaluation.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"n_rows": 6, "epochs": 4, "eval_data": str(evaluation), "eval_every": 1, "schedule": "constant", "lr": 0.01,
              "method": "e2e", "warmup_ratio": 0.0}  # fmt: skip
    last = make_config(model, tmp_path, output="last", **common)
    best = make_config(model, tmp_path, output="best", keep_best=True, **common)
    finetune(last)
    result = finetune(best)
    losses = {line["step"]: line["eval_loss"] for line in metrics_of(best)[1] if line["step"]}
    assert result.evaluation["after"]["eval_loss"] == min(losses.values()), "what is reported is what was saved"
    best_step = min(losses, key=losses.__getitem__)
    assert losses[max(losses)] > losses[best_step] + 0.1, "the run must get worse in the end, or this proves nothing"
    assert json.loads((Path(best.output) / "run.json").read_text())["best_eval_loss"] == losses[best_step]
    short = make_config(model, tmp_path, output="short", **{**common, "max_steps": best_step})
    finetune(short)
    assert adapter_bytes(best) == adapter_bytes(short)
    assert adapter_bytes(best) != adapter_bytes(last)


def test_a_dry_run_writes_nothing(model, tmp_path):
    config = make_config(model, tmp_path, dry_run=True, cache_dir=str(tmp_path / "cache"))
    before = sorted(tmp_path.rglob("*"))
    assert finetune(config) is None
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_folder_with_another_run_is_left_as_it_is(model, tmp_path):
    config = make_config(model, tmp_path, max_steps=1)
    finetune(config)
    found = [path for path in Path(config.output).rglob("*") if path.is_file()]
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in found}
    with pytest.raises(InputError, match="another run"):
        finetune(config)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in found} == before
    assert [path for path in Path(config.output).rglob("*") if path.is_file()] == found
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        finetune(make_config(model, tmp_path, output="file"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        finetune(make_config(model, tmp_path, output="full"))
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]
    with pytest.raises(InputError, match="no run's"):
        finetune(make_config(model, tmp_path, output="full", overwrite=True))


def test_overwrite_replaces_a_run_and_nothing_else(model, tmp_path):
    finetune(make_config(model, tmp_path, max_steps=2, save_every=1, output="out"))
    output = tmp_path / "out"
    names = {path.name for path in output.iterdir()}
    (output / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="removes what init_adapter reads"):
        finetune(make_config(model, tmp_path, output="out", overwrite=True, init_adapter=str(output)))
    listener = Listener()
    config = make_config(model, tmp_path, max_steps=1, output="out", overwrite=True)
    finetune(config, listener)
    assert [told for told in listener.warnings if "what is no run's stays: notes.txt" in told]
    assert {path.name for path in output.iterdir()} == names | {"notes.txt"}
    assert not list((output / "checkpoints").glob("step-000002*"))
    assert len(metrics_of(config)[0]) == 1
    assert "overwrite:" not in (output / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"boundary_layers": "4"}, "boundary_layers"),
        ({"boundary_layers": "0,2"}, "boundary_layers"),
        ({"num_segments": 9}, "num_segments"),
        ({"lora_targets": "q_proj,c_attn"}, "c_attn"),
        ({"max_seq_len": 999}, "max_seq_len"),
        ({"device": "cuda"}, "CUDA"),
        ({"compute_dtype": "float16"}, "float16"),
        ({"data": "missing.jsonl"}, "missing.jsonl"),
        ({"model": "/nowhere/model"}, "model"),
        ({"init_adapter": "/nowhere/adapter"}, "init_adapter|adapter"),
    ],
)
def test_mistakes_that_need_the_model_leave_nothing_behind(model, tmp_path, changes, says):
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    config = make_config(model, tmp_path, **changes)
    with pytest.raises(InputError, match=says):
        finetune(config)
    assert not Path(config.output).exists()


def test_the_quantised_copy_is_made_once(model, tmp_path):
    common = {"max_steps": 1, "cache_dir": str(tmp_path / "cache")}
    first = make_config(model, tmp_path, output="first", **common)
    finetune(first)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    assert stamps
    finetune(make_config(model, tmp_path, output="second", **common))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == stamps


def test_a_changed_model_is_quantised_again(tmp_path):
    folder = make_model(tmp_path / "model")
    common = {"max_steps": 1, "cache_dir": str(tmp_path / "cache")}
    finetune(make_config(folder, tmp_path, output="first", **common))
    make_model(folder, seed=1)
    finetune(make_config(folder, tmp_path, output="second", **common))
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_run_that_diverges_says_so_and_saves_no_adapter(tmp_path):
    """Weights that overflow: the step is named, and no adapter is left as if it were good."""
    folder = make_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.post_attention_layernorm.weight"].fill_(3e38)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = make_config(folder, tmp_path)
    with pytest.raises(RunError, match=r"(?s)every batch was skipped.*step \d, op.*The plan around it"):
        finetune(config)
    with pytest.raises(RunError, match=r"(?s)step 1: .*first at FORWARD 2 mb=0.*step 1, op.*The plan around it"):
        finetune(make_config(folder, tmp_path, output="stop", on_nan="stop"))
    assert not (Path(config.output) / ADAPTER_NAME).exists()
