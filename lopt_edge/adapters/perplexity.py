"""The loss of a model, with or without an adapter, on a data file: mean per learned token, and its perplexity.

The rule: it is the loss of training and of a run's evaluation, over the same tokens (replies; of plain text every one), in
the same 4 bits, so that figures can be put side by side. Forward only, layer by layer, one row after the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from lopt_edge.adapters.generation import TextGenerator
from lopt_edge.data import Dataset, collate, load_dataset
from lopt_edge.plan.schedule.knobs import TOKEN_TILES
from lopt_edge.run.step.batches import make_batch
from lopt_edge.run.step.evaluation import held_out_loss


@dataclass(frozen=True)
class Scored:
    """The loss of a data file: mean over so many learned tokens, of so many rows; what was cut or dropped of them."""

    loss: float
    n_tokens: int
    n_rows: int
    n_truncated: int
    n_dropped: int

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def read_for(
    generator: TextGenerator, data: str, *, max_seq_len: int | None = None, columns: Iterable[str] = ()
) -> Dataset:
    """The data as this model is trained on it, `columns` (ours=theirs) under our names. Raises InputError(s)."""
    longest = generator.model.facts.max_positions or 2048
    return load_dataset(data, generator.tokenizer, max_seq_len=min(max_seq_len or 2048, longest), columns=columns)


def score(generator: TextGenerator, dataset: Dataset) -> Scored:
    """The loss of the generator's model on a data set."""
    model = generator.model
    batches = (
        make_batch(collate([example], pad_id=0), model.device, examples=[index])
        for index, example in enumerate(dataset.examples)
    )
    loss = held_out_loss(model, batches, token_tile=TOKEN_TILES[0], between=lambda: None)
    return Scored(loss, dataset.n_supervised, dataset.n_rows, dataset.n_truncated, dataset.n_dropped)
