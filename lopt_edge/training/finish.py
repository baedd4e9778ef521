"""What a finished run leaves beside the adapter: run.json, plan.json, the model card; and the result for the caller.

Everything that was printed is in these files. The rule: run.json is written when all the others are durable.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lopt_edge.adapters.base import RUN_NAME
from lopt_edge.adapters.card import model_card
from lopt_edge.adapters.merged_files import END_KEY, end_token_ids
from lopt_edge.errors import RunError
from lopt_edge.plan.facts.device_kinds import kind_of
from lopt_edge.run.device import peak_device_bytes
from lopt_edge.system.files import write_json, write_text
from lopt_edge.system.memory import peak_rss_bytes
from lopt_edge.system.versions import versions
from lopt_edge.training.checkpoint.output_folder import METRICS_NAME
from lopt_edge.training.prepare.reference import remove_references
from lopt_edge.training.prepare.teacher import remove_features
from lopt_edge.training.session.finished import Finished
from lopt_edge.training.session.replacement import replacement
from quant.folders import sync_files


@dataclass(frozen=True)
class RunResult:
    """The outcome of a run; `evaluation` and `samples` map "before" and "after"."""

    output: Path
    steps: int
    final_loss: float
    evaluation: dict[str, dict[str, float]]
    samples: dict[str, str]
    peak_rss_bytes: int
    peak_device_bytes: int
    seconds: dict[str, float]
    scored_tokens: dict[str, int] = field(default_factory=dict)  # targets that each loss of `evaluation` is the mean of
    replacement: dict[str, Any] = field(default_factory=dict)  # method repl: training/session/replacement.py
    n_processes: int = 1  # of a pipeline: the peaks are their sums
    ranks: int = 1  # the peaks are the largest rank's

    def __repr__(self) -> str:
        losses = "".join(f", {name} {loss:.4f}" for name, loss in self.evaluation["after"].items())
        return f"RunResult({str(self.output)!r}: {self.steps} steps, final_loss {self.final_loss:.4f}{losses})"


def report(finished: Finished) -> RunResult:
    """Write the files of a session that came to its end, run.json last; returns the result for the caller."""
    state, inputs = finished.state, finished.inputs
    device, output = inputs.device, Path(inputs.config.output)
    in_process = kind_of(device.type).counts_process
    peak_rss = max(state.peak_rss_bytes, peak_rss_bytes())
    peak_device = peak_rss if in_process else max(state.peak_device_bytes, peak_device_bytes(device))
    result = RunResult(
        output=output,
        steps=state.steps,
        final_loss=float("nan") if state.final_loss is None else state.final_loss,
        evaluation={"before": state.before, "after": state.after or state.before},
        samples=state.samples,
        peak_rss_bytes=peak_rss,
        peak_device_bytes=peak_device,
        seconds={name: round(value, 3) for name, value in finished.seconds.items()},
        scored_tokens={name: data.n_supervised for name, data in inputs.evaluated.items()},
        replacement=replacement(state, inputs.course.replaced),
        n_processes=inputs.config.pipeline,
        ranks=inputs.config.ranks,
    )
    corrected = finished.predicted.get("corrected_device_bytes")
    finished.first_steps.write(output, inputs.run_plan, corrected_bytes=corrected)
    run = _run_facts(finished, result)
    write_text(output / "README.md", model_card(run, run_file=RUN_NAME, log_file=METRICS_NAME))
    remove_features(output)
    remove_references(output)
    if not (output / METRICS_NAME).exists():
        raise RunError("was removed or moved while the run went on", where=str(output / METRICS_NAME))
    try:
        sync_files(output)  # peft and transformers write adapter_config.json and the tokenizer without
    except OSError as error:
        raise RunError(f"cannot be made durable: {error.strerror}", where=str(output), fix="look at the disk") from None
    write_json(output / RUN_NAME, run)  # the last file: a folder with it is a finished run's
    return result


def _run_facts(finished: Finished, result: RunResult) -> dict[str, Any]:
    inputs, state = finished.inputs, finished.state
    plans = [inputs.plan(len(inputs.workload.batches), kind) for kind in inputs.course.kinds]
    return {
        "base": inputs.source.name,
        "revision": inputs.source.commit,
        "model_fingerprint": inputs.model,
        "quantised_folder": str(finished.folder),
        "quantised_cache_bytes": finished.cache_bytes,  # 0: the model was in 4 bits already
        "config": inputs.config.model_dump(mode="json"),
        "model": asdict(replace(inputs.source.facts, own_family=None)),
        END_KEY: end_token_ids(inputs.template, inputs.tokenizer),
        "data": {"fingerprint": inputs.train.fingerprint, "examples": len(inputs.train.examples),
                 "format": inputs.train.format, "truncated": inputs.train.n_truncated,
                 "dropped": inputs.train.n_dropped},
        "plan": {"hash": plans[0].hash(), "text": plans[0].text()},
        "kinds_of_step": {plan.kind: {"hash": plan.hash(), "text": plan.text()} for plan in plans} if plans[1:] else {},
        "versions": versions(),
        "device": str(inputs.device),
        "compute_dtype": str(inputs.dtype).removeprefix("torch."),
        "reasons": list(inputs.reasons),
        "totals": {"steps": state.steps, "tokens": state.tokens, "supervised_tokens": state.supervised_tokens,
                   "skipped_steps": state.skipped},
        "evaluation": result.evaluation,
        "scored_tokens": result.scored_tokens,
        **({"replacement": result.replacement} if result.replacement else {}),
        "predicted": finished.predicted,
        "best_eval_loss": state.best["eval_loss"] if state.best else None,
        "samples": result.samples,
        "peaks": {"peak_device_bytes": result.peak_device_bytes, "peak_rss_bytes": result.peak_rss_bytes,
                  **{f"peak_{tier}_bytes": n_bytes for tier, n_bytes in asdict(finished.peaks_below).items()}},
        "seconds": result.seconds,
    }  # fmt: skip
