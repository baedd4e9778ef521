"""Runs with a boundary cache: filled, read, shared, resumed, and refused where it is of something else."""

from __future__ import annotations

from pathlib import Path

import pytest

from lopt_edge import finetune
from lopt_edge.errors import InputError
from lopt_edge.run.model.lora import ADAPTER_NAME
from lopt_edge.run.tiers.feature_cache import IDENTITY_NAME, ROWS_NAME
from lopt_edge.system.lock import output_lock
from lopt_edge.training.checkpoint.folder import name_of
from tools.tiny_runs import log_of, make_config, make_model, metrics_of

STEPS = {"n_rows": 8, "batch_size": 2, "grad_accum": 2}  # two steps an epoch


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


def adapter(config) -> bytes:
    return (Path(config.output) / ADAPTER_NAME).read_bytes()


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "frozen"},
        {"method": "top-layers", "train_layers": 1},
        {"method": "lopt", "local_every": 0, "weights": "disk"},
    ],
)
def test_the_second_epoch_reads_what_the_first_one_wrote(model, tmp_path, settings):
    cache = str(tmp_path / "cache")
    config = make_config(model, tmp_path, epochs=3, boundary_cache=cache, **STEPS, **settings)
    finetune(config)
    steps, _ = metrics_of(config)
    assert [step["kind"] for step in steps] == ["fill"] * 2 + ["read"] * 4
    again = make_config(model, tmp_path, output="again", epochs=3, boundary_cache=cache, **STEPS, **settings)
    finetune(again)
    steps, _ = metrics_of(again)
    assert [step["kind"] for step in steps] == ["read"] * 6
    assert adapter(again) == adapter(config), "reading gives the bits that writing gave"


def test_a_boundary_that_closes_is_kept_while_epochs_read_it(model, tmp_path):
    """In a folder of the run's own, which goes with it; a named one stays, and the same run after it reads it all."""
    closing = {**STEPS, "epochs": 4, "open_until": 0.5}
    config = make_config(model, tmp_path, **closing)
    left = Path(f"{config.output}.boundary")  # of a run of that name that was stopped, on other data
    left.mkdir()
    (left / IDENTITY_NAME).write_text("{}")
    finetune(config)
    kinds = [step["kind"] for step in metrics_of(config)[0]]
    assert kinds == ["open"] * 4 + ["closed-fill"] * 2 + ["closed-read"] * 2
    assert not list(tmp_path.glob("*.boundary"))
    (tmp_path / "strange.boundary").mkdir()
    (tmp_path / "strange.boundary" / "mine.txt").write_text("")
    with pytest.raises(InputError, match=r"holds 'mine\.txt', but no cache"):
        finetune(make_config(model, tmp_path, output="strange", **closing))
    for output, wanted in (("named", kinds), ("again", ["open"] * 4 + ["closed-read"] * 4)):
        other = make_config(model, tmp_path, output=output, boundary_cache=str(tmp_path / "cache"), **closing)
        finetune(other)
        assert [step["kind"] for step in metrics_of(other)[0]] == wanted
        assert adapter(other) == adapter(config)
    scarce = make_config(model, tmp_path, output="scarce", disk_memory="1000B", **closing)
    with pytest.raises(InputError, match="disk_memory: the closed boundary takes"):
        finetune(scarce)
    assert not Path(scarce.output).exists()


def test_a_damaged_cache_is_filled_again_and_changes_nothing(model, tmp_path):
    config = make_config(model, tmp_path, method="frozen", boundary_cache=str(tmp_path / "cache"), **STEPS)
    finetune(config)
    rows = tmp_path / "cache" / ROWS_NAME
    content = bytearray(rows.read_bytes())
    content[3] ^= 1
    rows.write_bytes(content)
    again = make_config(model, tmp_path, output="again", method="frozen", boundary_cache=str(tmp_path / "cache"), **STEPS)
    finetune(again)
    assert sorted(step["kind"] for step in metrics_of(again)[0]) == ["fill", "read"]
    assert adapter(again) == adapter(config)


def test_a_resumed_run_goes_on_with_it(model, tmp_path):
    settings = {"method": "frozen", "epochs": 2, "boundary_cache": str(tmp_path / "cache"), **STEPS}
    whole = make_config(model, tmp_path, output="whole", **{**settings, "boundary_cache": str(tmp_path / "other")})
    finetune(whole)
    part = make_config(model, tmp_path, output="part", save_every=1, keep=9, **settings)
    finetune(part)
    newest = Path(part.output) / "checkpoints" / name_of(3)
    resumed = make_config(model, tmp_path, output="resumed", resume=str(newest), **settings)
    finetune(resumed)
    assert adapter(resumed) == adapter(whole)
    assert log_of(resumed)[-1] == log_of(whole)[-1]
    without = make_config(model, tmp_path, output="without", resume=str(newest), **{**settings, "boundary_cache": None})
    with pytest.raises(InputError, match="boundary_cache"):
        finetune(without)


@pytest.mark.parametrize("change", ["model", "data", "boundary"])
def test_a_cache_of_another_run_is_refused(model, tmp_path, change):
    cache = str(tmp_path / "cache")
    finetune(make_config(model, tmp_path, method="frozen", boundary_cache=cache, **STEPS))
    other = make_model(tmp_path / "other", vocab_size=321) if change == "model" else model
    settings = {**STEPS, **({"n_rows": 9} if change == "data" else {"boundary_layers": 1} if change == "boundary" else {})}
    config = make_config(other, tmp_path, output="refused", method="frozen", boundary_cache=cache, **settings)
    with pytest.raises(InputError, match=rf"cache of another run: .*{change}"):
        finetune(config)
    assert not Path(config.output).exists()


def test_a_cache_that_another_run_holds_is_refused_by_its_name(model, tmp_path):
    cache = tmp_path / "cache"
    config = make_config(model, tmp_path, method="frozen", boundary_cache=str(cache), **STEPS)
    with output_lock(cache), pytest.raises(InputError, match=f"boundary_cache {cache}: another run"):
        finetune(config)


@pytest.mark.parametrize(
    "settings",
    [{"method": "lopt"}, {"method": "e2e"}, {"method": "lcsb"}, {"method": "lopt", "local_every": 0, "open_every": 4}],
)
def test_methods_whose_early_layers_train_have_no_cache(model, tmp_path, settings):
    with pytest.raises(InputError, match="early segments that never train"):
        make_config(model, tmp_path, boundary_cache=str(tmp_path / "cache"), **settings)
