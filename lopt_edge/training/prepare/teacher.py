"""A teacher's features for the examples that are aligned to them: checked, computed once before the training, kept on disk.

The teacher is the base model without adapters, or another model with the same tokenizer (`--teacher`). Its last hidden
states, after its final norm, are interpolated to our width and kept in `teacher-features` in the output folder until the
run is done, so that no step needs a second model or a second pass. A resumed run finds them there, or computes what is
missing again. The base runs as it is loaded, before any adapter or optimizer state exists, so it takes less than a step;
another teacher runs one sequence at a time with its layers streamed from disk (plan/costs/teacher_pass.py says what that
takes). Which steps are aligned is the course's matter.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lopt_edge.errors import InputError, RunError
from lopt_edge.models.folder import ModelFolder, find_model
from lopt_edge.models.four_bit import four_bit_folder
from lopt_edge.models.tokenizer import load_tokenizer
from lopt_edge.plan.schedule.knobs import Knobs, placement_of
from lopt_edge.run.model.load import Model, load_model
from lopt_edge.run.tiers.feature_cache import ROWS_NAME, FeatureCache
from lopt_edge.run.tiers.moves import Mover
from lopt_edge.system.file_systems import check_free_space

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lopt_edge.config.settings import Config
    from lopt_edge.training.prepare.inputs import Inputs

FEATURES = "teacher-features"


def find_teacher(config: Config, tokenizer: PreTrainedTokenizerBase) -> ModelFolder | None:
    """The other model that teaches; None where the base does, or none. Raises InputError if it reads other tokens."""
    if config.teacher is None:
        return None
    try:
        found = find_model(config.teacher)
    except InputError as error:
        raise InputError(
            error.what, where=f"teacher {error.where.removeprefix('model').lstrip(' :')}".rstrip(), fix=error.fix
        ) from None
    if load_tokenizer(found.path, say=lambda text: None).get_vocab() != tokenizer.get_vocab():
        raise InputError(
            "its tokenizer is another one: its features would belong to other tokens",
            where=f"teacher {config.teacher}",
            fix="choose a model with the same tokenizer",
        )
    return found


def aligned_examples(inputs: Inputs) -> list[int]:
    """The examples of all steps that read a teacher's features, the shortest first."""
    found: set[int] = set()
    for step, window in enumerate(islice(inputs.windows(first=0), inputs.n_steps), start=1):
        if inputs.course.kind(step, inputs.n_steps).teacher:
            found.update(index for indices in window for index in indices)
        if len(found) == len(inputs.train.examples):
            break
    return sorted(found, key=lambda index: inputs.train.lengths[index])


def check_teacher(inputs: Inputs) -> None:
    """Refuse a disk without room for the features, before anything is written. Raises InputError."""
    if any(kind.teacher for kind in inputs.course.kinds):
        need = 2 * inputs.source.facts.hidden_size * sum(inputs.train.lengths[i] for i in aligned_examples(inputs))
        rows = Path(inputs.config.output) / FEATURES / ROWS_NAME
        held = rows.stat().st_blocks * 512 if rows.exists() else 0
        check_free_space(Path(inputs.config.output), need_bytes=max(0, need - held), what="the teacher's features")


@contextmanager
def teacher_features(inputs: Inputs) -> Iterator[FeatureCache | None]:
    """The cache of features in the output folder, open; None where no step reads one. Raises RunError."""
    if not any(kind.teacher for kind in inputs.course.kinds):
        yield None
        return
    folder = Path(inputs.config.output) / FEATURES
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot be made: {error.strerror}", where=str(folder), fix="check the disk") from None
    identity = {
        "model": inputs.model,
        "data": inputs.train.fingerprint,
        "teacher": inputs.teacher_model or "base",
        "compute_dtype": str(inputs.dtype).removeprefix("torch."),
    }
    cache = FeatureCache(folder, identity=identity, lengths=inputs.train.lengths, width=inputs.source.facts.hidden_size)
    try:
        yield cache
    finally:
        cache.close()


def fill_features(inputs: Inputs, cache: FeatureCache, base: Model, *, mover: Mover, between: Callable[[], None]) -> int:
    """Compute the features that are missing; returns for how many examples.

    `base` has no adapters yet; `between` is called before each batch.
    """
    missing = [index for index in aligned_examples(inputs) if not cache.has([index])]
    if not missing:
        return 0
    model = _teacher(inputs, base, mover)
    for indices in inputs.groups(inputs.train, missing) if model is base else [[index] for index in missing]:
        between()
        _fill(inputs, cache, model, indices)
    if model is not base and model.weights is not None:
        model.weights.release()
    return len(missing)


@torch.no_grad()
def _fill(inputs: Inputs, cache: FeatureCache, model: Model, indices: Sequence[int]) -> None:
    """Compute a batch; in a function of its own, so that nothing of it lives on into the next."""
    batch = inputs.batch(inputs.train, indices)
    hidden_BTD = model.embed(batch.ids_BT)
    hidden_BTD = model.norm(
        model.run_all(hidden_BTD, model.layer_context(hidden_BTD, batch.ids_BT, lengths=batch.in_a_row))
    )
    cache.write(indices, at_width(hidden_BTD, inputs.source.facts.hidden_size), packed=batch.packed)


def _teacher(inputs: Inputs, base: Model, mover: Mover) -> Model:
    source = inputs.teacher
    if source is None:
        return base
    folder, _ = four_bit_folder(source, cache_dir=inputs.config.cache_dir)
    n_layers = source.facts.n_layers
    streamed = Knobs(("disk",) * n_layers, ("recompute",) * n_layers)
    return load_model(
        folder, source.facts, device=inputs.device, dtype=inputs.dtype, placement=placement_of(streamed), mover=mover
    )


def at_width(hidden_BTD: Tensor, width: int) -> Tensor:
    """The features of each token, linearly interpolated to `width` numbers (LET, arXiv 2602.05393)."""
    if hidden_BTD.shape[-1] == width:
        return hidden_BTD
    return torch.nn.functional.interpolate(hidden_BTD.float(), size=width, mode="linear", align_corners=False)


def remove_features(output: Path) -> None:
    """Remove the features from the output folder, at the end of a run."""
    shutil.rmtree(output / FEATURES, ignore_errors=True)
