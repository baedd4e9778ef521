"""The reference's log-probabilities that an objective compares with: computed once before the training, kept on disk.

The reference of DPO and KTO is the base as it is loaded, before any adapter or optimizer state exists, so its pass takes
less than a step. Each sequence comes to one number, the summed log-probability of its targets; those of the examples that
the run's steps see, of the held-out data, and (KTO) of the mismatched replies lie in `reference-log-probs` in the output
folder until the run is done. A resumed run finds them there, or computes what is missing again. They are read back as they
were written, so both runs compare with the same bits (design law 7).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from lopt_edge.data import Dataset
from lopt_edge.errors import RunError
from lopt_edge.run.model.load import Model
from lopt_edge.run.step.preference_loss import log_probs
from lopt_edge.run.tiers.score_file import ScoreFile
from lopt_edge.training.checkpoint.output_folder import REFERENCES_NAME

if TYPE_CHECKING:
    from lopt_edge.training.prepare.inputs import Inputs

TRAIN, HELD_OUT = "train", "eval_loss"  # data sets by name; what is evaluated has the name of its loss
MISMATCHED = "mismatched-"  # before the name of those whose replies are mismatched


def compared(inputs: Inputs) -> dict[str, Dataset]:
    """The data sets whose examples have a reference, by name; none where the objective reads none."""
    objective = inputs.objective
    if objective is None or not objective.reads_reference:
        return {}
    own = {TRAIN: inputs.train} | ({} if inputs.held_out is None else {HELD_OUT: inputs.held_out})
    return own | {MISMATCHED + name: data for name, data in inputs.mismatched.items()}


@contextmanager
def open_references(inputs: Inputs) -> Iterator[Mapping[str, ScoreFile]]:
    """The files of references in the output folder, open, by the name of their data set. Raises RunError."""
    root = Path(inputs.config.output) / REFERENCES_NAME
    with ExitStack() as opened:
        found = {}
        for name, data in compared(inputs).items():
            identity = {
                "model": inputs.model,
                "data": data.fingerprint,
                "compute_dtype": str(inputs.dtype).removeprefix("torch."),
            }
            found[name] = ScoreFile(root / name, identity=identity, n_examples=len(data.examples))
            opened.callback(found[name].close)
        yield found


def fill_references(
    inputs: Inputs, files: Mapping[str, ScoreFile], base: Model, *, token_tile: int, between: Callable[[], None]
) -> int:
    """Compute the references that are missing; returns of how many sequences.

    `base` has no adapters yet; `between` is called before each batch. Raises RunError for what is no number.
    """
    n_found = 0
    for name, data in compared(inputs).items():
        wanted = seen_examples(inputs) if name.removeprefix(MISMATCHED) == TRAIN else range(len(data.examples))
        missing = sorted(files[name].missing(list(wanted)), key=data.lengths.__getitem__)
        for indices in inputs.groups(data, missing) if missing else ():
            between()
            batch = inputs.batch(data, indices)
            n_targets = [data.target_counts[index] for index in indices]
            found = log_probs(base, batch, n_targets, token_tile=token_tile)
            for index, value in zip(indices, found, strict=True):
                if not isfinite(value):
                    what = f"the reference's log-probability of this row is {value}"
                    raise RunError(what, where=data.examples[index].where, fix="check the base model; leave the row out")
            files[name].write(indices, found)
        n_found += len(missing)
    return n_found


def seen_examples(inputs: Inputs) -> list[int]:
    """The examples of all steps of the run."""
    found: set[int] = set()
    for window in islice(inputs.windows(first=0), inputs.n_steps):
        found.update(index for indices in window for index in indices)
        if len(found) == len(inputs.train.examples):
            break
    return sorted(found)


def remove_references(output: Path) -> None:
    """Remove the references from the output folder, at the end of a run."""
    shutil.rmtree(output / REFERENCES_NAME, ignore_errors=True)
