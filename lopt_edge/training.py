"""A whole fine-tuning run, in program order: read, quantise, load, train, save.

Each function is one stage and hands its result to the next; how things are done is in the modules that it calls. The
rule: whatever is printed is also in the output folder's files, and nothing is written there before all checks passed.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import count, islice
from math import ceil
from pathlib import Path
from typing import Any

from lopt_edge.artifacts import (
    RUN_NAME,
    MetricsLog,
    model_card,
    save_adapter,
    write_text,
)
from lopt_edge.config import Config
from lopt_edge.data import Window, epoch_windows
from lopt_edge.errors import RunError
from lopt_edge.first_steps import N_STEPS, FirstSteps
from lopt_edge.generation import Sampling, Speaker
from lopt_edge.memory import hold_budget, open_tiers, peaks_below
from lopt_edge.models import folder_bytes, four_bit_folder
from lopt_edge.plan.budget import Budget, format_bytes
from lopt_edge.plan.knobs import placement_of
from lopt_edge.plan.ops import Plan
from lopt_edge.preparation import AdapterShape, Inputs, build_executor, read_inputs
from lopt_edge.progress import Progress
from lopt_edge.report import MemoryMeter, write_report
from lopt_edge.run.allocator import release_free_memory, settle_host_allocator
from lopt_edge.run.batches import Batch
from lopt_edge.run.executor import Executor, StepResult
from lopt_edge.run.load import load_model
from lopt_edge.run.lora import adapter_tensors, load_adapters
from lopt_edge.run.meter import PhaseClock, peak_device_bytes, peak_rss_bytes
from lopt_edge.run.optim import learning_rate

SAMPLE = Sampling(max_new_tokens=48)


@dataclass(frozen=True)
class RunResult:
    """What a run came to; `evaluation` and `samples` map "before" and "after"."""

    output: Path
    steps: int
    final_loss: float
    evaluation: dict[str, dict[str, float]]
    samples: dict[str, str]
    peak_rss_bytes: int
    peak_device_bytes: int
    seconds: dict[str, float]


def finetune(config: Config, progress: Progress | None = None) -> RunResult | None:
    """Train an adapter as `config` says and write the output folder. None for a dry run.

    Raises InputError for anything wrong with the input (nothing is written then) and RunError for a run that failed.
    """
    progress, clock = progress or Progress(), PhaseClock()
    settle_host_allocator()
    with clock.phase("read"):
        inputs = read_inputs(config)
    for warning in inputs.warnings:
        progress.warn(warning)
    for reason in inputs.reasons:
        progress.note(reason)
    plan = inputs.plan(min(config.grad_accum, ceil(len(inputs.train.examples) / config.batch_size)))
    n_steps = _n_steps(inputs)
    n_micro = plan.n_micro_batches
    progress.note(f"plan {plan.hash()}: {n_steps} steps of {len(plan.ops)} ops, micro-batches a step: {n_micro}")
    if config.dry_run:
        return None
    run = _Run(inputs, n_steps, progress, clock)
    return run.go(plan.text(), plan.hash())


class _Run:
    """The stages after the checks; holds what several of them share."""

    def __init__(self, inputs: Inputs, n_steps: int, progress: Progress, clock: PhaseClock) -> None:
        self.inputs, self.config, self.n_steps = inputs, inputs.config, n_steps
        self.progress, self.clock, self.output = progress, clock, Path(inputs.config.output)
        self.tokens = self.supervised_tokens = 0
        self.best: dict[str, float] | None = None  # with --keep-best: the evaluation of the saved adapter
        self.samples: dict[str, str] = {}
        self.final_loss = float("nan")
        self.finished_steps = self.peak_rss_bytes = self.peak_device_bytes = 0
        prediction = inputs.predict()  # the figures are kept, not the timeline, which would take memory through the run
        names = ("device_bytes", "host_bytes", "disk_bytes", "journal_bytes", "library_bytes", "slack_bytes", "peak_op")
        self.predicted = {name: getattr(prediction, name) for name in names}
        self.predicted["step_seconds"] = inputs.run_plan.step_seconds

    def go(self, plan_text: str, plan_hash: str) -> RunResult:
        with self.clock.phase("quantise"):
            self.folder, was_there = four_bit_folder(self.inputs.source, cache_dir=self.config.cache_dir)
        inputs = self.inputs
        self.cache_bytes = 0 if inputs.source.facts.quantised else folder_bytes(self.folder)
        if self.cache_bytes:
            made = "" if was_there else f"quantised to 4 bits in {self.clock.seconds['quantise']:.0f} s; "
            size = format_bytes(self.cache_bytes)
            self.progress.note(f"{made}4-bit copy in {self.folder}: {size} of disk, apart from page files")
        with open_tiers(self.config, inputs.knobs, device=inputs.device, budget=inputs.budget,
                        need_disk_bytes=self.predicted["disk_bytes"],
                        journal_bytes=self.predicted["journal_bytes"]) as mover:  # fmt: skip
            self.mover = mover
            settle_host_allocator(inputs.workload.mmap_bytes(inputs.knobs))
            with self.clock.phase("load"):
                self._load()
            context_bytes = inputs.workload.library_bytes if inputs.device.type == "cuda" else 0
            held = inputs.budget if inputs.run_plan.fits else Budget()  # a forced run would die of what it was forced over
            lift = hold_budget(held, inputs.device, context_bytes=context_bytes)
            try:
                before, after = self._run_and_evaluate()
            finally:
                lift()
            with self.clock.phase("save"):
                self.executor.let_go()  # saving imports peft (some 50 MiB); it must not come on top of a step's memory
                release_free_memory()
                self._save()
            return self._report({"before": before, "after": after}, plan_text, plan_hash)

    def _load(self) -> None:
        inputs = self.inputs
        self.model = load_model(self.folder, inputs.source.facts, device=inputs.device, dtype=inputs.dtype,
                                placement=placement_of(inputs.knobs), mover=self.mover)  # fmt: skip
        self.executor, self.shape = build_executor(inputs, self.model)
        self.first_steps = FirstSteps(self.executor)
        self.held_out = inputs.batches(inputs.held_out) if inputs.held_out else []
        self.retention = inputs.batches(inputs.retention) if inputs.retention else []
        release_free_memory()

    def _run_and_evaluate(self) -> tuple[dict[str, float], dict[str, float]]:
        self.log = MetricsLog(self.output)
        try:
            before = self._evaluate(0)
            self._sample("before")
            self.progress.start(self.n_steps)
            after = self._train(self.executor) or before
            self.progress.stop()
            if self.best is not None:  # what is reported and sampled is what was saved
                after = self.best
                load_adapters(self.model, self.output)
            self._sample("after")
            return before, after
        except RunError as error:
            raise self._keep_last_step(error) from error
        finally:
            self.progress.stop()
            self.log.close()

    def _keep_last_step(self, error: RunError) -> RunError:
        """Save the adapter as it was after the last finished step, and say where, whatever failed after that."""
        if not self.finished_steps or not error.values_intact or self.best is not None:
            return error
        folder = self.output / f"step-{self.finished_steps}"
        try:
            self._save_adapter(self.shape, folder=folder)
        except (RunError, OSError) as fault:
            return type(error)(f"{error}\nThe adapter of step {self.finished_steps} could not be saved: {fault}")
        return type(error)(f"{error}\nThe adapter as of step {self.finished_steps}, the last one finished, is in {folder}")

    def _train(self, executor: Executor) -> dict[str, float]:
        evaluation: dict[str, float] = {}
        for step, window in enumerate(islice(_windows(self.inputs), self.n_steps), start=1):
            started = time.perf_counter()
            rates = self._rates(step)
            with self.clock.phase("train"):
                batches = [self.inputs.batch(self.inputs.train, indices) for indices in window]
                plan = self.inputs.plan(len(batches))
                with self._watch(step, batches, plan):
                    result = executor.run(plan, batches, step=step, learning_rates=rates)
            self._record(step, result, rates, time.perf_counter() - started)
            last = step == self.n_steps
            if last or (self.config.eval_every and step % self.config.eval_every == 0):
                evaluation = self._evaluate(step)
        return evaluation

    @contextmanager
    def _watch(self, step: int, batches: list[Batch], plan: Plan) -> Iterator[None]:
        """Measure the first steps against the plan, and with --memory-report the second (or the only one) by tensors."""
        if self.config.memory_report is None or step != min(2, self.n_steps):
            if step > N_STEPS:
                yield
                return
            with self.first_steps.watching(step, self.inputs.predict([batch.size for batch in batches])):
                yield
            if (surprise := self.first_steps.surprise()) is not None:
                self.progress.warn(surprise)
            return
        meter = MemoryMeter(self.executor)
        with meter.watching(batches):
            yield
        meter.stop()
        prediction = self.inputs.predict([batch.size for batch in batches])
        files = write_report(
            self.config.memory_report, prediction, meter, plan_hash=plan.hash(),
            title=f"{self.inputs.source.facts.architecture}, {self.config.method}, step {step}",
            budget_bytes=self.inputs.budget.device_bytes,
        )  # fmt: skip
        self.progress.note(f"memory report: {files[0]} and {files[1]}")

    def _rates(self, step: int) -> dict[int, float]:
        config = self.config
        return {
            segment.index: learning_rate(
                step,
                n_steps=self.n_steps,
                peak=config.lr if segment.loss == "task" else config.local_lr,
                schedule=config.schedule,
                warmup_ratio=config.warmup_ratio,
            )
            for segment in self.inputs.segments
            if segment.loss != "none"
        }

    def _record(self, step: int, result: StepResult, rates: dict[int, float], seconds: float) -> None:
        self.tokens += result.totals.tokens
        self.supervised_tokens += result.totals.supervised
        self.final_loss, self.finished_steps = result.loss, step
        self.peak_rss_bytes = max(self.peak_rss_bytes, peak_rss_bytes())  # the kernel's own count wavers by some 100 KiB
        self.peak_device_bytes = max(self.peak_device_bytes, peak_device_bytes(self.inputs.device))
        below = peaks_below(self.mover)
        metrics = {
            "step": step,
            "loss": result.loss,
            "local_loss": list(result.local_loss),
            "lr": [rates.get(segment.index, 0.0) for segment in self.inputs.segments],  # 0 for a frozen segment
            "grad_norm": list(result.grad_norm),
            "tokens": result.totals.tokens,
            "supervised_tokens": result.totals.supervised,
            "step_seconds": seconds,
            "peak_device_bytes": self.peak_device_bytes,
            "peak_rss_bytes": self.peak_rss_bytes,
            "peak_host_bytes": below.host,
            "peak_pinned_bytes": below.pinned,
            "peak_disk_bytes": below.disk,
        }
        self.log.write(metrics)
        self.progress.step(metrics)

    def _evaluate(self, step: int) -> dict[str, float]:
        """Held-out and retention loss, logged; with --keep-best the best adapter so far goes to the output folder."""
        found: dict[str, float] = {}
        with self.clock.phase("evaluate"):
            for name, batches in (("eval_loss", self.held_out), ("retention_loss", self.retention)):
                if batches:
                    found[name] = self.executor.evaluate(batches)
        if found:
            finite = {name: loss if math.isfinite(loss) else None for name, loss in found.items()}  # NaN is not JSON
            self.log.write({"step": step, **finite})
            self.progress.note(f"step {step}: " + ", ".join(f"{key} {value:.4f}" for key, value in found.items()))
        for name, loss in found.items():
            if not math.isfinite(loss):
                raise RunError(f"{name} is {loss}", where=f"step {step}", fix="lower --lr; check the base model")
        better = step and "eval_loss" in found and (self.best is None or found["eval_loss"] < self.best["eval_loss"])
        if self.config.keep_best and better:
            self.best = found
            self._save_adapter(self.shape)
        return found

    def _sample(self, when: str) -> None:
        prompt = self.config.sample_prompt
        if prompt is None:
            return
        speaker = Speaker(self.model, self.inputs.tokenizer, self.inputs.template)
        with self.clock.phase("sample"):
            chat = self.inputs.template is not None
            self.samples[when] = (
                speaker.reply([("user", prompt)], SAMPLE) if chat else speaker.continue_text(prompt, SAMPLE)
            )

    def _save_adapter(self, shape: AdapterShape, *, folder: Path | None = None) -> None:
        save_adapter(
            folder or self.output,
            adapter_tensors(self.model),
            base=self.inputs.source.name,
            revision=self.inputs.source.commit,
            n_layers=self.inputs.source.facts.n_layers,
            **asdict(shape),
        )

    def _save(self) -> None:
        if self.best is None:
            self._save_adapter(self.shape)
        tokenizer = self.inputs.tokenizer
        if self.inputs.template is not None:
            tokenizer.chat_template = self.inputs.template.source  # a base model gets the template it was trained with
        try:
            tokenizer.save_pretrained(self.output)
        except OSError as error:
            raise RunError(f"the tokenizer cannot be written: {error.strerror}", where=str(self.output)) from None

    def _report(self, evaluation: dict[str, dict[str, float]], plan_text: str, plan_hash: str) -> RunResult:
        result = RunResult(
            output=self.output,
            steps=self.n_steps,
            final_loss=self.final_loss,
            evaluation=evaluation,
            samples=self.samples,
            peak_rss_bytes=max(self.peak_rss_bytes, peak_rss_bytes()),
            peak_device_bytes=max(self.peak_device_bytes, peak_device_bytes(self.inputs.device)),
            seconds={name: round(value, 3) for name, value in self.clock.seconds.items()},
        )
        self.first_steps.write(self.output, self.inputs.run_plan)
        run = self._run_facts(result, plan_text, plan_hash)
        write_text(self.output / RUN_NAME, json.dumps(run, indent=2) + "\n")
        write_text(self.output / "README.md", model_card(run))
        return result

    def _run_facts(self, result: RunResult, plan_text: str, plan_hash: str) -> dict[str, Any]:
        inputs = self.inputs
        packages = ("lopt-edge", "torch", "transformers", "peft", "bitsandbytes", "safetensors")
        return {
            "base": inputs.source.name,
            "revision": inputs.source.commit,
            "quantised_folder": str(self.folder),
            "quantised_cache_bytes": self.cache_bytes,  # 0: the model was in 4 bits already
            "config": self.config.model_dump(mode="json"),
            "model": asdict(inputs.source.facts),
            "data": {"fingerprint": inputs.train.fingerprint, "examples": len(inputs.train.examples),
                     "format": inputs.train.format, "truncated": inputs.train.n_truncated,
                     "dropped": inputs.train.n_dropped},
            "plan": {"hash": plan_hash, "text": plan_text},
            "versions": {name: version(name) for name in packages},
            "device": str(inputs.device),
            "compute_dtype": str(inputs.dtype).removeprefix("torch."),
            "reasons": list(inputs.reasons),
            "totals": {"steps": self.n_steps, "tokens": self.tokens, "supervised_tokens": self.supervised_tokens},
            "evaluation": result.evaluation,
            "predicted": self.predicted,
            "best_eval_loss": self.best["eval_loss"] if self.best else None,
            "samples": result.samples,
            "peaks": {"peak_device_bytes": result.peak_device_bytes, "peak_rss_bytes": result.peak_rss_bytes,
                      **{f"peak_{tier}_bytes": n_bytes for tier, n_bytes in asdict(peaks_below(self.mover)).items()}},
            "seconds": result.seconds,
        }  # fmt: skip


def _n_steps(inputs: Inputs) -> int:
    config = inputs.config
    per_epoch = ceil(len(inputs.train.examples) / (config.batch_size * config.grad_accum))
    return config.max_steps or config.epochs * per_epoch


def _windows(inputs: Inputs) -> Iterator[Window]:
    """Accumulation windows, epoch after epoch, without end."""
    config = inputs.config
    for epoch in count():
        yield from epoch_windows(
            inputs.train.lengths,
            seed=config.seed,
            epoch=epoch,
            batch_size=config.batch_size,
            grad_accum=config.grad_accum,
        )
