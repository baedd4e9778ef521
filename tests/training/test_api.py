"""The Python API: rows instead of a file, callbacks that hear and may stop, patience, a generator that stays loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lopt_edge
from lopt_edge import Config, InputError, finetune, load, plan_run
from lopt_edge.adapters.generation import generate
from lopt_edge.training.session.callbacks import EvalRecord, StepRecord
from lopt_edge.training.session.tracking import Trackers
from tools.tiny_runs import make_config, metrics_of, write_rows

TINY = Path(__file__).parents[2] / "examples" / "tiny-llama"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def events_of(config: Config) -> list[dict]:
    return [json.loads(line) for line in (Path(config.output) / "events.jsonl").read_text().splitlines()]


def test_a_typo_is_an_input_error_and_reprs_are_lines():
    with pytest.raises(InputError) as error:
        Config(model="m", data="d", output="o", learning_rat=1, lr="x")
    assert "did you mean 'lr'?" in str(error.value) and "lr: must be a valid number" in str(error.value)
    assert repr(Config(model="m", data="d", output="o", lr=1e-3)) == "Config(model='m', data='d', output='o', lr=0.001)"
    plan = plan_run("qwen3-0.6b", gpu="rtx4090", max_seq_len=64, grad_accum=1)
    assert repr(plan).startswith("RunPlan(fits: ") and "\n" not in repr(plan)
    assert set(lopt_edge.__all__) >= {"load", "finetune"}


def test_rows_and_callbacks_and_a_stop(tmp_path, cache):
    steps: list[StepRecord] = []
    evaluations: list[EvalRecord] = []
    ends = []
    evaluation = write_rows(tmp_path / "eval.jsonl", 3, first=50)
    config = make_config(TINY, tmp_path, max_steps=9, eval_data=str(evaluation), cache_dir=cache, data="(rows)")
    rows = [{"prompt": f"f{n}(x)", "completion": "Return x."} for n in range(8)]

    def on_step(record: StepRecord) -> str | None:
        steps.append(record)
        return "stop" if record.step == 2 else None

    result = finetune(config, data=rows, on_step=on_step, on_eval=evaluations.append, on_end=ends.append)
    assert [record.step for record in steps] == [1, 2] and result.steps == 2 and ends == [result]
    logged, _ = metrics_of(config)
    assert [(line["loss"], line["tokens"]) for line in logged] == [(one.loss, one.tokens) for one in steps]
    assert [record.step for record in evaluations] == [0, 2] and steps[0].n_steps == 9
    assert evaluations[-1].held_out == result.evaluation["after"]["eval_loss"] and evaluations[0].retention is None
    assert [event["event"] for event in events_of(config)] == ["ended early"]
    assert (tmp_path / "out.data.jsonl").read_text().count("\n") == 8
    assert repr(result).startswith("RunResult(") and "\n" not in repr(result)
    assert (Path(config.output) / "run.json").exists()


def test_patience_ends_a_run_that_no_longer_improves(tmp_path, cache, command):
    ours = write_rows(tmp_path / "eval.jsonl", 3, first=50)
    evaluation, data = tmp_path / "theirs.jsonl", tmp_path / "data.jsonl"  # a table with names of its own
    for source, target in ((ours, evaluation), (write_rows(tmp_path / "rows.jsonl", 6), data)):
        target.write_text(source.read_text().replace('"prompt"', '"question"').replace('"completion"', '"answer"'))
    config = make_config(
        TINY, tmp_path, max_steps=20, lr=3.0, eval_data=str(evaluation), eval_every=1, patience=2, cache_dir=cache,
        lora_rslora=True, data=str(data), columns=("prompt=question", "completion=answer"),
    )  # fmt: skip
    result = finetune(config)
    losses = [line["eval_loss"] for line in metrics_of(config)[1]]
    lowest = losses.index(min(losses))
    assert result.steps == lowest + 2 < 20 and len(losses) == result.steps + 1
    assert json.loads((Path(config.output) / "adapter_config.json").read_text())["use_rslora"] is True
    asks = ("eval", config.output, "--cache-dir", cache, "--exact-match", 1, "--json", "--data")
    code, out, err = command(*asks, evaluation)
    scored = json.loads(out)
    assert code == 0 and scored["base"]["loss"] == pytest.approx(losses[0], rel=1e-5)
    assert scored["adapter"]["loss"] == pytest.approx(losses[-1], rel=1e-5) and scored["adapter"]["asked"] == 1
    assert "columns as in the run: prompt=question, completion=answer" in " ".join(err.split())
    code, out, err = command(*asks, ours, "--no-base")
    assert code == 0 and json.loads(out) == {"adapter": scored["adapter"]} and "columns" not in err
    code, _, err = command(*asks, evaluation, "--columns", "prompt=questoin,completion=answer")
    assert code == 2 and "did you mean 'question'?" in " ".join(err.split())
    generator = load(None, config.output, cache_dir=cache)
    assert "LlamaForCausalLM" in repr(generator)
    said = generator("f(x)", max_new_tokens=4)
    assert (
        said
        == generator("f(x)", max_new_tokens=4)
        == generate(None, "f(x)", adapter=config.output, max_new_tokens=4, cache_dir=cache)
    )


def test_a_tracker_has_the_numbers_of_the_log(tmp_path, cache):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = make_config(TINY, tmp_path, max_steps=2, cache_dir=cache, track="tensorboard", eval_fraction=0.3)
    finetune(config)
    found = accumulator.EventAccumulator(str(Path(config.output) / "tensorboard"))
    found.Reload()
    steps, evaluations = metrics_of(config)
    for name, lines in (("loss", steps), ("step_seconds", steps), ("eval_loss", evaluations)):
        logged = [(event.step, event.value) for event in found.Scalars(name)]
        assert logged == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines]
    for name, told in (("tensorbord", "is unknown"), ("comet_ml", "pip install comet-ml")):
        with pytest.raises(InputError, match=told):
            finetune(make_config(TINY, tmp_path, output="other", cache_dir=cache, track=name))
    assert not (tmp_path / "other").exists()


def test_trackio_has_the_numbers_offline(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    config = make_config(TINY, tmp_path, max_steps=2, cache_dir=cache, track="trackio", eval_fraction=0.3)
    finetune(config)
    (run,) = SQLiteStorage.get_runs("lopt-edge")
    logs = SQLiteStorage.get_logs("lopt-edge", run)
    steps, evaluations = metrics_of(config)
    for name, lines in (("loss", steps), ("eval_loss", evaluations)):
        logged = [(one["step"], one[name]) for one in logs if name in one]
        assert logged == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines]


class Failing:
    """A tracker whose service goes away at a moment of its life."""

    requires_logging_directory, at, heard = False, "", 0

    def __init__(self, project: str) -> None:
        self.of("start")

    def of(self, moment: str) -> None:
        if type(self).at == moment:
            raise ConnectionError("the service is away")

    def start(self) -> None: ...

    def store_init_configuration(self, values: dict) -> None:
        self.of("settings")

    def log(self, values: dict, step: int) -> None:
        type(self).heard += 1
        self.of("log")

    def finish(self) -> None:
        self.of("finish")


@pytest.mark.parametrize(("at", "heard"), [("start", 0), ("settings", 2), ("log", 1), ("finish", 2)])
def test_a_tracker_that_fails_is_left_out(at, heard):
    failing = type("Failing", (Failing,), {"at": at, "heard": 0})
    warnings: list[str] = []
    trackers = Trackers(Config(model="m", data="d", output="o"), {"one": failing}, warnings.append)
    for step in (1, 2):
        trackers.step(StepRecord(step, 2, 1.0, (), (1e-3,), (1.0,), 10, 0.1, 1))
    trackers.finish()
    assert failing.heard == heard
    assert [("one failed" in text, "the service is away" in text) for text in warnings] == [(True, True)] * (
        at != "settings"
    )


def test_rows_that_are_refused_leave_nothing(tmp_path, cache):
    config = make_config(TINY, tmp_path, cache_dir=cache, data="(rows)")
    with pytest.raises(InputError):
        finetune(config, data=[{"what": "x"}])
    with pytest.raises(InputError, match="no JSON object"):
        finetune(config, data=[{"text": {1, 2}}])
    assert not (tmp_path / "out.data.jsonl").exists() and not (tmp_path / "out").exists()
