"""Joins a run's settings and data to the planner: the plan of its largest step, and what that will take.

The timeline needs sizes only (plan/predict.py); this file finds them: the longest examples, the stored dtype of the
vocabulary, and what the process takes with the model's code imported, before any tensor. It chooses nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lopt_edge.config import Config
from lopt_edge.data import Dataset
from lopt_edge.models import ModelFolder, tensor_entries
from lopt_edge.plan.knobs import Knobs
from lopt_edge.plan.layer_bytes import LayerShape
from lopt_edge.plan.methods import step_plan
from lopt_edge.plan.ops import Plan
from lopt_edge.plan.passes import arrange
from lopt_edge.plan.predict import Prediction, predict
from lopt_edge.plan.segments import Segment
from lopt_edge.plan.sizes import MicroBatchSize, Sizes
from lopt_edge.plan.validate import validate
from lopt_edge.run.allocator import release_free_memory
from lopt_edge.run.load import import_model_code
from lopt_edge.run.meter import resident_bytes
from quant.sizes import DTYPE_BYTES


def make_plan(config: Config, segments: tuple[Segment, ...], knobs: Knobs, *, n_micro_batches: int) -> Plan:
    plan = arrange(step_plan(config.method, segments, n_micro_batches=n_micro_batches), knobs)
    return validate(plan, clip_scope=config.clip_scope if config.clip else "none")


class Predictor:
    """Predicts the run with given knobs: its largest possible accumulation window, and its largest evaluation batch."""

    def __init__(
        self,
        config: Config,
        source: ModelFolder,
        segments: tuple[Segment, ...],
        targets: tuple[str, ...],
        *,
        device: torch.device,
        dtype: torch.dtype,
        datasets: tuple[Dataset, Dataset | None, Dataset | None],
    ) -> None:
        self.config, self.segments, self.device = config, segments, device
        self.shape = LayerShape(source.facts, dtype.itemsize, config.lora_r, targets, device.type)
        embedding = tensor_entries(source.path)["model.embed_tokens.weight"]
        self.vocabulary_itemsize = DTYPE_BYTES[embedding.dtype]
        train, *others = datasets
        self.batches = largest_window(train, batch_size=config.batch_size, grad_accum=config.grad_accum)
        evaluated = [largest_window(other, batch_size=config.batch_size, grad_accum=1)[0] for other in others if other]
        self.evaluation = max(evaluated, key=lambda batch: batch.n_rows, default=None)
        self.library_bytes = library_bytes(source) if device.type == "cpu" else None

    def __call__(self, knobs: Knobs, batches: Sequence[MicroBatchSize] | None = None) -> Prediction:
        """The largest step of the run, or a step over these micro-batches."""
        batches = self.batches if batches is None else batches
        plan = make_plan(self.config, self.segments, knobs, n_micro_batches=len(batches))
        sizes = Sizes(self.shape, knobs, vocabulary_itemsize=self.vocabulary_itemsize)
        return predict(plan, sizes, batches, library_bytes=self.library_bytes, evaluation=self.evaluation)


def largest_window(dataset: Dataset, *, batch_size: int, grad_accum: int) -> list[MicroBatchSize]:
    """The longest examples in micro-batches, longest first: no window of any order takes more."""
    examples = sorted(dataset.examples, key=lambda example: len(example.input_ids), reverse=True)
    found = []
    for start in range(0, min(len(examples), batch_size * grad_accum), batch_size):
        rows = examples[start : start + batch_size]
        lengths = [len(example.input_ids) for example in rows]
        supervised = max(example.n_supervised for example in examples) * len(rows)
        n_supervised = min(supervised, sum(lengths))
        found.append(MicroBatchSize(len(rows), max(lengths), n_supervised, padded=min(lengths) < max(lengths)))
    return found


def library_bytes(source: ModelFolder) -> int:
    """The process' resident set with the model's code imported, before any weight: what the tensors come on top of."""
    import_model_code(source.path)
    release_free_memory()
    return resident_bytes()
