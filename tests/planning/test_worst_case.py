"""`plan_run`: every preset on every kind of card, the examples as their comments say, and what cannot be planned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lopt_edge.planning.worst_case
from lopt_edge import plan_run
from lopt_edge.config.load import load_config
from lopt_edge.errors import InputError, InputErrors
from lopt_edge.plan.facts.budget import Budget
from lopt_edge.plan.facts.presets import PRESETS
from lopt_edge.plan.schedule.knobs import Knobs
from lopt_edge.planning.worst_case import NOT_GIVEN, answer, question

ROOT = Path(__file__).parents[2]
CONFIG = {"model_type": "llama", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
          "num_attention_heads": 4, "max_position_embeddings": 256}  # fmt: skip


@pytest.fixture(autouse=True)
def no_profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a machine that was never measured."""
    monkeypatch.setattr(lopt_edge.planning.worst_case, "profile_path", lambda: tmp_path / "no-profile.json")


CARDS = ("rtx 3060 laptop", "h100", "gtx 1660", "cpu", "rtx4090", "m1")


@pytest.mark.parametrize(("at", "preset"), list(enumerate(PRESETS)), ids=list(PRESETS))
def test_every_preset_plans_for_a_card(at, preset):
    """One of six each, in turn."""
    check_preset(preset, CARDS[at % 6])


@pytest.mark.long
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_plans_for_every_card(preset):
    for gpu in CARDS:
        check_preset(preset, gpu)


def check_preset(preset: str, gpu: str) -> None:
    asked = question_of(model=preset, gpu=gpu, max_seq_len=1024, prefetch=1)
    search = asked.search
    best = search.within(asked.budget).best or search.smallest
    assert best.seconds.seconds > 0
    assert search.workload.plan(best.knobs, n_micro_batches=8).hash(), "a valid plan"
    assert search.within(asked.budget).best is not None, (preset, gpu)


@pytest.mark.parametrize(
    ("example", "model", "gpu", "weights"),
    [
        ("8b-on-24gb", "llama-3.1-8b", "rtx4090", "resident"),
        ("8b-on-8gb-laptop", "llama-3.1-8b", "rtx 4060 laptop", None),
        ("3b-on-cpu", "llama-3.2-3b", None, None),
    ],
)
def test_examples_fit_as_their_comments_say(example, model, gpu, weights):
    path = ROOT / "examples" / f"{example}.yaml"
    found = answer(question(load_config(path, {"model": model}, placeholder=NOT_GIVEN), gpu=gpu))
    assert found.fits, found.missing
    stated = {tier: n_bytes for tier, n_bytes in found.budget_bytes.items() if n_bytes is not None}
    assert len(stated) >= 2 and all(found.peak_bytes[tier] <= n_bytes for tier, n_bytes in stated.items())
    assert found.longest_context >= load_config(path).max_seq_len
    assert weights in (None, found.knobs["weights"])
    text = path.read_text()
    assert f"lopt-edge plan examples/{example}.yaml --model {model}" in text and (gpu is None or gpu in text)
    if gpu is None:  # the way to the answer is the same for all
        assert plan_run(model, gpu=gpu, **load_config(path).model_dump(exclude_unset=True, exclude={"model"})) == found


def test_the_budget_is_what_was_stated_or_the_card_or_most_of_what_is_free(monkeypatch):
    assert question_of(gpu="rtx4090").budget.device_bytes == plan_run("qwen3-0.6b", gpu="rtx4090").budget_bytes["device"]
    assert question_of(gpu="rtx4090").notes[0].startswith("all of the card's memory")
    assert question_of(gpu="rtx4090", device_memory="50%").budget.device_bytes == 0.5 * card_bytes("rtx4090")
    stated = question_of(device="cpu", device_memory="3GB", disk_memory="1GiB")
    assert stated.budget == Budget(device_bytes=3 * 10**9, disk_bytes=2**30)
    monkeypatch.setattr("lopt_edge.planning.budgets.available_bytes", lambda: 10**10)
    free = question_of(device="cpu")
    assert free.budget.device_bytes == 9 * 10**9
    assert "90%" in free.notes[0]


@pytest.mark.parametrize(("card", "gib", "machine"), [("rtx 3060 laptop", 16, "laptop"), ("rtx4090", 32, "desktop")])
def test_a_usual_machine_is_assumed_around_a_card_and_said(card, gib, machine):
    asked = question_of(gpu=card)
    assert asked.budget.host_bytes == round(0.9 * gib * 2**30)
    assert any(f"{gib}.0 GiB that a {machine} usually has" in note and "--host-memory" in note for note in asked.notes)
    stated = question_of(gpu=card, host_memory="101GiB")
    assert stated.budget.host_bytes == 101 * 2**30 and not any("usually" in note for note in stated.notes)


def test_no_machine_is_assumed_around_a_data_centres_card():
    assert question_of(gpu="a100 80gb").budget.host_bytes is None


def test_a_plan_for_this_machine_is_within_what_it_grants(monkeypatch):
    monkeypatch.setattr("lopt_edge.planning.budgets.granted_bytes", lambda: (2 * 2**30, "the control group"))
    asked = question_of(device="cpu", device_memory="3GiB")
    assert asked.budget.device_bytes == round(0.95 * 2 * 2**30)
    assert any("lowered from the 3.0 GiB" in note for note in asked.notes)


def card_bytes(name: str) -> int:
    return question_of(gpu=name).budget.device_bytes or 0


def question_of(*, gpu: str | None = None, model: str = "qwen3-0.6b", **settings: Any) -> Any:
    return question(load_config(None, {"model": model, **settings}, placeholder=NOT_GIVEN), gpu=gpu)


def test_settings_reach_the_workload():
    asked = question_of(
        gpu="rtx4090", max_seq_len=512, batch_size=2, grad_accum=3, lora_r=5, method="frozen", eval_fraction=0.1
    )
    workload = asked.search.workload
    assert [(batch.n_sequences, batch.n_tokens, batch.n_supervised) for batch in workload.batches] == [(2, 512, 1022)] * 3
    assert (workload.shape.rank, workload.method, workload.shape.itemsize) == (5, "frozen", 2)
    assert workload.evaluation == workload.batches[0]
    assert question_of(device="cpu").search.workload.shape.itemsize == 4
    assert "float16" in " ".join(question_of(gpu="rtx 2080").notes)
    assert "512 positions" not in " ".join(asked.notes)


def test_a_folder_plans_as_its_preset(tmp_path):
    """Without weights there is nothing to read the stored dtype from: that is told."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(InputError, match="safetensors"):
        plan_run(str(tmp_path))
    preset = plan_run("qwen3-0.6b", gpu="rtx4090")
    assert preset == plan_run("Qwen/Qwen3-0.6B", gpu="rtx4090"), "by its hub id, nothing fetched"


def test_python_answers_do_not_raise_where_nothing_fits():
    found = plan_run("llama-3.1-8b", gpu="rtx4090", device_memory="1GB")
    assert not found.fits and found.missing and found.would_fit
    assert isinstance(found.chosen.knobs, Knobs)


# what cannot be --------------------------------------------------------------------------------------------------------


def refusal(model: str = "llama-3.1-8b", **settings: Any) -> str:
    with pytest.raises(InputError) as caught:
        plan_run(model, **settings)
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": "llama-3.1-8c"}, ("llama-3.1-8c", "llama-3.1-8b")),
        ({"model": "zzz"}, ("'zzz'", "give a folder", "a hub id")),
        ({"gpu": "rtx 4091"}, ("rtx 4091", "RTX 4090")),
        ({"gpu": "abacus"}, ("abacus", "--device-memory")),
        ({"gpu": "rtx4090", "device_memory": "24"}, ("'24' has no unit",)),
        ({"gpu": "rtx4090", "device_memory": "0GB"}, ("more than zero",)),
        ({"gpu": "rtx4090", "device_memory": "-5GB"}, ("more than zero",)),
        ({"gpu": "rtx4090", "host_memory": "12XB"}, ("'XB'",)),
        ({"gpu": "rtx4090", "host_memory": "50%"}, ("how much is free is not known",)),
        ({"device": "cuda"}, ("no GPU was measured", "--gpu")),
        ({"device": "cpu", "weights": "host"}, ("host is refused", "use disk")),
        ({"gpu": "rtx4090", "max_seq_len": 200000}, ("beyond the model's 131072 positions",)),
        ({"gpu": "rtx4090", "max_seq_len": 0}, ("max-seq-len",)),
        ({"gpu": "rtx4090", "method": "lopt", "num_segments": 33}, ("32 layers",)),
        ({"gpu": "rtx4090", "lora_targets": "qq_proj"}, ("qq_proj", "q_proj")),
        ({"gpu": "rtx4090", "colour": "red"}, ("colour", "unknown setting")),
    ],
)
def test_what_cannot_be_planned_is_refused_with_advice(settings, words):
    text = refusal(**settings)
    assert all(word in text for word in words), text


def test_mistakes_are_told_together():
    text = refusal("llama-3.1-8c", gpu="rtx 4091")
    assert "2 problems" in text and "rtx 4091" in text and "llama-3.1-8c" in text
    text = refusal(
        device="cpu",
        weights="host",
        method="lopt",
        num_segments=99,
        lora_targets="x",
        device_memory="24",
        disk_memory="0GB",
    )
    assert "5 problems" in text
    assert all(
        word in text for word in ("host is refused", "32 layers", "x is not in this model", "no unit", "more than zero")
    )
    with pytest.raises(InputErrors) as caught:
        plan_run("llama-3.1-8b", max_seq_len=0, lora_r=-1, lr="fast")
    assert len(caught.value.errors) == 3


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"num_hidden_layers": None}, "num_hidden_layers"), ({"hidden_size": None, "vocab_size": None}, "vocab_size"),
     ({"model_type": "mamba"}, "no weights here"),  # without a record its tensors' names are looked at
     ({"hidden_size": -4}, "hidden_size"), ({"vocab_size": "many"}, "vocab_size")],
)  # fmt: skip
def test_a_config_that_lacks_fields_or_is_of_another_family(tmp_path, changes, word):
    values = {key: value for key, value in {**CONFIG, **changes}.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert word in refusal(str(tmp_path))


def test_a_folder_without_or_with_a_broken_config(tmp_path):
    assert "config.json" in refusal(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in refusal(str(tmp_path))


def test_boundary_auto_is_planned_as_the_midpoint_and_says_so():
    found = plan_run("llama-3.1-8b", gpu="rtx4090", max_seq_len=512, method="lopt", boundary="auto")
    assert any("boundary auto" in note for note in found.notes)
    assert found.plan_hash == plan_run("llama-3.1-8b", gpu="rtx4090", max_seq_len=512, method="lopt").plan_hash
