"""Runs that are aligned to a teacher: the base itself, or another model of another width; and what is refused."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lopt_edge import finetune
from lopt_edge.errors import InputError
from lopt_edge.models.folder import find_model
from lopt_edge.models.four_bit import four_bit_folder
from lopt_edge.run.model.load import load_model
from lopt_edge.run.model.lora import ADAPTER_NAME
from lopt_edge.run.tiers.moves import Mover
from lopt_edge.run.watch.tracker import MemoryTracker
from lopt_edge.training.prepare.read import read_inputs
from lopt_edge.training.prepare.teacher import FEATURES, aligned_examples, at_width, fill_features, teacher_features
from tools.tiny_runs import CORPUS, make_config, make_model, metrics_of


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("wide") / "wide", hidden_size=96, num_hidden_layers=2)


def adapter(config) -> bytes:
    return (Path(config.output) / ADAPTER_NAME).read_bytes()


def test_the_weight_falls_and_then_no_teacher_is_read(model, tmp_path):
    config = make_config(model, tmp_path, method="let", align_until=0.5, max_steps=4)
    finetune(config)
    steps = metrics_of(config)[0]
    assert [step["kind"] for step in steps] == ["align", "align", "plain", "plain"]
    assert all(-1 <= step["align_loss"] <= 1 for step in steps[:2]) and "align_loss" not in {*steps[2], *steps[3]}
    assert not (Path(config.output) / FEATURES).exists(), "only until the run is done"
    plain = make_config(model, tmp_path, output="plain", method="e2e", max_steps=4)
    finetune(plain)
    assert adapter(plain) != adapter(config)


def test_a_next_to_zero_weight_is_end_to_end(model, tmp_path):
    config = make_config(model, tmp_path, method="let", align_weight=1e-30, max_steps=3)
    finetune(config)
    plain = make_config(model, tmp_path, output="plain", method="e2e", max_steps=3)
    finetune(plain)
    assert adapter(plain) == adapter(config)


def test_the_early_segment_s_rate_fades_and_then_it_rests(model, tmp_path):
    config = make_config(
        model, tmp_path, method="let-local", align_until=0.5, max_steps=8, schedule="constant", warmup_ratio=0.0
    )
    finetune(config)
    rates = [step["lr"] for step in metrics_of(config)[0]]
    early, late = [rate[0] for rate in rates], [rate[1] for rate in rates]
    assert early == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2, 0, 0, 0, 0])
    assert late == pytest.approx([1e-2] * 8)


def test_the_base_teaches_without_its_adapters(model, tmp_path):
    """A run that starts from an adapter is aligned to the same features as one that does not."""
    first = make_config(model, tmp_path, output="first", method="e2e", max_steps=2)
    finetune(first)
    seen = []
    for name, init in (("fresh", None), ("carried", first.output)):
        config = make_config(model, tmp_path, output=name, method="let", max_steps=1, save_every=1, init_adapter=init)
        stop_before_the_end(config)
        seen.append((Path(config.output) / FEATURES / "rows.bin").read_bytes())
    assert seen[0] == seen[1] and any(seen[0])


def stop_before_the_end(config) -> None:
    """A retention file that cannot be evaluated at the end leaves the folder as it is in the middle of a run."""
    import lopt_edge.training.session.session as session

    save = session.Session._save_adapter_and_tokenizer
    session.Session._save_adapter_and_tokenizer = lambda self: 1 / 0
    try:
        with pytest.raises(ZeroDivisionError):
            finetune(config)
    finally:
        session.Session._save_adapter_and_tokenizer = save


def test_another_model_teaches_at_our_width(model, wide, tmp_path):
    config = make_config(model, tmp_path, method="let", teacher=str(wide), max_steps=2, batch_size=1, grad_accum=1)
    stop_before_the_end(config)
    facts = find_model(str(wide)).facts
    folder = next(path for path in (model.parent / "cache").iterdir() if find_model(str(path)).facts.hidden_size == 96)
    teacher = load_model(folder, facts, device=torch.device("cpu"), dtype=torch.float32)
    from lopt_edge.data import load_dataset
    from lopt_edge.models.tokenizer import load_tokenizer

    data = load_dataset(config.data, load_tokenizer(model), max_seq_len=128)
    found = torch.frombuffer(bytearray((Path(config.output) / FEATURES / "rows.bin").read_bytes()), dtype=torch.bfloat16)
    width, first = find_model(str(model)).facts.hidden_size, 0
    n_seen = 0
    for example in data.examples:
        rows = found[first * width : (first + len(example)) * width].view(-1, width).float()
        first += len(example)
        if not len(rows) or not rows.any():
            continue
        hidden = teacher.embed(torch.tensor([example.input_ids]))
        hidden = teacher.norm(teacher.run_all(hidden, teacher.layer_context(hidden)))
        torch.testing.assert_close(rows, at_width(hidden, width)[0].detach(), rtol=1e-2, atol=1e-2)
        n_seen += 1
    assert n_seen >= 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_what_another_teachers_pass_takes_is_in_the_plan(tmp_path, family, dtype):
    """Tracked bytes of the pass, which never exceed what was predicted, and the plan's peak where it is the largest."""
    small = make_model(tmp_path / "model" / "tiny")
    teacher = make_model(
        tmp_path / "teacher", family, hidden_size=192, num_hidden_layers=3, intermediate_size=640, head_dim=48
    )
    config = make_config(
        small, tmp_path, method="let", teacher=str(teacher), max_steps=2, batch_size=1, compute_dtype=dtype
    )
    inputs, _ = read_inputs(config)
    folder, _ = four_bit_folder(inputs.source, cache_dir=config.cache_dir)
    four_bit_folder(inputs.teacher, cache_dir=config.cache_dir)
    base = load_model(folder, inputs.source.facts, device=inputs.device, dtype=inputs.dtype)
    tracker = MemoryTracker()
    with teacher_features(inputs) as features, tracker, closing(Mover(inputs.device)) as mover:
        assert fill_features(inputs, features, base, mover=mover, between=lambda: None) > 0
    longest = max(inputs.train.lengths[index] for index in aligned_examples(inputs))
    foreseen = inputs.workload.teacher.pass_bytes(longest, width=inputs.source.facts.hidden_size)
    tables = 4096  # of NF4 and its scales, rotary frequencies: no more in any model
    assert 0.98 * foreseen <= tracker.peak_bytes <= foreseen + tables
    prediction = replace(inputs.predict(), saving_bytes=0)  # which is more in so small a model
    assert prediction.peak_op == "the teacher's pass"
    assert prediction.device_bytes > prediction.library_bytes + prediction.slack_bytes + foreseen


def test_widths_are_matched_by_linear_interpolation():
    ramp = torch.arange(4.0).expand(1, 2, 4)
    assert torch.equal(at_width(ramp, 4), ramp)
    assert at_width(ramp, 2).tolist() == [[[0.5, 2.5]] * 2]


@pytest.mark.parametrize(("settings", "match"), [
    ({"method": "let", "align_layer": 9}, "beyond the last one"),
    ({"method": "lopt", "teacher": "x"}, "belongs to local_loss align"),
    ({"method": "e2e", "align_until": 0.3}, "belongs to method let"),
    ({"method": "let", "teacher": "/nowhere"}, "nowhere"),
])  # fmt: skip
def test_what_cannot_be_is_refused(model, tmp_path, settings, match):
    with pytest.raises(InputError, match=match):
        finetune(make_config(model, tmp_path, **settings))


def test_a_teacher_with_another_tokenizer_is_refused(model, tmp_path, monkeypatch):
    import tools.tiny_runs

    monkeypatch.setattr(tools.tiny_runs, "CORPUS", [text.upper() for text in CORPUS])
    other = make_model(tmp_path / "other")
    config = make_config(model, tmp_path, method="let", teacher=str(other))
    with pytest.raises(InputError, match="tokenizer is another one"):
        finetune(config)
    assert not Path(config.output).exists()
