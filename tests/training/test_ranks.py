"""Whole runs whose steps several processes share: the same as one process, taken up by other numbers, killed, stopped.

What a step computes is tests/laws/test_ranks.py's matter. Rank 0 is this process; the others are real ones.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from lopt_edge import finetune
from lopt_edge.config.rules import check_methods, no_effect_warnings
from lopt_edge.config.settings import Config
from lopt_edge.errors import InputError, Interrupted, OutOfMemory, RunError
from lopt_edge.plan.schedule.effects import Kind
from lopt_edge.plan.schedule.ranks import largest_share, shares
from lopt_edge.planning.worst_case import plan_run
from lopt_edge.run.model.lora import ADAPTER_NAME
from lopt_edge.training.checkpoint.folder import CHECKPOINTS
from lopt_edge.training.session import loaded
from tests import warm
from tools.tiny_runs import log_of, make_config, make_model, metrics_of

pytestmark = pytest.mark.usefixtures("warm_children")

RUN = {"max_steps": 4, "n_rows": 23, "eval_fraction": 0.2, "eval_every": 2, "schedule": "constant", "lora_dropout": 0.1,
       "batch_size": 1, "keep_best": True}  # fmt: skip
PAGED = {"weights": "disk", "saved_inputs": "disk", "optimizer_states": "disk", "gradients": "disk"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


def left(config: Config) -> tuple[bytes, list[dict[str, Any]]]:
    return (Path(config.output) / ADAPTER_NAME).read_bytes(), log_of(config)


@pytest.fixture(scope="module")
def one_process(model, tmp_path_factory) -> Config:
    config = make_config(model, tmp_path_factory.mktemp("one"), save_minutes=1e-9, keep=99, **RUN)
    finetune(config)
    return config


def no_children() -> bool:
    return not [child for child in psutil.Process().children() if child.name() == warm.CHILD.decode()]


def test_two_ranks_are_one_process_and_their_checkpoints_go_on_with_any_number(model, one_process, tmp_path):
    """2 from the beginning, one micro-batch each; 2 -> 1; 1 -> 2 from inside a step, with everything on disk."""
    two = make_config(model, tmp_path, output="two", ranks=2, save_every=1, keep=99, **RUN)
    finetune(two)
    assert left(two) == left(one_process) and no_children()
    peaks = metrics_of(two)[0][-1]["process_peaks"]
    assert [set(each) for each in peaks] == [{"rss", "device", "disk"}] * 2
    starts = (("one", two, "step-000002", {}), ("paged", one_process, "step-000002+1", {"ranks": 2, **PAGED}))
    for name, source, step, changes in starts:
        checkpoint = Path(source.output) / CHECKPOINTS / step
        resumed = make_config(model, tmp_path, output=name, resume=str(checkpoint), **RUN, **changes)
        finetune(resumed)
        assert left(resumed)[0] == left(one_process)[0]
        assert log_of(resumed)[-1] == log_of(one_process)[-1]
    assert metrics_of(resumed)[0][-1]["process_peaks"][1]["disk"] > 0


def test_preferences_dealt_unevenly_are_equal_up_to_rounding(model, tmp_path):
    """Windows of three pairs for two ranks: the first has two, and the sum is bracketed in another way."""
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("".join(
        json.dumps({"prompt": f"What is {i}?", "chosen": "four " * (1 + i % 3), "rejected": "no"}) + "\n" for i in range(9)
    ))  # fmt: skip
    options = {"method": "e2e", "objective": "dpo", "batch_size": 1, "grad_accum": 3, "max_steps": 2, "lr": 1e-3}
    logs = []
    for ranks in (1, 2):
        config = make_config(model, tmp_path, output=f"{ranks}", ranks=ranks, data=str(rows), **options)
        finetune(config)
        logs.append([{name: line[name] for name in ("loss", "rewards_margin")} for line in metrics_of(config)[0]])
    for one, other in zip(*logs, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def when_steps(config: Config, n: int, act: Callable[[], None]) -> threading.Thread:
    """`act` as soon as so many steps are logged."""
    log = Path(config.output) / "metrics.jsonl"

    def watch() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and (not log.exists() or log.read_text().count('"step_seconds"') < n):
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def replica() -> psutil.Process:
    return next(child for child in psutil.Process().children() if child.name() == warm.CHILD.decode())


def test_a_killed_rank_ends_the_run_with_a_checkpoint_and_a_signal_to_it_stops_all(model, tmp_path):
    config = make_config(model, tmp_path, ranks=2, max_steps=5000, n_rows=15)
    killer = when_steps(config, 3, lambda: replica().kill())
    with pytest.raises(RunError) as caught:
        finetune(config)
    killer.join()
    message = str(caught.value)
    assert "rank 1 was killed by SIGKILL" in message and caught.value.exit_code == 1
    assert "go on with: lopt-edge resume" in message and no_children()
    stopper = when_steps(config, 6, lambda: replica().send_signal(signal.SIGINT))
    with pytest.raises(Interrupted, match=r"saved in .*step-"):
        finetune(config.model_copy(update={"resume": "auto"}))
    stopper.join()
    assert no_children()


def test_memory_that_rank_0_is_refused_ends_all_at_once(model, tmp_path, monkeypatch):
    """The other rank waits for a sum that does not come: nobody waits for it."""
    build = loaded.build_executor

    def refused(*arguments: Any, **options: Any) -> Any:
        executor, shape = build(*arguments, **options)
        forward = executor.methods[Kind.FORWARD]

        def call(state: Any, op: Any) -> None:
            if executor.model.clock.step == 2:
                raise MemoryError
            forward(state, op)

        executor.methods[Kind.FORWARD] = call
        return executor, shape

    monkeypatch.setattr(loaded, "build_executor", refused)
    started = time.monotonic()
    with pytest.raises(OutOfMemory, match=r"as of step 1 is in .*step-000001"):
        finetune(make_config(model, tmp_path, ranks=2, max_steps=3, n_rows=15))
    assert no_children() and time.monotonic() - started < 60


def test_a_fault_of_a_rank_is_shown(model, tmp_path, monkeypatch):
    """Its page files find no room: what it says is what the user sees, with its exit code."""
    monkeypatch.setattr("lopt_edge.training.ranks.leader._setup", _broken(monkeypatch))
    config = make_config(model, tmp_path, ranks=2, **PAGED)
    with pytest.raises(InputError, match=r"rank 1 failed: .*page files need"):
        finetune(config)
    assert no_children() and not Path(config.output).exists()


def _broken(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    from lopt_edge.training.ranks import leader

    make = leader._setup
    return lambda *arguments: {**make(*arguments), "disk_bytes": [0, 1 << 60]}


REFUSED = [
    ({"grad_accum": 1}, "leave some of 2 ranks without any"),
    ({"pipeline": 2}, "pipeline: cannot be with ranks"),
    ({"apply": "segment"}, "apply: cannot be with ranks"),
    ({"boundary": "auto"}, "boundary: cannot be with ranks"),
    ({"boundary_cache": "x", "method": "frozen"}, "boundary_cache: cannot be with ranks"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_cannot_be_with_ranks_is_refused_by_name(changes, message):
    values = {"model": "m", "data": "d", "output": "o", "method": "lopt", "ranks": 2, **changes}
    with pytest.raises(InputError, match=message):
        check_methods(Config(**values))


@pytest.mark.parametrize(("changes", "message"), [
    ({"method": "let"}, "learns from a teacher"),
    ({"method": "lopt", "boundary_update": "fresh"}, "fresh cannot be with ranks"),
])  # fmt: skip
def test_what_a_method_needs_alone_is_refused_before_anything_is_loaded(changes, message):
    with pytest.raises(InputError, match=message):
        plan_run("qwen2.5-0.5b", ranks=2, **changes)


def test_an_uneven_deal_is_said_and_a_plan_is_one_ranks():
    assert [len(share) for share in shares(range(7), 3)] == [3, 2, 2] and len(largest_share(range(7), 3)) == 3
    uneven = Config(model="m", data="d", output="o", ranks=3, grad_accum=8)
    assert any("cannot be dealt evenly to 3 ranks" in warning for warning in no_effect_warnings(uneven))
    whole, one = (plan_run("qwen2.5-0.5b", device_memory="8GB", max_seq_len=256, ranks=ranks) for ranks in (1, 4))
    assert one.step_seconds < 0.35 * whole.step_seconds and one.step_tokens == whole.step_tokens
    assert any("each of 4 ranks takes this" in note for note in one.notes)
