"""A whole fine-tuning run, in program order: read, lock the output, then one session or, after faults, several.

Each function is one stage and hands its result to the next; how things are done is in the modules that it calls. The
rules: whatever is printed is also in the output folder's files; nothing is written there before all checks passed; and a
run ends in one of four ways only: done, refused (InputError), failed with the last finished step saved (RunError), or
interrupted with the last micro-batch saved (Interrupted).
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lopt_edge.adapters.push import check_name, check_token, push
from lopt_edge.config.load import load_config, settings_text
from lopt_edge.config.rules import check_methods
from lopt_edge.config.settings import Config
from lopt_edge.errors import InputError, Interrupted, NotFinite, OutOfMemory, RunError
from lopt_edge.run.step.executor import SCALE_CUT
from lopt_edge.run.step.op_faults import memory_faults
from lopt_edge.run.watch.clock import PhaseClock
from lopt_edge.system.allocator import release_free_memory, settle_host_allocator
from lopt_edge.system.files import JsonLines, torn_tail, write_json, write_text
from lopt_edge.system.lock import output_lock
from lopt_edge.system.signals import Interrupts
from lopt_edge.training.boundary_probe import Probe, as_json, choose_boundary
from lopt_edge.training.checkpoint.folder import CHECKPOINTS, clean, latest, names, set_aside
from lopt_edge.training.checkpoint.output_folder import (
    BOUNDARY_NAME,
    EVENTS_NAME,
    SETTINGS_NAME,
    check_output,
    damaged_results,
    remove_run,
)
from lopt_edge.training.checkpoint.resume import Start
from lopt_edge.training.checkpoint.run_state import RunState
from lopt_edge.training.finish import RunResult, report
from lopt_edge.training.pipeline.worker import is_worker
from lopt_edge.training.prepare.given_rows import kept_rows
from lopt_edge.training.prepare.inputs import Inputs
from lopt_edge.training.prepare.read import read_inputs
from lopt_edge.training.prepare.teacher import remove_features
from lopt_edge.training.prepare.told import six_facts
from lopt_edge.training.ranks.launched import check_cards, shared_cores, with_ranks
from lopt_edge.training.ranks.replica import is_replica
from lopt_edge.training.recovery import MOST_PLANS, smaller_plan
from lopt_edge.training.session.callbacks import Callbacks, OnEval, OnStep
from lopt_edge.training.session.loaded import RunContext
from lopt_edge.training.session.progress import Progress
from lopt_edge.training.session.session import Session
from lopt_edge.training.session.tracking import trackers_of


def finetune(
    config: Config,
    progress: Progress | None = None,
    *,
    data: Sequence[Mapping[str, Any]] | None = None,
    on_step: OnStep | None = None,
    on_eval: OnEval | None = None,
    on_end: Callable[[RunResult], object] | None = None,
) -> RunResult | None:
    """Train an adapter as `config` says and write the output folder.

    `data`: rows instead of those that `config.data` names; they are kept beside the output (OUTPUT.data.jsonl), so that the
    run can be taken up again. `on_step` and `on_eval` hear of each step and evaluation as records, and end the run early by
    returning "stop"; `on_end` hears of the result.

    Returns None for a dry run, and in all but the first process that torchrun or accelerate launch started. Raises
    InputError for anything wrong with the input (nothing is written then), RunError for a run that failed, and Interrupted
    (a KeyboardInterrupt) for one that SIGINT, SIGTERM or SIGHUP stopped.
    """
    progress = progress or Progress()
    config = with_ranks(config, progress.warn)
    if is_replica(config):
        return None
    if on_step is not None or on_eval is not None:
        progress = Callbacks(progress, on_step, on_eval)
    if (trackers := trackers_of(config, progress.warn)) is not None:
        progress = Callbacks(progress, trackers.step, trackers.evaluation)
    try:
        with kept_rows(config, data) as config:
            result = _finetune(config, progress)
    finally:
        if trackers is not None:
            trackers.finish()
    if result is not None and on_end is not None:
        on_end(result)
    return result


def _finetune(config: Config, progress: Progress) -> RunResult | None:
    check_methods(config)
    if config.pipeline > 1 and is_worker(config):
        return None
    check_cards(config)
    clock, output = PhaseClock(progress.phase), Path(config.output)
    if config.push_to_hub is not None:  # before the hours that it would cost
        check_name(config.push_to_hub, where="push_to_hub")
        check_token()
    interrupts = Interrupts(progress.warn)
    with interrupts.listening(), shared_cores(config), ExitStack() as held:
        resumes = config.resume is not None and output.is_dir()
        if resumes:  # else the folder is not touched before all checks passed
            held.enter_context(output_lock(output, warn=progress.warn))
        settle_host_allocator()
        probes: list[Probe] = []
        if config.boundary is not None:
            config, probes = _with_boundary(config, progress, interrupts)
        with clock.phase("read"):
            inputs, start = read_inputs(config, say=progress.note)
        _tell(inputs, start, progress)
        if config.dry_run:
            return None
        if not resumes:
            if not output.exists():
                held.push(partial(_nothing_was_made, output))
            held.enter_context(output_lock(output, warn=progress.warn))
            # again: another run may have been quicker
            check_output(output, resuming=config.resume is not None, overwrite=config.overwrite)
        _make_ready(config, output, start, progress)
        if probes:
            write_json(output / BOUNDARY_NAME, as_json(probes))
        if start is not None:
            clock.go_on_from(start.state.seconds)
        with _events(output, progress, resumed=start is not None) as events, _advice_when_stopped(output):
            result = _sessions(inputs, start, RunContext(progress, clock, interrupts, events))
        if config.push_to_hub is not None:
            progress.note(f"pushed: {push(output, config.push_to_hub, say=progress.warn)}")
        return result


def _with_boundary(config: Config, progress: Progress, interrupts: Interrupts) -> tuple[Config, list[Probe]]:
    """The settings with boundaries in the place of `auto`: those of the run under way, or those that a probe finds."""
    settings = Path(config.output) / SETTINGS_NAME
    if config.resume is not None and settings.exists():
        before = load_config(settings)
        return config.model_copy(update={"boundary": None, "boundary_layers": before.boundary_layers}), []
    if config.dry_run:
        progress.warn("boundary auto: a dry run probes nothing; the plan is that of the midpoint")
        return config.model_copy(update={"boundary": None}), []
    check_output(Path(config.output), overwrite=config.overwrite)

    def run(short: Config) -> None:
        interrupts.check()
        finetune(short)

    return choose_boundary(config, run, progress)


def _tell(inputs: Inputs, start: Start | None, progress: Progress) -> None:
    for warning in inputs.warnings:
        progress.warn(warning)
    progress.facts(six_facts(inputs))
    for reason in inputs.reasons:
        progress.detail(reason)
    n_micro = inputs.n_micro_batches
    plans = [inputs.plan(n_micro, kind) for kind in inputs.course.kinds]
    named = ", ".join(f"{plan.hash()} ({f'{plan.kind}: ' if plan.kind else ''}{len(plan.ops)} ops)" for plan in plans)
    own = "" if inputs.part is None else " of process 0"
    progress.detail(f"plan{own} {named}: {inputs.n_steps} steps, micro-batches a step: {n_micro}")
    if start is not None:
        inside = f" and {start.state.sequences} sequences of the next" if start.state.sequences else ""
        progress.note(f"resumed after step {start.state.steps}{inside}: {start.checkpoint.folder}")


def _make_ready(config: Config, output: Path, start: Start | None, progress: Progress) -> None:
    """Make the output folder, with the settings for `lopt-edge resume`; what dead runs left half written is removed."""
    clean(output / CHECKPOINTS)
    if config.overwrite and (output / SETTINGS_NAME).exists() and (kept := remove_run(output)):
        progress.warn(f"overwrite removed the run in {output}; what is no run's stays: {', '.join(kept[:5])}")
    if start is not None:
        for name in set_aside(output / CHECKPOINTS, beyond=start.checkpoint.folder):
            progress.warn(f"a newer checkpoint than the one resumed from is kept as {name}")
    for path in output.glob("*.partial"):
        path.unlink()
    for fault in damaged_results(output):
        progress.warn(f"the result of the finished run is damaged and will be written again: {fault}")
    write_text(output / SETTINGS_NAME, settings_text(config))


def _nothing_was_made(output: Path, kind: type[BaseException] | None, *_: object) -> None:
    """Remove the folder of a new run that is refused while it loads (a model that cannot be built, say)."""
    if kind is not None and issubclass(kind, InputError):
        remove_features(output)
        for name in (SETTINGS_NAME, EVENTS_NAME, BOUNDARY_NAME):
            (output / name).unlink(missing_ok=True)
        with suppress(OSError):  # a run under way is another matter: its log is there
            output.rmdir()


@contextmanager
def _events(output: Path, progress: Progress, *, resumed: bool) -> Iterator[JsonLines]:
    """The log events.jsonl, open: what happened beside the steps. A new run begins a new one."""
    path = output / EVENTS_NAME
    events = JsonLines(path, kept_bytes=path.stat().st_size if resumed and path.exists() else 0)
    try:
        if (torn := torn_tail(events)) is not None:
            progress.warn(torn)
            events.write({"event": "torn log", "file": EVENTS_NAME, "bytes": events.torn_bytes})
        yield events
    finally:
        events.close()


@contextmanager
def _advice_when_stopped(output: Path) -> Iterator[None]:
    """Let a stop outside of training (loading, quantising, saving) say what there is to go on from."""
    try:
        yield
    except Interrupted as stop:
        newest = next(iter(names(output / CHECKPOINTS)), None)
        begun = f"the newest checkpoint is {newest}" if newest else "nothing was trained yet"
        raise Interrupted(stop.signal_number, stop.advice or f"{begun}; go on with: lopt-edge resume {output}") from None


@dataclass(frozen=True)
class _Failed:
    """A session's end that another one may take over from."""

    error: RunError
    steps: int  # that were finished
    loss_scale: float | None = None  # of the next session, where gradients overflowed


def _sessions(inputs: Inputs, start: Start | None, context: RunContext) -> RunResult:
    """The result of one session after another, until one comes to its end."""
    first, n_plans, skip, loss_scale = start, 0, set[int](), math.inf
    while True:
        found = _session(inputs, start, context, skip=skip, most_loss_scale=loss_scale)
        if isinstance(found, RunResult):
            return found
        gc.collect()  # the session's tensors hang on the error's frames no longer
        release_free_memory()
        if isinstance(found.error, OutOfMemory):
            n_plans += 1
            smaller = smaller_plan(inputs) if n_plans <= MOST_PLANS else None
            if smaller is None:
                why = f"{MOST_PLANS} smaller plans were tried" if n_plans > MOST_PLANS else "there is no smaller plan"
                raise RunError(
                    f"{found.error}\n{why}", fix="close other programs, lower --max-seq-len, or allow more memory"
                )
            inputs, what = smaller
            context.progress.warn(f"after step {found.steps} memory ran out ({_first_line(found.error)}); {what}")
            context.events.write(
                {"event": "out of memory", "after_step": found.steps, "next": what, "reason": _first_line(found.error)}
            )
        elif found.loss_scale is not None:
            loss_scale = found.loss_scale
            what = f"gradients overflowed after an early update; the run goes back, loss scale {loss_scale:g}"
            context.progress.warn(f"step {found.steps + 1}: {what}")
            context.events.write({"event": "overflow", "step": found.steps + 1, "next": what})
        else:
            skip.add(found.steps + 1)
        start = _last_checkpoint(inputs, first)


def _session(
    inputs: Inputs, start: Start | None, context: RunContext, *, skip: set[int], most_loss_scale: float
) -> RunResult | _Failed:
    """The result of a session; or what failed, where another one may go on. Raises what it cannot. `skip`: steps known as
    bad."""
    session = None
    try:
        with memory_faults("a session"):
            session = Session(inputs, start, context, skip=skip, most_loss_scale=most_loss_scale)
            finished = session.go()
    except OutOfMemory as error:
        if inputs.config.pipeline > 1 or inputs.config.ranks > 1:  # what the others hold of the step is lost
            raise
        return _Failed(_bare(error), 0 if session is None else session.state.steps)
    except NotFinite as error:
        if error.values_intact:
            raise
        assert session is not None
        scale = session.loaded.executor.loss_scale
        if scale > 1.0 and not error.of_loss:  # float16; the executor lowers it where nothing was updated yet
            return _Failed(_bare(error), session.state.steps, max(1.0, scale / SCALE_CUT))
        if inputs.config.on_nan == "stop":
            raise
        return _Failed(_bare(error), session.state.steps)
    return report(finished)


def _first_line(error: RunError) -> str:
    return str(error).splitlines()[0]


def _bare(error: RunError) -> RunError:
    """The error without its frames, which keep the session's tensors alive."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def _last_checkpoint(inputs: Inputs, first: Start | None) -> Start | None:
    """The start of the next session: the newest checkpoint, else where the run began."""
    found, _ = latest(Path(inputs.config.output) / CHECKPOINTS)
    checkpoint = found or (first.checkpoint if first is not None else None)
    if checkpoint is None:
        return None
    return Start(checkpoint, RunState.from_dict(checkpoint.state["run"], where=str(checkpoint.folder)))
