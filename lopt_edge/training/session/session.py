"""One attempt at a run, from where it starts to its end: load, evaluate, train, save.

A run is one session, or several if memory refuses a step and a smaller plan takes over (training/run.py). A session changes
`state` only when a step is whole, so whatever is raised, a checkpoint of the last finished step can be written after it.
The rules: a checkpoint comes before the evaluation of its step (which the resumed run then repeats); signals are noted
while the executor works and acted on between micro-batches; a log line is written once per finished step, and whatever
lies beyond a checkpoint's place in the log is cut off when a run goes on from there. Which kind of step comes next is
step_kinds.py's matter, what is measured beside the steps evaluate.py's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopt_edge.adapters.save import save_adapter
from lopt_edge.data import Window, micro_batches_of
from lopt_edge.errors import Interrupted, NotFinite, RunError
from lopt_edge.models.four_bit import folder_bytes, four_bit_folder
from lopt_edge.plan.facts.budget import Budget
from lopt_edge.plan.schedule.build import StepKind
from lopt_edge.plan.schedule.ops import Plan
from lopt_edge.run.device import peak_device_bytes
from lopt_edge.run.model.load import load_model
from lopt_edge.run.model.lora import load_adapters
from lopt_edge.run.model.replaced import apply_replaced, fit_layers, loading_placement
from lopt_edge.run.step.batches import Batch
from lopt_edge.run.step.executor import Cut, StepResult
from lopt_edge.run.step.op_faults import memory_faults
from lopt_edge.run.tiers.feature_cache import FeatureCache
from lopt_edge.run.watch.clock import PhaseClock
from lopt_edge.run.watch.first_steps import N_STEPS, FirstSteps
from lopt_edge.run.watch.memory_report import MemoryMeter, write_report
from lopt_edge.system.allocator import release_free_memory, settle_host_allocator
from lopt_edge.system.files import JsonLines
from lopt_edge.system.memory import peak_rss_bytes
from lopt_edge.system.signals import Interrupts
from lopt_edge.training.checkpoint.folder import name_of
from lopt_edge.training.checkpoint.resume import Start
from lopt_edge.training.checkpoint.run_state import RunState
from lopt_edge.training.checkpoint.snapshot import restore, restore_best
from lopt_edge.training.output_folder import METRICS_NAME
from lopt_edge.training.pipeline.coordinator import crew_of
from lopt_edge.training.prepare.boundary_cache import boundary_caches
from lopt_edge.training.prepare.build import build_executor
from lopt_edge.training.prepare.inputs import Inputs
from lopt_edge.training.prepare.teacher import fill_features, teacher_features
from lopt_edge.training.prepare.tiers import hold_budget, open_tiers, peaks_below
from lopt_edge.training.progress import Progress
from lopt_edge.training.session.evaluate import evaluate, losses, sample
from lopt_edge.training.session.not_finite import dump_not_finite
from lopt_edge.training.session.saving import Saver
from lopt_edge.training.session.step_kinds import StepKinds
from lopt_edge.units import format_bytes

if TYPE_CHECKING:
    from lopt_edge.run.link import Link


NOT_FINITE_ADVICE = "look at these examples; lower --lr; check the base model"


@dataclass(frozen=True, eq=False)
class Surroundings:
    """What all sessions of a run share."""

    progress: Progress
    clock: PhaseClock
    interrupts: Interrupts
    events: JsonLines


class Session:
    """`go` runs it. `start`: the checkpoint to go on from. `most_loss_scale`: a larger one overflowed before."""

    def __init__(
        self, inputs: Inputs, start: Start | None, around: Surroundings, *, most_loss_scale: float = math.inf
    ) -> None:
        self.most_loss_scale = most_loss_scale
        self.inputs, self.config, self.start = inputs, inputs.config, start
        self.progress, self.clock, self.interrupts = around.progress, around.clock, around.interrupts
        self.events, self.output = around.events, Path(inputs.config.output)
        self.state = RunState() if start is None else start.state
        self.n_steps = inputs.n_steps
        self.cut: Cut | None = None  # where the first step goes on
        self.link: Link | None = None  # to the other processes of a pipeline
        prediction = inputs.predict()  # the figures are kept, not the timeline, which would take memory through the run
        names = ("device_bytes", "host_bytes", "disk_bytes", "journal_bytes", "library_bytes", "slack_bytes", "peak_op")
        self.predicted = {name: getattr(prediction, name) for name in names}
        self.predicted["step_seconds"] = inputs.run_plan.step_seconds

    def go(self) -> None:
        """Raises RunError; OutOfMemory and NotFinite where the run could go on in another session; Interrupted."""
        with self.clock.phase("quantise"):
            self.folder, was_there = four_bit_folder(self.inputs.source, cache_dir=self.config.cache_dir)
        inputs = self.inputs
        self.cache_bytes = 0 if inputs.source.facts.quantised else folder_bytes(self.folder)
        if self.cache_bytes:
            made = "" if was_there else f"quantised to 4 bits in {self.clock.seconds['quantise']:.0f} s; "
            size = format_bytes(self.cache_bytes)
            self.progress.note(f"{made}4-bit copy in {self.folder}: {size} of disk, apart from page files")
        tiers = open_tiers(
            self.config,
            inputs.own_knobs,
            device=inputs.device,
            budget=inputs.budget,
            need_disk_bytes=self.predicted["disk_bytes"],
            journal_bytes=self.predicted["journal_bytes"],
        )
        crew = crew_of(inputs, self.start, report=self._own_peaks)
        caches, features = boundary_caches(inputs), teacher_features(inputs)
        with caches as self.caches, features as self.features, tiers as self.mover, crew as self.crew:
            settle_host_allocator(inputs.workload.mmap_bytes(inputs.knobs))
            with self.clock.phase("load"), memory_faults("loading"):
                self._load()
            context_bytes = 0 if inputs.workload.shape.kind.counts_process else inputs.workload.library_bytes
            held = inputs.budget if inputs.run_plan.fits else Budget()  # a forced run would die of what it was forced over
            lift = hold_budget(held, inputs.device, context_bytes=context_bytes)
            try:
                self._run_and_evaluate()
            finally:
                lift()
            with self.clock.phase("save"):
                self.executor.let_go()  # saving imports peft (some 50 MiB); it must not come on top of a step's memory
                release_free_memory()
                self._save_adapter_and_tokenizer()
            self.peaks_below = peaks_below(self.mover)

    def _load(self) -> None:
        inputs, start = self.inputs, self.start
        replaced = inputs.course.replaced
        self.model = load_model(
            self.folder,
            inputs.source.facts,
            device=inputs.device,
            dtype=inputs.dtype,
            placement=loading_placement(inputs.own_knobs, replaced),
            mover=self.mover,
        )
        self.held_out = inputs.batches(inputs.held_out) if inputs.held_out else []
        self.retention = inputs.batches(inputs.retention) if inputs.retention else []
        if start is not None:
            apply_replaced(self.model, start.checkpoint.folder)
        elif replaced:
            self._replace(replaced)
        if self.features is not None:
            self._learn_from_teacher(self.features)
        adapter = self.config.init_adapter if start is None else str(start.checkpoint.folder)
        self.executor, self.shape = build_executor(inputs, self.model, adapter=adapter)
        self.executor.caches = {} if self.features is None else {"teacher": self.features}
        self.kinds = StepKinds(inputs, self.state, self.executor, self.caches)
        if self.crew is not None:
            self.crew.join(self.executor)
            self.link = self.executor.link
        if start is not None:
            self._go_on_from(start)
        self.executor.loss_scale = min(self.executor.loss_scale, self.most_loss_scale)
        self.saver = Saver(inputs, self.executor, self.shape, state=self.state, start=start, seconds=self.clock.seconds)
        self.first_steps = FirstSteps(self.executor, evaluated=self.state.evaluated < 0)
        release_free_memory()

    def _learn_from_teacher(self, features: FeatureCache) -> None:
        with self.clock.phase("teacher"), self.interrupts.deferred():
            n_examples = fill_features(self.inputs, features, self.model, mover=self.mover, between=self.interrupts.check)
        if n_examples:
            size = format_bytes(features.held_bytes)
            self.progress.note(
                f"the teacher's features of {n_examples} examples were computed: {size} of disk until the end"
            )

    def _replace(self, layers: tuple[int, ...]) -> None:
        """Method repl, at its beginning: what the intact model loses, then the fit."""
        with self.clock.phase("evaluate"), memory_faults("evaluation"):
            self.state.intact = losses(self)
        left = fit_layers(self.model, layers)
        self.state.unexplained = {str(layer): by_linear for layer, by_linear in left.items()}
        shares = [share for by_linear in left.values() for share in by_linear.values()]
        self.progress.note(
            f"replaced layers {', '.join(map(str, layers))}: mixtures of the layers beside them leave "
            f"{min(shares):.1%} to {max(shares):.1%} of each matrix unexplained"
        )

    def _go_on_from(self, start: Start) -> None:
        folder, state = start.checkpoint.folder, self.state
        gradient = restore(self.executor, folder, start.values, tier=self.inputs.knobs.states)
        self.executor.loss_scale = state.loss_scale
        restore_best(folder, self.output, self.shape)
        if not state.sequences:
            return
        micro_batch = micro_batches_of(next(self.inputs.windows(first=state.steps)), state.sequences)
        if micro_batch is None:  # the checkpoint's micro-batches were smaller ones
            self.progress.warn(f"step {state.steps + 1} begins again: its micro-batches are cut in another way now")
            state.sequences, state.losses = 0, {}
        else:
            losses = {int(segment): loss for segment, loss in state.losses.items()}
            self.cut = Cut(micro_batch, losses, gradient)

    # training --------------------------------------------------------------------------------------------------------

    def _run_and_evaluate(self) -> None:
        state = self.state
        self.log = JsonLines(self.output / METRICS_NAME, kept_bytes=state.log_bytes)
        try:
            if state.unlogged is not None:
                self.log.write(state.unlogged)
                state.unlogged = None
            with self.interrupts.deferred():
                if state.evaluated < 0:
                    state.before = evaluate(self, 0)
                    sample(self, "before")
                self.progress.start(self.n_steps, done=(done := state.steps))
                self._train()
                self.progress.stop()
                if self.caches is not None and self.caches.open is not None:
                    self.progress.note(self.caches.summary(n_read=self.kinds.n_read, n_steps=state.steps - done))
                if state.best is not None:  # what is reported and sampled is what was saved
                    state.after = state.best
                    load_adapters(self.model, self.output)
                    apply_replaced(self.model, self.output)
                    if self.crew is not None:
                        self.crew.load_adapter(self.output)
                sample(self, "after")
        except Interrupted as stop:
            raise Interrupted(stop.signal_number, self._save_at_stop()) from None
        except RunError as error:
            if self.crew is not None:
                error = self.crew.explained(error)
            raise self._with_checkpoint(error) from error
        finally:
            self.progress.stop()
            self.log.close()

    def _save_at_stop(self) -> str:
        if self.state.steps and not self.saver.is_saved:
            self.saver.save(self.log)
        if self.saver.newest is None:
            return f"no step was finished yet; begin again with: lopt-edge resume {self.output}"
        return f"saved in {self.saver.newest}; go on with: lopt-edge resume {self.output}"

    def _with_checkpoint(self, error: RunError) -> RunError:
        """The error, and where the run stands; the last finished step gets a checkpoint if it has none."""
        said = ""
        if (
            error.values_intact
            and (self.crew is None or self.crew.is_idle)
            and self.state.steps
            and not self.saver.is_saved
            and self.saver.newest_steps < self.state.steps
        ):
            self.state.sequences, self.state.losses = 0, {}
            try:
                self.saver.save(self.log)
            except RunError as fault:
                said = f"\nNo checkpoint of step {self.state.steps} could be written: {fault}{self._rescue()}"
        if self.saver.newest is not None:
            said += (
                f"\nThe run as of step {self.saver.newest_steps} is in {self.saver.newest}; go on with: lopt-edge resume "
            )
            said += str(self.output)
        error.args = (f"{error}{said}",)
        return error

    def _rescue(self) -> str:
        """Where a whole checkpoint cannot be had (its moments lay in a page file that is gone, say): the adapter alone."""
        folder = self.output / f"adapter-{name_of(self.state.steps)}"
        try:
            save_adapter(folder, self.model, self.shape, plain=True)
        except RunError as fault:
            return f"\nNor the adapter alone: {fault}"
        return f"\nThe adapter alone, as of step {self.state.steps}, is in {folder}"

    def _train(self) -> None:
        state = self.state
        if state.steps and self._evaluation_due():
            state.after = evaluate(self, state.steps)
        windows = self.inputs.windows(first=state.steps)
        while state.steps < self.n_steps:
            step = state.steps + 1
            self._step(step, next(windows))
            if self.saver.due(last=step == self.n_steps):
                self._save_or_warn(last=step == self.n_steps)
            self.interrupts.check()
            if self._evaluation_due():
                state.after = evaluate(self, step)

    def _evaluation_due(self) -> bool:
        state, every = self.state, self.config.eval_every
        return state.evaluated < state.steps and bool(state.steps >= self.n_steps or (every and state.steps % every == 0))

    def _step(self, step: int, window: Window) -> None:
        started, kind = time.perf_counter(), self.kinds.of(step, window)
        rates = self.kinds.rates(step, kind)
        if step in self.state.skip:
            self._skip(step, "known from before", f"step {step}: numbers that are not finite")
            return
        batches = [self.inputs.batch(self.inputs.train, indices) for indices in window]
        plan, start, self.cut = self.inputs.plan(len(batches), kind), self.cut, None

        def between(cut: Cut) -> None:
            self.state.sequences = sum(len(indices) for indices in window[: cut.micro_batch])
            self.state.losses = {str(segment): loss for segment, loss in cut.losses.items()}
            if self.interrupts.signal_number is not None:
                self.saver.save(self.log, cut=cut)
                self.interrupts.check()
            elif self.saver.minutes_are_up():
                self._save_or_warn(cut=cut)

        try:
            with self.clock.phase("train"), self._watch(step, batches, plan, kind, whole=start is None):
                run: Callable[..., StepResult] = partial(self.executor.run, align_weight=self.kinds.align_weight(step))
                if self.crew is not None:
                    run = partial(self.crew.run, self.executor, kind)
                result = run(plan, batches, step=step, learning_rates=rates, start=start, between=between)
        except NotFinite as error:
            if not error.values_intact:
                raise
            self._not_finite(step, window, batches, plan, rates, error)
            return
        self._record(step, kind, result, rates, time.perf_counter() - started)

    def _not_finite(
        self, step: int, window: Window, batches: Sequence[Batch], plan: Plan, rates: Mapping[int, float], error: NotFinite
    ) -> None:
        """Nothing was updated: say where it began, then go on without this batch, or stop."""
        file, op = dump_not_finite(
            self.inputs,
            self.executor,
            step=step,
            window=window,
            batches=batches,
            plan=plan,
            rates=rates,
            align_weight=self.kinds.align_weight(step),
            error=error,
        )
        self.events.write({"event": "not finite", "step": step, "op": op, "file": file.name})
        what = f"step {step}: numbers that are not finite first at {op}; the batch is named in {file}"
        if self.config.on_nan == "stop":
            raise RunError(f"{what}\n{error}", fix=f"{NOT_FINITE_ADVICE}; or skip such batches with --on-nan skip")
        self.progress.warn(f"{what}; it is skipped, nothing was updated")
        self._skip(step, op, f"{what}\n{error}")

    def _skip(self, step: int, op: str, what: str) -> None:
        """The step is over without an update, unless there were too many such steps."""
        state = self.state
        if state.skipped_in_row >= self.config.max_skipped:
            before = f"{state.skipped_in_row} batches before it were skipped in a row already"
            raise RunError(f"{before}; {what}", fix=NOT_FINITE_ADVICE)
        state.skipped, state.skipped_in_row = state.skipped + 1, state.skipped_in_row + 1
        self._finish(step)
        self._log({"step": step, "skipped": f"not finite: {op}"})
        if step == self.n_steps == state.skipped:
            raise RunError(f"every batch was skipped: nothing was learned; {what}", fix=NOT_FINITE_ADVICE)

    def _log(self, line: Mapping[str, Any]) -> None:
        """Of a finished step: a line that the disk does not take is kept for the run that goes on."""
        try:
            self.log.write(line)
        except RunError:
            self.state.unlogged = dict(line)
            raise

    def _finish(self, step: int) -> None:
        self.state.steps, self.state.sequences, self.state.losses = step, 0, {}

    @contextmanager
    def _watch(self, step: int, batches: list[Batch], plan: Plan, kind: StepKind, *, whole: bool) -> Iterator[None]:
        """Measure the first steps against the plan, and with --memory-report the second (or the only one) by tensors."""
        if not whole or self.config.memory_report is None or step != min(2, self.n_steps):
            if not whole or len(self.first_steps.steps) >= N_STEPS:
                yield
                return
            with self.first_steps.watching(step, self.inputs.predict([batch.size for batch in batches], kind)):
                yield
            if (surprise := self.first_steps.surprise()) is not None:
                self.progress.warn(surprise)
            if len(self.first_steps.steps) == N_STEPS or step == self.n_steps:
                largest = self.predicted["device_bytes"]
                own = "" if self.crew is None else "process 0: "
                self.progress.note(f"{own}{self.first_steps.correction(largest)}")
                self.predicted["corrected_device_bytes"] = self.first_steps.corrected_bytes(largest)
            return
        meter = MemoryMeter(self.executor)
        with meter.watching(batches):
            yield
        meter.stop()
        prediction = self.inputs.predict([batch.size for batch in batches], kind)
        files = write_report(
            self.config.memory_report,
            prediction,
            meter,
            plan_hash=plan.hash(),
            title=f"{self.inputs.source.facts.architecture}, {self.config.method}, step {step}",
            budget_bytes=self.inputs.budget.device_bytes,
        )
        self.progress.note(f"memory report: {files[0]} and {files[1]}")

    def _record(self, step: int, kind: StepKind, result: StepResult, rates: Mapping[int, float], seconds: float) -> None:
        state = self.state
        self._finish(step)
        state.tokens += result.totals.tokens
        state.supervised_tokens += result.totals.supervised
        state.final_loss, state.skipped_in_row, mean = result.loss, 0, state.level.mean
        peaks = self._own_peaks() if self.crew is None else self.crew.peaks()
        state.peak_rss_bytes = max(state.peak_rss_bytes, peaks["rss"])  # the kernel's own count wavers by some 100 KiB
        state.peak_device_bytes = max(state.peak_device_bytes, peaks["device"])
        below = peaks_below(self.mover)
        metrics = {
            "step": step,
            "loss": result.loss,
            "local_loss": list(result.local_loss),
            "lr": [rates.get(segment.index, 0.0) for segment in kind.segments],  # 0 for a frozen segment
            "grad_norm": list(result.grad_norm),
            "tokens": result.totals.tokens,
            "supervised_tokens": result.totals.supervised,
            "step_seconds": seconds,
            "peak_device_bytes": state.peak_device_bytes,
            "peak_rss_bytes": state.peak_rss_bytes,
            "peak_host_bytes": below.host,
            "peak_pinned_bytes": below.pinned,
            "peak_disk_bytes": peaks["disk"],
        }
        if self.crew is not None:
            metrics["process_peaks"] = self.crew.link.reports
        if kind.name:
            metrics["kind"] = kind.name
        if result.align_loss is not None:
            metrics["align_loss"] = result.align_loss
        self._log(metrics)
        self.progress.step(metrics)
        if state.level.add(result.loss):
            self.progress.warn(f"step {step}: the loss is {result.loss:.4g}, far above its running level of {mean:.4g}")
            self.events.write({"event": "loss rose", "step": step, "loss": result.loss, "level": mean})

    def _own_peaks(self) -> dict[str, int]:
        """Of this process."""
        device = peak_device_bytes(self.inputs.device)
        return {"rss": peak_rss_bytes(), "device": device, "disk": peaks_below(self.mover).disk}

    def _save_or_warn(self, *, cut: Cut | None = None, last: bool = False) -> None:
        """A disk that takes no checkpoint now may take the next one: training goes on, unless this was the last."""
        try:
            self.saver.save(self.log, cut=cut)
        except NotFinite:
            raise
        except RunError as error:
            if last:
                raise
            self.progress.warn(f"{error}\nTraining goes on; the newest checkpoint is {self.saver.newest or 'none'}")
            with suppress(RunError):
                self.events.write({"event": "no checkpoint", "step": self.state.steps, "reason": str(error)})

    # the end ----------------------------------------------------------------------------------------------------------

    def _save_adapter_and_tokenizer(self) -> None:
        save_adapter(self.output, self.model, self.shape)
        tokenizer = self.inputs.tokenizer
        if self.inputs.template is not None:
            tokenizer.chat_template = self.inputs.template.source  # a base model gets the template it was trained with
        try:
            tokenizer.save_pretrained(self.output)
        except OSError as error:
            raise RunError(f"the tokenizer cannot be written: {error.strerror}", where=str(self.output)) from None
