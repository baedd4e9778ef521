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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lopt_edge.adapters.save import save_adapter
from lopt_edge.data import Window
from lopt_edge.errors import Interrupted, NotFinite, RunError
from lopt_edge.models.tokenizer_files import write_tokenizer_files
from lopt_edge.plan.costs.predict import Prediction
from lopt_edge.plan.facts.budget import Budget
from lopt_edge.plan.schedule.build import StepKind
from lopt_edge.plan.schedule.ops import Plan
from lopt_edge.run.model.lora import load_adapters
from lopt_edge.run.model.replaced import apply_replaced
from lopt_edge.run.step.batches import Batch
from lopt_edge.run.step.step_state import Cut, Rates, StepResult
from lopt_edge.run.watch.first_steps import N_STEPS
from lopt_edge.run.watch.memory_report import MemoryMeter
from lopt_edge.run.watch.memory_report import write_report as write_memory_report
from lopt_edge.system.allocator import HeapWatch, release_free_memory
from lopt_edge.system.files import JsonLines, torn_tail
from lopt_edge.training.checkpoint.folder import name_of
from lopt_edge.training.checkpoint.output_folder import METRICS_NAME, unfinish
from lopt_edge.training.checkpoint.resume import Start
from lopt_edge.training.checkpoint.run_state import RunState
from lopt_edge.training.prepare.inputs import Inputs
from lopt_edge.training.prepare.tiers import hold_budget, peaks_below
from lopt_edge.training.session.early_end import ends_early, standing
from lopt_edge.training.session.evaluate import evaluate, sample
from lopt_edge.training.session.finished import Finished
from lopt_edge.training.session.loaded import Loaded, RunContext, loading
from lopt_edge.training.session.not_finite import dump_not_finite
from lopt_edge.training.session.report_page import write_report

NOT_FINITE_ADVICE = "look at these examples; lower --lr; check the base model"


class Session:
    """One attempt at a run; it alone writes the run's state.

    `start`: the checkpoint to go on from; `skip`: steps known as bad. `most_loss_scale`: a larger one overflowed before.
    """

    loaded: Loaded  # once `go` has it
    log: JsonLines

    def __init__(
        self,
        inputs: Inputs,
        start: Start | None,
        context: RunContext,
        *,
        skip: Iterable[int] = (),
        most_loss_scale: float = math.inf,
    ) -> None:
        self.inputs, self.config, self.start, self.context = inputs, inputs.config, start, context
        self.progress, self.interrupts = context.progress, context.interrupts
        self.output, self.most_loss_scale = Path(inputs.config.output), most_loss_scale
        self.state = RunState() if start is None else start.state
        self.state.skip = sorted({*self.state.skip, *skip})
        self.n_steps = inputs.n_steps
        self.cut: Cut | None = None  # where the first step goes on
        prediction = inputs.predict()  # the figures are kept, not the timeline, which would take memory through the run
        names = ("device_bytes", "host_bytes", "disk_bytes", "journal_bytes", "library_bytes", "slack_bytes", "peak_op")
        self.predicted = {name: getattr(prediction, name) for name in names}
        self.predicted["step_seconds"] = inputs.run_plan.step_seconds
        self.trim_bytes, self.training_bytes = prediction.trim_bytes, replace(prediction, saving_bytes=0).device_bytes
        self.heap: HeapWatch | None = None  # on a CPU, while it trains

    def go(self) -> Finished:
        """Load, evaluate, train and save to the end.

        Raises RunError; OutOfMemory and NotFinite where the run could go on in another session; Interrupted.
        """
        inputs, context = self.inputs, self.context
        attempt = loading(
            inputs,
            self.start,
            context,
            state=self.state,
            predicted=self.predicted,
            most_loss_scale=self.most_loss_scale,
        )
        with attempt as loaded:
            self.loaded = loaded
            self._note_loaded(loaded)
            context_bytes = 0 if inputs.workload.shape.kind.counts_process else inputs.workload.library_bytes
            held = inputs.budget if inputs.run_plan.fits else Budget()  # a forced run would die of what it was forced over
            wall = hold_budget(held, inputs.device, context_bytes=context_bytes)
            if inputs.workload.shape.kind.counts_process:
                heap = self.heap = HeapWatch(self.trim_bytes, trimmed=wall.renew)
                loaded.executor.observers.append(lambda op, after: None if after else heap.look())
            try:
                self._run_and_evaluate()
            finally:
                wall.lift()
            with context.clock.phase("save"):
                loaded.executor.release()  # what saving takes must not come on top of a step's memory
                release_free_memory()
                self._save_adapter_and_tokenizer()
                write_report(inputs, self.state, self.progress, finished=True)
            below = peaks_below(loaded.mover)
        return Finished(
            inputs, self.state, context.clock.seconds, self.predicted, loaded.folder, loaded.cache_bytes,
            loaded.first_steps, below,
        )  # fmt: skip

    def _note_loaded(self, loaded: Loaded) -> None:
        """Write into the state what loading found out that belongs there."""
        if loaded.replacement is not None:
            self.state.intact = dict(loaded.replacement.intact)
            self.state.unexplained = {layer: dict(shares) for layer, shares in loaded.replacement.unexplained.items()}
        if loaded.begins_again:
            self.state.sequences, self.state.losses = 0, {}
        self.cut = loaded.cut

    # training --------------------------------------------------------------------------------------------------------

    def _run_and_evaluate(self) -> None:
        state, loaded = self.state, self.loaded
        self.log = JsonLines(self.output / METRICS_NAME, kept_bytes=state.log_bytes)
        try:
            if (torn := torn_tail(self.log)) is not None:
                self.progress.warn(torn)
            if state.unlogged is not None:
                self.log.write(state.unlogged)
                state.unlogged = None
            with self.interrupts.deferred():
                if state.evaluated < 0:
                    state.before = self._evaluate(0)
                    self._sample("before")
                budget_bytes = self.inputs.run_plan.budget_bytes["device"]
                self.progress.start(self.n_steps, done=(done := state.steps), budget_bytes=budget_bytes)
                self._train()
                self.progress.stop()
                if loaded.caches is not None and loaded.caches.open is not None:
                    self.progress.note(loaded.caches.summary(n_read=loaded.kinds.n_read, n_steps=state.steps - done))
                if state.best is not None:  # what is reported and sampled is what was saved
                    state.after = state.best
                    load_adapters(loaded.model, self.output)
                    apply_replaced(loaded.model, self.output)
                    if loaded.coordinator is not None:
                        loaded.coordinator.load_adapter(self.output)
                self._sample("after")
        except Interrupted as stop:
            raise Interrupted(stop.signal_number, self._save_at_stop()) from None
        except RunError as error:
            if loaded.coordinator is not None:
                error = loaded.coordinator.explained(error)
            raise self._with_checkpoint(error) from error
        finally:
            self.progress.stop()
            self.log.close()

    def _evaluate(self, step: int) -> dict[str, float]:
        state = self.state

        def between() -> None:
            self.interrupts.check()
            if self.heap is not None:
                self.heap.look()

        found = evaluate(self.loaded, self.context, self.log, step=step, best=state.best, between=between)
        if found.stage is not None:
            state.stage, state.stage_loss, state.stage_waits = found.stage.index, found.stage.loss, found.stage.waits
            if found.stage.over:
                state.stage_ends.append(step)
        state.evaluated, state.best = step, found.losses if found.is_best else state.best
        state.lowest, state.waits = standing(state, found.losses)
        write_report(self.inputs, state, self.progress)
        return found.losses

    def _sample(self, when: str) -> None:
        if (text := sample(self.loaded, self.context)) is not None:
            self.state.samples[when] = text

    def _save_at_stop(self) -> str:
        saver = self.loaded.saver
        if self.state.steps and not saver.is_saved:
            saver.save(self.log)
        if saver.newest is None:
            return f"no step was finished yet; begin again with: lopt-edge resume {self.output}"
        return f"saved in {saver.newest}; go on with: lopt-edge resume {self.output}"

    def _with_checkpoint(self, error: RunError) -> RunError:
        """The error with where the run stands; the last finished step gets a checkpoint if it has none."""
        saver, coordinator, steps, said = self.loaded.saver, self.loaded.coordinator, self.state.steps, ""
        can_save = error.values_intact and (coordinator is None or coordinator.can_save)
        if can_save and steps and not saver.is_saved and saver.newest_steps < steps:
            self.state.sequences, self.state.losses = 0, {}
            try:
                saver.save(self.log)
            except RunError as fault:
                said = f"\nNo checkpoint of step {steps} could be written: {fault}{self._rescue()}"
        if saver.newest is not None:
            said += f"\nThe run as of step {saver.newest_steps} is in {saver.newest}; "
            said += f"go on with: lopt-edge resume {self.output}"
        error.args = (f"{error}{said}",)
        return error

    def _rescue(self) -> str:
        """Save the adapter alone where a whole checkpoint cannot be had (its moments lay in a page file that is gone,
        say)."""
        folder = self.output / f"adapter-{name_of(self.state.steps)}"
        try:
            save_adapter(folder, self.loaded.model, self.loaded.shape, plain=True)
        except RunError as fault:
            return f"\nNor the adapter alone: {fault}"
        return f"\nThe adapter alone, as of step {self.state.steps}, is in {folder}"

    def _train(self) -> None:
        state = self.state
        if state.steps and self._evaluation_due():
            state.after = self._evaluate(state.steps)
        windows = self.loaded.ahead.windows(first=state.steps)
        while state.steps < self.n_steps and not self._ends_early():
            step = state.steps + 1
            self._step(step, next(windows))
            if self.loaded.saver.due(last=step == self.n_steps):
                self._save_or_warn(last=step == self.n_steps)
            self.interrupts.check()
            if self._evaluation_due():
                state.after = self._evaluate(step)

    def _ends_early(self) -> bool:
        """Whether the run ends here, before its last step; then this one is saved and evaluated as that would be."""
        step = self.state.steps
        if not ends_early(self.config, self.state, self.context, n_steps=self.n_steps):
            return False
        if step and not self.loaded.saver.is_saved:
            self._save_or_warn(last=True)
        if self.state.evaluated < step:
            self.state.after = self._evaluate(step)
        return True

    def _evaluation_due(self) -> bool:
        state, every = self.state, self.config.eval_every
        return state.evaluated < state.steps and bool(state.steps >= self.n_steps or (every and state.steps % every == 0))

    def _step(self, step: int, window: Window) -> None:
        started, kind = time.perf_counter(), self.loaded.kinds.of(step, window)
        rates = self.loaded.kinds.rates(step, kind)
        if step in self.state.skip:
            self._skip(step, "known from before", f"step {step}: numbers that are not finite")
            return
        batches = self.loaded.batches(window)
        own = self.inputs.share(batches)
        plan, start, self.cut = self.inputs.plan(len(own), kind), self.cut, None

        def between(cut: Cut) -> None:
            self.state.sequences = sum(len(indices) for indices in window[: cut.micro_batch])
            self.state.losses = {str(segment): loss for segment, loss in cut.losses().items()}
            if self.interrupts.signal_number is not None:
                self.loaded.saver.save(self.log, cut=cut)
                self.interrupts.check()
            elif self.loaded.saver.minutes_are_up():
                self._save_or_warn(cut=cut)

        try:
            with self.context.clock.phase("train"), self._watch(step, own, plan, kind, whole=start is None):
                run: Callable[..., StepResult] = partial(
                    self.loaded.executor.run, align_weight=self.loaded.kinds.align_weight(step)
                )
                if self.loaded.coordinator is not None:
                    run = partial(self.loaded.coordinator.run, self.loaded.executor, kind)
                result = run(plan, batches, step=step, learning_rates=rates, start=start, between=between)
        except NotFinite as error:
            if not error.values_intact:
                raise
            self._not_finite(step, window, batches, plan, rates, error)
            return
        self._record(step, kind, result, rates, time.perf_counter() - started)

    def _not_finite(
        self, step: int, window: Window, batches: Sequence[Batch], plan: Plan, rates: Rates, error: NotFinite
    ) -> None:
        """Report where it began (nothing was updated), then go on without this batch, or stop."""
        file, op = dump_not_finite(
            self.inputs,
            self.loaded.executor,
            step=step,
            window=window,
            batches=batches,
            plan=plan,
            rates=rates,
            align_weight=self.loaded.kinds.align_weight(step),
            error=error,
        )
        self.context.events.write({"event": "not finite", "step": step, "op": op, "file": file.name})
        what = f"step {step}: numbers that are not finite first at {op}; the batch is named in {file}"
        if self.config.on_nan == "stop":
            raise RunError(f"{what}\n{error}", fix=f"{NOT_FINITE_ADVICE}; or skip such batches with --on-nan skip")
        self.progress.warn(f"{what}; it is skipped, nothing was updated")
        self._skip(step, op, f"{what}\n{error}")

    def _skip(self, step: int, op: str, what: str) -> None:
        """End the step without an update, unless there were too many such steps."""
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
        """Log a finished step; a line that the disk does not take is kept for the run that goes on."""
        try:
            self.log.write(line)
        except RunError:
            self.state.unlogged = dict(line)
            raise

    def _finish(self, step: int) -> None:
        self.state.steps, self.state.sequences, self.state.losses = step, 0, {}

    @contextmanager
    def _watch(self, step: int, batches: Sequence[Batch], plan: Plan, kind: StepKind, *, whole: bool) -> Iterator[None]:
        """Measure the first steps against the plan, and with --memory-report the second (or the only one) by tensors."""
        first_steps = self.loaded.first_steps
        compares = whole and len(first_steps.steps) < N_STEPS
        reports = whole and self.config.memory_report is not None and step == min(2, self.n_steps)
        if not compares and not reports:
            yield
            return
        prediction = self.inputs.predict([batch.size for batch in batches], kind)
        meter = MemoryMeter(self.loaded.executor)
        with ExitStack() as watching:
            if compares:
                watching.enter_context(first_steps.watching(step, prediction))
            if reports:
                watching.enter_context(meter.watching(batches))
            yield
        if compares:
            self._compare(step)
        if reports:
            self._report_memory(step, plan, prediction, meter)

    def _compare(self, step: int) -> None:
        first_steps = self.loaded.first_steps
        if (surprise := first_steps.surprise(self.training_bytes)) is not None:
            self.progress.warn(surprise)
        if len(first_steps.steps) == N_STEPS or step == self.n_steps:
            own = "" if self.loaded.coordinator is None else "process 0: "
            corrected = first_steps.corrected_bytes(self.training_bytes) or 0
            tell = self.progress.note if corrected > self.training_bytes else self.progress.detail
            tell(f"{own}{first_steps.correction(self.training_bytes)}")
            self.predicted["corrected_device_bytes"] = max(corrected, self.predicted["device_bytes"])

    def _report_memory(self, step: int, plan: Plan, prediction: Prediction, meter: MemoryMeter) -> None:
        files = write_memory_report(
            str(self.config.memory_report),
            prediction,
            meter,
            plan_hash=plan.hash(),
            title=f"{self.inputs.source.facts.architecture}, {self.config.method}, step {step}",
            budget_bytes=self.inputs.budget.device_bytes,
        )
        self.progress.note(f"memory report: {files[0]} and {files[1]}")

    def _record(self, step: int, kind: StepKind, result: StepResult, rates: Rates, seconds: float) -> None:
        state = self.state
        self._finish(step)
        state.tokens += result.totals.tokens
        state.supervised_tokens += result.totals.supervised
        state.final_loss, state.skipped_in_row, mean = result.loss, 0, state.level.mean
        peaks = self.loaded.peaks() if self.loaded.coordinator is None else self.loaded.coordinator.peaks()
        state.peak_rss_bytes = max(state.peak_rss_bytes, peaks["rss"])  # the kernel's own count wavers by some 100 KiB
        state.peak_device_bytes = max(state.peak_device_bytes, peaks["device"])
        below = peaks_below(self.loaded.mover)
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
        if self.loaded.coordinator is not None:
            metrics["process_peaks"] = self.loaded.coordinator.link.reports
        if kind.name:
            metrics["kind"] = kind.name
        if result.align_loss is not None:
            metrics["align_loss"] = result.align_loss
        metrics |= result.choices
        closing = self.loaded.kinds.closing(step, result.loss)
        state.first_losses, state.last_losses = closing.first, closing.last
        if closing.why:
            state.stage_ends.append(step)
            self.progress.note(closing.why)
            self.context.events.write({"event": "boundary closed", "step": step, "reason": closing.why})
        self._log(metrics)
        self.progress.step(metrics)
        if state.level.add(result.loss):
            self.progress.warn(f"step {step}: the loss is {result.loss:.4g}, far above its running level of {mean:.4g}")
            self.context.events.write({"event": "loss rose", "step": step, "loss": result.loss, "level": mean})

    def _save_or_warn(self, *, cut: Cut | None = None, last: bool = False) -> None:
        """Save. A disk that takes no checkpoint now may take the next one: training goes on, unless this was the last."""
        try:
            self.loaded.saver.save(self.log, cut=cut)
        except NotFinite:
            raise
        except RunError as error:
            if last:
                raise
            self.progress.warn(f"{error}\nTraining goes on; the newest checkpoint is {self.loaded.saver.newest or 'none'}")
            with suppress(RunError):
                self.context.events.write({"event": "no checkpoint", "step": self.state.steps, "reason": str(error)})

    # the end ----------------------------------------------------------------------------------------------------------

    def _save_adapter_and_tokenizer(self) -> None:
        """Write the result; until finish.py has made it durable no run.json says that the run is finished."""
        inputs = self.inputs
        template = None if inputs.template is None else inputs.template.source
        try:
            unfinish(self.output)
            save_adapter(self.output, self.loaded.model, self.loaded.shape)
            write_tokenizer_files(
                self.output, base=inputs.source.path, tokenizer=inputs.tokenizer, template=template, has_config=False
            )
        except OSError as error:
            raise RunError(f"the result cannot be written: {error.strerror or error}", where=str(self.output)) from None
