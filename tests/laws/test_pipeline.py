"""PPLL's law: a pipeline's losses, gradients and adapters are those of one process, bitwise; and it never hangs.

Gradients are compared inside this process: each process of the pipeline is a thread with a model, a plan and a link of its
own. Whole runs start real processes: they are stopped, killed, and gone on with by another number of processes. The plans
of the processes, and the settings that a pipeline refuses, are in test_pipeline_plans.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from lopt_edge import finetune
from lopt_edge.config.settings import Config
from lopt_edge.errors import Interrupted, NotFinite, PeerLost, RunError
from lopt_edge.models.folder import find_model
from lopt_edge.plan.costs.shape import LayerShape
from lopt_edge.plan.costs.sizes import Sizes
from lopt_edge.plan.costs.timeline import timeline
from lopt_edge.plan.schedule.processes import Part, own_knobs, parts_of
from lopt_edge.run.link import Link, host_store, join_store
from lopt_edge.run.model.lora import ADAPTER_NAME
from lopt_edge.run.step import evaluation
from lopt_edge.run.step.batches import as_message, from_message
from lopt_edge.run.step.step_state import StepResult
from lopt_edge.run.watch.memory_report import MemoryMeter
from lopt_edge.training.checkpoint.folder import CHECKPOINTS
from tests import warm
from tests.laws.bench import Bench, make_bench, random_batch
from tests.plan.plans import make_knobs, make_segments
from tools.tiny_runs import log_of, make_config, make_model

pytestmark = pytest.mark.usefixtures("warm_children")

BATCHES = [random_batch((11, 7), seed=1), random_batch((9, 9), seed=2)]
PAGED = {"weights": "disk", "activations": "page", "saved_inputs": "disk", "optimizer_states": "disk", "gradients": "disk"}
PAGED_KNOBS = {"weights": "disk", "saved_inputs": "disk", "states": "disk", "gradients": "disk"}
WAIT = timedelta(seconds=60)


# in threads ------------------------------------------------------------------------------------------------------------


def in_threads(n: int, parts: tuple[Part, ...], run: Callable[[Link], Any], *, timeout: timedelta = WAIT) -> list[Any]:
    """Each process' result, or what it raised."""
    store, found = host_store(n, WAIT), [None] * n

    def one(rank: int) -> None:
        try:
            meeting = store if rank == 0 else join_store(store.port, WAIT)
            found[rank] = run(Link(meeting, parts, rank, timeout=timeout))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def process_bench(folder: Path, link: Link, **options: Any) -> Bench:
    """What this process has: its layers, groups and plan."""
    bench = make_bench(folder, n_micro_batches=2, part=link.part, **options)
    bench.executor.link = link
    return bench


@pytest.mark.parametrize(
    ("method", "num_segments", "n"), [("lopt", 2, 2), ("lopt", 4, 2), ("lopt", 4, 3), ("frozen", 3, 3)]
)
def test_gradients_and_losses_are_those_of_one_process(four_bit, method, num_segments, n):
    folder = four_bit("llama", num_hidden_layers=6)
    whole = make_bench(folder, method=method, num_segments=num_segments, n_micro_batches=2)
    wanted = whole.gradients(BATCHES)
    parts = parts_of(whole.plan.segments, n)

    def run(link: Link) -> tuple[dict[str, torch.Tensor], StepResult]:
        bench = process_bench(folder, link, method=method, num_segments=num_segments)
        told = [from_message(as_message(batch), torch.device("cpu")) for batch in BATCHES]  # without token ids
        return bench.gradients(BATCHES if link.rank == 0 else told), bench.result

    results = in_threads(n, parts, run)
    found = {name: gradient for gradients, _ in results for name, gradient in gradients.items()}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 0 and torch.equal(found[name], gradient), name
    assert (results[0][1].loss, results[0][1].local_loss) == (whole.result.loss, whole.result.local_loss)


def test_a_bad_number_in_one_process_stops_the_update_in_all(four_bit):
    """And the next step is in order: nobody is left waiting for anybody."""
    folder = four_bit("llama", num_hidden_layers=6)
    parts = parts_of(make_segments("lopt", n_layers=6, num_segments=3), 3)

    def run(link: Link) -> tuple[str, bool, bool]:
        bench = process_bench(folder, link, num_segments=3)
        rates = dict.fromkeys(range(3), 1e-2)
        before = {name: p.detach().clone() for name, p in bench.names().items()}
        weight = bench.heads[1].down.weight.data if link.rank == 1 else torch.zeros(1)
        kept = weight.clone()
        if link.rank == 1:
            weight.fill_(float("nan"))
        with pytest.raises(NotFinite) as caught:
            bench.executor.run(bench.plan, BATCHES, step=1, learning_rates=rates)
        weight.copy_(kept)
        same = all(torch.equal(before[name], p.detach()) for name, p in bench.names().items())
        bench.executor.run(bench.plan, BATCHES, step=2, learning_rates=rates)
        changed = not any(torch.equal(before[name], p.detach()) for name, p in bench.names().items())
        return f"{caught.value.op}: {caught.value}", same, changed

    for found in in_threads(3, parts, run):
        assert not isinstance(found, Exception), found
        text, same, changed = found
        assert text.startswith("LOSS 1 mb=0") and "process 1 (layers 2-3): the local loss is not finite" in text
        assert same and changed


def test_a_silent_process_is_named_after_the_time_allowed():
    parts = parts_of(make_segments("lopt", n_layers=6, num_segments=2), 2)

    def run(link: Link) -> None:
        if link.rank == 1:
            link.receive_boundary((2, 3), torch.float32, torch.device("cpu"))
        else:
            time.sleep(3)

    started = time.monotonic()
    _, error = in_threads(2, parts, run, timeout=timedelta(seconds=1))
    assert isinstance(error, PeerLost) and "process 0 (layers 0-2) of the pipeline said nothing for" in str(error)
    assert time.monotonic() - started < 10


def test_no_more_boundaries_are_under_way_than_allowed():
    """A quick process waits for a slow one, and what it sent arrives in order."""
    parts = parts_of(make_segments("lopt", n_layers=6, num_segments=2), 2)
    in_flight = []

    def run(link: Link) -> list[float]:
        if link.rank == 0:
            for i in range(6):
                link.send_boundary(torch.full((1000, 100), float(i)))
                in_flight.append(len(link._in_flight))
            link.flush()
            return []
        time.sleep(0.3)
        return [link.receive_boundary((1000, 100), torch.float32, torch.device("cpu"))[0, 0].item() for _ in range(6)]

    assert in_threads(2, parts, run)[1] == [0, 1, 2, 3, 4, 5]
    assert max(in_flight) == 2


def test_evaluation_flows_through_and_can_be_stopped(four_bit):
    folder = four_bit("llama", num_hidden_layers=6)
    wanted = make_bench(folder, num_segments=3).evaluate(BATCHES)
    parts = parts_of(make_segments("lopt", n_layers=6, num_segments=3), 3)

    def stop() -> None:
        raise Interrupted(signal.SIGTERM)

    def run(link: Link) -> float | None:
        bench = process_bench(folder, link, num_segments=3)
        if link.rank == 0:
            with pytest.raises(Interrupted):
                bench.evaluate(BATCHES, between=stop)
            return bench.evaluate(BATCHES)
        for _ in range(2):
            assert link.receive_message(0)["do"] == "evaluate"
            evaluation.work(bench.model, link, 1024)
        return None

    assert in_threads(3, parts, run) == [wanted, None, None]


class NoLink:
    """Stands for the other processes, with the memory that a link holds."""

    def __init__(self, part: Part) -> None:
        self.part, self.rank, self.held = part, part.rank, deque[torch.Tensor](maxlen=2)

    def send_boundary(self, hidden: torch.Tensor) -> None:
        self.held.append(hidden)

    def receive_boundary(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.full(shape, 0.5, dtype=dtype)

    def flush(self) -> None:
        self.held.clear()

    def agree(self, fault: NotFinite | None, op: str) -> None:
        assert fault is None

    def gather(self, own: dict[str, Any]) -> list[dict[str, Any]]:
        return []


@pytest.mark.parametrize("method", ["lopt", "frozen"])
@pytest.mark.parametrize("changes", [{"activations": "keep"}, PAGED_KNOBS], ids=["kept", "paged"])
def test_predicted_bytes_of_a_process_are_the_tracked_ones(four_bit, tmp_path, method, changes):
    """As tests/laws/test_timeline.py has it for one process."""
    folder = four_bit("llama", num_hidden_layers=6)
    facts = find_model(str(folder)).facts
    batches = [random_batch((90, 60), seed=1), random_batch((100, 80), seed=2), random_batch((70, 50), seed=3)]
    for part in parts_of(make_segments(method, n_layers=6, num_segments=3), 3):
        knobs = make_knobs(6, **changes)
        bench = make_bench(
            folder, method=method, num_segments=3, n_micro_batches=3, knobs=knobs, page_dir=tmp_path, part=part
        )
        bench.executor.link = NoLink(part)
        meter = MemoryMeter(bench.executor)
        for step in (1, 2):
            with meter.watching(batches) if step == 2 else nullcontext():
                bench.executor.run(bench.plan, batches, step=step, learning_rates=dict.fromkeys(range(3), 1e-3))
        bench.executor.mover.close()
        sizes = Sizes(LayerShape(facts, 4, 4, facts.linear_names), own_knobs(knobs, part), vocabulary_itemsize=4)
        predicted = timeline(bench.plan, sizes, [replace(batch.size, n_real=batch.n_tokens) for batch in batches])
        for measured, row in zip(meter.rows, predicted.rows, strict=True):
            off = sum(row.held.values()) - sum(measured.held.values())
            assert 0 <= off <= 64, (part.rank, measured.text, off)
            too_much = row.peak_bytes - measured.peak_bytes
            assert too_much >= -64, (part.rank, measured.text, too_much)
            assert row.op.effect.enters or too_much <= 0.02 * measured.peak_bytes + 64, (measured.text, too_much)


# whole runs ------------------------------------------------------------------------------------------------------------

RUN = {"num_segments": 3, "max_steps": 4, "n_rows": 15, "eval_fraction": 0.2, "eval_every": 2, "schedule": "constant",
       "lora_dropout": 0.1, "keep_best": True}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


def left(config: Config) -> tuple[bytes, list[dict[str, Any]]]:
    return (Path(config.output) / ADAPTER_NAME).read_bytes(), log_of(config)


@pytest.fixture(scope="module")
def one_process(model, tmp_path_factory) -> Config:
    """An undisturbed run, with all checkpoints, those inside a window too."""
    config = make_config(model, tmp_path_factory.mktemp("one"), save_minutes=1e-9, keep=99, **RUN)
    finetune(config)
    return config


def no_children() -> bool:
    return not [child for child in psutil.Process().children() if child.name() == warm.CHILD.decode()]


def test_a_run_and_its_checkpoints_are_those_of_one_process(model, one_process, tmp_path):
    """Three processes from the beginning; then one process from their checkpoint; and paged ones from inside a window."""
    config = make_config(model, tmp_path, output="three", pipeline=3, save_every=1, keep=99, **RUN)
    finetune(config)
    assert left(config) == left(one_process) and no_children()
    checkpoints = Path(config.output) / CHECKPOINTS
    theirs = Path(one_process.output) / CHECKPOINTS / "step-000002+2"
    for name, source, changes in (("one", checkpoints / "step-000002", {}), ("two", theirs, {"pipeline": 2, **PAGED})):
        resumed = make_config(model, tmp_path, output=name, resume=str(source), **RUN, **changes)
        finetune(resumed)
        assert left(resumed)[0] == left(one_process)[0]
        assert log_of(resumed)[-1] == log_of(one_process)[-1]


def when_steps(config: Config, n: int, act: Callable[[], None]) -> threading.Thread:
    """`act` as soon as so many steps are logged."""
    log = Path(config.output) / "metrics.jsonl"

    def watch() -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and (not log.exists() or log.read_text().count('"step_seconds"') < n):
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def worker() -> psutil.Process:
    return next(child for child in psutil.Process().children() if child.name() == warm.CHILD.decode())


def test_a_killed_process_ends_the_run_with_a_checkpoint_and_so_does_sigterm(model, tmp_path):
    config = make_config(model, tmp_path, pipeline=2, num_segments=2, max_steps=5000, n_rows=15, save_every=1)
    killer = when_steps(config, 3, lambda: worker().kill())
    with pytest.raises(RunError) as caught:
        finetune(config)
    killer.join()
    message = str(caught.value)
    assert "process 1 (layers 2-3) of the pipeline was killed by SIGKILL" in message and caught.value.exit_code == 1
    assert "go on with: lopt-edge resume" in message and no_children()
    stopper = when_steps(config, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match=r"saved in .*step-"):
        finetune(config.model_copy(update={"resume": "auto"}))
    stopper.join()
    assert no_children()


def test_processes_end_with_a_killed_process_0(model, tmp_path):
    config = make_config(model, tmp_path, pipeline=2, num_segments=2, max_steps=5000)
    (tmp_path / "run.yaml").write_text(config.as_yaml())
    run = subprocess.Popen(
        [sys.executable, "-c", "from lopt_edge.cli.main import main; main()", "finetune", str(tmp_path / "run.yaml")],
        stderr=subprocess.DEVNULL,
    )
    children: list[psutil.Process] = []
    when_steps(config, 2, lambda: children.extend(psutil.Process(run.pid).children())).join()
    run.kill()
    run.wait()
    assert children
    gone, alive = psutil.wait_procs(children, timeout=60)
    assert gone and not alive
