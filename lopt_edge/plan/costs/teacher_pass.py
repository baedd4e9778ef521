"""What another teacher's pass takes: before the training its features of the aligned examples are computed once.

The teacher's layers come from disk through a ring, one sequence runs at a time, forward only and without adapters; the base
model's weights lie beside it, its adapters and optimizer do not exist yet (lopt_edge/training/prepare/teacher.py). So the
bytes are those of an evaluation of the teacher, and the copies in which its last hidden states are brought to our width.

The base as its own teacher needs no figure: its pass is a step's forward.
"""

from __future__ import annotations

from dataclasses import dataclass

from lopt_edge.plan.costs.key_bytes import all_keys_bytes
from lopt_edge.plan.costs.shape import LayerShape
from lopt_edge.plan.costs.sizes import MicroBatchSize, Sizes
from lopt_edge.plan.facts.model import ModelFacts
from lopt_edge.plan.schedule.knobs import Knobs
from lopt_edge.plan.schedule.segments import Segment

FP32 = 4


@dataclass(frozen=True)
class Teacher:
    """The model that teaches, where it is another one than the base. `vocabulary_itemsize` is that of its stored embedding;
    `itemsize` the compute dtype's."""

    facts: ModelFacts
    vocabulary_itemsize: int
    itemsize: int
    device_type: str

    def pass_bytes(self, n_tokens: int, *, width: int) -> int:
        """The most bytes that its pass takes over a sequence of so many tokens; `width` is the hidden size of the model
        that it teaches."""
        n_layers, batch = self.facts.n_layers, MicroBatchSize(1, n_tokens, n_tokens)
        knobs = Knobs(("disk",) * n_layers, ("recompute",) * n_layers)
        sizes = Sizes(
            LayerShape(self.facts, self.itemsize, 1, (), self.device_type),
            knobs,
            vocabulary_itemsize=self.vocabulary_itemsize,
            evaluates=True,
        )
        forward = Segment(0, 0, n_layers - 1, "none")
        steady = sizes.steady((forward,), gradients_move=True)
        own = steady["weights"] + steady["workspace"]  # the head is not read
        hidden = sizes.hidden_bytes(batch)
        by_kind = {kind: layer for layer, kind in enumerate(self.facts.layer_types)}
        running = max(sizes.forward_within(batch, layer, forward) for layer in by_kind.values())
        matched = n_tokens * FP32 * (self.facts.hidden_size * (self.itemsize != FP32) + width)
        most = max(2 * hidden + running, hidden + matched * (width != self.facts.hidden_size))
        living = sizes.layer_context_bytes(batch) + all_keys_bytes(sizes, batch) + sizes.batch_bytes(batch)
        return own + living + max(most, sizes.embed_within(batch))
