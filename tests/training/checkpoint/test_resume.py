"""What may change when a run goes on, what is refused, and where it goes on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lopt_edge import finetune
from lopt_edge.config.load import load_config, settings_text
from lopt_edge.config.settings import Config
from lopt_edge.errors import DoesNotFit, InputError, InputErrors
from lopt_edge.planning.settings import split_to_fit
from lopt_edge.run.model.lora import ADAPTER_NAME
from lopt_edge.training.checkpoint.folder import CHECKPOINTS
from lopt_edge.training.checkpoint.resume import BY_FINGERPRINT, MAY_CHANGE, find_start
from lopt_edge.training.session.progress import Progress
from tools.tiny_runs import make_config, make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def done(model, tmp_path_factory) -> Config:
    """A finished run of four steps with all its checkpoints."""
    config = make_config(model, tmp_path_factory.mktemp("done"), n_rows=15, max_steps=4, save_every=1, keep=9)
    finetune(config)
    return config


class Listener(Progress):
    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.notes: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def note(self, text: str) -> None:
        self.notes.append(text)


OTHERS: dict[str, Any] = {
    "method": "e2e", "num_segments": 3, "boundary_layers": (1,), "batch_size": 1, "grad_accum": 4, "lr": 0.5,
    "lr_local": 0.5, "local_weight": 3.0, "weight_decay": 0.5, "schedule": "linear", "warmup_ratio": 0.5, "clip": 0.5,
    "clip_scope": "global", "lora_r": 2, "lora_alpha": 2.0, "lora_dropout": 0.5, "lora_targets": ("q_proj",), "seed": 99,
    "keep_best": True, "optimizer": "adamw8bit", "token_tile": 256,
    "boundary_update": "fresh", "local_loss": "next-token", "local_every": 2, "open_every": 2, "train_layers": 1,
    "selection": "uniform", "select_ratio": 0.25, "unselected": "rest", "boundary_cache": "x", "replace_layers": (1,),
    "align_until": 0.25, "align_weight": 0.5, "align_layer": 1, "stages": 2, "tail_layers": 1,
    "cycles": 2, "min_lr": 0.1, "lora_rslora": True, "stage_patience": 1, "leap_layers": 2, "ema_momentum": 0.5,
    "cascade_weight": 0.5, "lr_head": 0.5, "open_until": 0.25, "reach": "0.5:all,1:half", "closed_cache": False,
    "objective": "dpo", "beta": 0.5, "label_smoothing": 0.25, "simpo_gamma": 0.5, "orpo_lambda": 0.5,
    "desirable_weight": 2.0, "undesirable_weight": 2.0, "mlp_block": 512, "mlp_tile": 64,
}  # fmt: skip


def test_every_setting_is_judged(done):
    """A new setting must be put into one of the three classes."""
    assert {*OTHERS} | MAY_CHANGE | BY_FINGERPRINT == {*Config.model_fields}
    assert not {*OTHERS} & (MAY_CHANGE | BY_FINGERPRINT)


def test_all_differences_that_matter_are_told_together(done):
    with pytest.raises(InputErrors) as caught:
        find_start(done.model_copy(update={"resume": "auto", **OTHERS}))
    told = str(caught.value)
    for name in OTHERS:
        assert f"- {name}: was " in told
    assert "checkpoint of another run" in told


@pytest.mark.parametrize("name", OTHERS)
def test_each_of_them_alone_is_refused(done, name):
    with pytest.raises(InputErrors, match=f"- {name}: was "):
        find_start(done.model_copy(update={"resume": "auto", name: OTHERS[name]}))


def test_what_may_change_may(done, tmp_path):
    changes = {"weights": "disk", "save_every": 3, "max_steps": 9, "device_memory": "2GB", "force": True, "cache_dir": "x"}
    config, start, warnings = find_start(done.model_copy(update={"resume": "auto", **changes}))
    assert start is not None and start.state.steps == 4 and config.max_steps == 9
    assert warnings == ["max_steps was 4, is 9: the learning rates' schedule changes with it"]


def test_other_weights_and_another_dtype_are_refused(done, model, tmp_path):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(model, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputErrors, match=r"(?s)compute_dtype: was float32, is bfloat16 now"):
        finetune(done.model_copy(update={"resume": "auto", "compute_dtype": "bfloat16"}))
    with pytest.raises(InputErrors, match=r"weights or its config.json are others"):
        finetune(done.model_copy(update={"resume": "auto", "model": str(other)}))
    same = tmp_path / "moved"
    shutil.copytree(model, same)
    listener = Listener()
    assert finetune(done.model_copy(update={"resume": "auto", "model": str(same)}), listener).steps == 4


def test_other_versions_are_told(done, monkeypatch):
    monkeypatch.setattr("lopt_edge.system.versions.version_of", lambda name: "0.0.1")
    _, _, warnings = find_start(done.model_copy(update={"resume": "auto"}))
    assert len(warnings) == 1 and "bits may differ" in warnings[0] and "-> 0.0.1" in warnings[0]


def test_another_number_of_threads_is_told(done, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    listener = Listener()
    finetune(done.model_copy(update={"resume": "auto", "dry_run": True}), listener)
    assert any("began with 1 threads and goes on with 7" in text for text in listener.warnings)


def test_an_older_checkpoint_by_its_name(done, model, tmp_path):
    """The newer ones are set aside, and the run ends in the same bytes."""
    whole = make_config(model, tmp_path, n_rows=15, max_steps=4, save_every=1, keep=9)
    finetune(whole)
    before = (Path(whole.output) / ADAPTER_NAME).read_bytes()
    root, listener = Path(whole.output) / CHECKPOINTS, Listener()
    finetune(whole.model_copy(update={"resume": str(root / "step-000002")}), listener)
    assert (Path(whole.output) / ADAPTER_NAME).read_bytes() == before
    assert {path.name for path in root.glob("set-aside-*")} == {"set-aside-step-000003", "set-aside-step-000004"}
    assert sum("is kept as set-aside" in text for text in listener.warnings) == 2


def test_a_checkpoint_can_be_tried_as_an_adapter(done, model):
    """By plain peft, whose reading of its config is that of the final one's."""
    from peft import LoraConfig

    folder = Path(done.output) / CHECKPOINTS / "step-000004"
    configs = [LoraConfig.from_pretrained(str(path)).to_dict() for path in (folder, done.output)]
    names = [config.pop("base_model_name_or_path") for config in configs]  # another test moves the model
    assert configs[0] == configs[1] and all(names)
    assert (folder / ADAPTER_NAME).read_bytes() == (Path(done.output) / ADAPTER_NAME).read_bytes()


def test_where_there_is_nothing_to_go_on_from(model, tmp_path):
    config = make_config(model, tmp_path, max_steps=2)
    assert find_start(config.model_copy(update={"resume": "auto"}))[1] is None
    with pytest.raises(InputError, match="no checkpoint in"):
        find_start(config.model_copy(update={"resume": str(tmp_path)}))


def test_a_run_that_is_unfinished_is_not_overwritten(model, tmp_path):
    config = make_config(model, tmp_path, max_steps=3, n_rows=12, save_every=1)

    class Stop(Progress):
        def step(self, metrics: Any) -> None:
            if metrics["step"] == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(config, Stop())
    with pytest.raises(InputError, match=r"holds an unfinished run.*\n.*lopt-edge resume"):
        finetune(config)
    assert finetune(config.model_copy(update={"resume": "auto"})).steps == 3


def test_a_damaged_checkpoint_is_told_and_the_one_before_is_taken(model, tmp_path):
    config = make_config(model, tmp_path, n_rows=15, max_steps=4, save_every=1, keep=9)
    finetune(config)
    before, listener = (Path(config.output) / ADAPTER_NAME).read_bytes(), Listener()
    (Path(config.output) / CHECKPOINTS / "step-000004" / "training.safetensors").write_bytes(b"spoilt")
    finetune(config.model_copy(update={"resume": "auto"}), listener)
    assert any("training.safetensors has 6 bytes" in text for text in listener.warnings)
    assert any("resumed after step 3" in text for text in listener.notes)
    assert (Path(config.output) / ADAPTER_NAME).read_bytes() == before


@pytest.mark.parametrize(
    "text", ["{}", "[]", '{"run": {}}', '{"run": {"steps": -1}}', '{"run": 3, "config": {}, "settled": {}}']
)
def test_a_state_that_no_run_wrote_is_refused(done, tmp_path, text):
    """With a true manifest: somebody made it so."""
    from lopt_edge.training.checkpoint.folder import STATE, new_checkpoint

    with new_checkpoint(tmp_path / CHECKPOINTS, "step-000009") as folder:
        (folder / STATE).write_text(text)
    with pytest.raises(InputError, match=r"malformed|holds no object"):
        find_start(done.model_copy(update={"resume": str(tmp_path)}))


# budgets ---------------------------------------------------------------------------------------------------------------


def test_micro_batches_are_split_only_where_nothing_else_fits():
    config = load_config(None, {"model": "m", "data": "d", "output": "o", "batch_size": 12, "grad_accum": 2})
    asked: list[int] = []

    def ask(largest: int) -> Any:
        def answer(variant: Config) -> Any:
            asked.append(variant.batch_size)
            assert variant.batch_size * variant.grad_accum == 24
            return variant, object() if variant.batch_size <= largest else None

        return answer

    assert split_to_fit(config, ask(12)) == (config, "")
    found, said = split_to_fit(config, ask(5))
    assert (found.batch_size, found.grad_accum) == (4, 6) and "split into 4" in said
    assert split_to_fit(config, ask(0)) == (config, "")
    with_dropout = config.model_copy(update={"lora_dropout": 0.1})
    assert split_to_fit(with_dropout, ask(5)) == (with_dropout, "")


def test_a_budget_that_nothing_fits_is_refused_and_the_checkpoint_stays(done):
    with pytest.raises(DoesNotFit):
        finetune(done.model_copy(update={"resume": "auto", "device_memory": "50MB"}))
    assert find_start(done.model_copy(update={"resume": "auto"}))[1].state.steps == 4


def test_the_settings_that_resume_reads(done, monkeypatch, tmp_path):
    """Only what was given, paths absolute: the same run from another working folder."""
    monkeypatch.chdir(Path(done.data).parent)
    relative = load_config(None, {"model": done.model, "data": "train.jsonl", "output": "out", "max_steps": 4})
    (tmp_path / "config.yaml").write_text(settings_text(relative))
    again = load_config(tmp_path / "config.yaml")
    assert again.model_fields_set == {"model", "data", "output", "max_steps"}
    assert again.data == str(Path(done.data).resolve())


def test_the_random_states_are_kept(model, tmp_path):
    """torch's and Python's generators, which a library might draw from."""
    import random

    config = make_config(model, tmp_path, max_steps=2)
    torch.manual_seed(5)
    random.seed(5)
    finetune(config)
    drawn = (torch.rand(3).tolist(), random.random())
    torch.manual_seed(1)
    random.seed(1)
    finetune(config.model_copy(update={"resume": "auto"}))
    assert (torch.rand(3).tolist(), random.random()) == drawn
    state = json.loads((Path(config.output) / CHECKPOINTS / "step-000002" / "state.json").read_text())
    assert state["data"]["examples"] == 10 and state["plans"][""] and state["versions"]["torch"] == torch.__version__
