"""Bytes of everything that a plan names: weights, adapters, saved inputs, graphs, the loss, by arithmetic on model facts.

One `Sizes` for a run (model, adapters, dtype, device type, knobs), asked per micro-batch. Each number is that of the tensor
that the executor makes; a test compares them (tests/laws/test_timeline.py). No torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from lopt_edge.plan.facts import LinearFacts
from lopt_edge.plan.knobs import Knobs
from lopt_edge.plan.layer_bytes import LayerShape, graph_rest, within_layer
from lopt_edge.plan.methods import groups_of
from lopt_edge.plan.ops import Plan
from quant.sizes import packed_sizes

ALIGNMENT = 64  # bytes: pieces of a layer's buffer (run/weights.py), groups of the flat adapters (run/optim.py)
LOSS_TOKEN_TILE = 1024  # run/losses.py
VOCABULARY_CHUNK = {"cpu": 1024, "cuda": 8192}
GroupName = tuple[str, int]


@dataclass(frozen=True)
class MicroBatchSize:
    """`n_sequences` of `n_tokens` each, padding included; `n_supervised` of them have a target."""

    n_sequences: int
    n_tokens: int
    n_supervised: int
    padded: bool = False

    @property
    def n_rows(self) -> int:
        return self.n_sequences * self.n_tokens


def _aligned(n_bytes: int) -> int:
    return ceil(n_bytes / ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Sizes:
    """`vocabulary_itemsize` is that of the stored embedding and lm_head."""

    shape: LayerShape
    knobs: Knobs
    vocabulary_itemsize: int = 2

    # weights ---------------------------------------------------------------------------------------------------------

    @property
    def layer_bytes(self) -> int:
        """A layer's buffer of packed weights (run/weights.py)."""
        total = 0
        for linear in self.shape.facts.linears:
            sizes = packed_sizes((linear.out_features, linear.in_features))
            total += _aligned(sizes.codes_bytes) + _aligned(sizes.absmax_bytes) + _aligned(sizes.nested_absmax_bytes)
        return total

    @property
    def small_bytes(self) -> int:
        """Norms and biases of all layers: resident always."""
        facts = self.shape.facts
        biases = sum(linear.out_features for linear in facts.linears if linear.bias)
        norms = {"gemma2": 4, "gemma3_text": 4, "olmo2": 2}.get(facts.model_type, 2) * facts.hidden_size
        if facts.model_type in ("qwen3", "gemma3_text"):
            norms += 2 * facts.head_dim
        elif facts.model_type == "olmo2":
            norms += (facts.n_heads + facts.n_kv_heads) * facts.head_dim
        return (facts.n_layers * (norms + biases) + facts.hidden_size) * self.shape.itemsize

    @property
    def unpack_buffer_bytes(self) -> int:
        """The one buffer into which weights are unpacked: the largest matrix, or a block of the MLP's three."""
        facts, shape = self.shape.facts, self.shape
        plain = [
            linear.in_features * linear.out_features
            for linear in facts.linears
            if not (shape.blocked and linear.name.startswith("mlp."))
        ]
        block = 3 * min(1024, facts.intermediate_size) * facts.hidden_size if shape.blocked else 0
        return max([*plain, block]) * shape.itemsize

    @property
    def vocabulary_buffer_bytes(self) -> int:
        """A chunk of the lm_head as stored, and in the compute dtype where that differs; all of it where it is resident."""
        facts, c = self.shape.facts, self.shape.itemsize
        rows = min(VOCABULARY_CHUNK[self.shape.device_type], facts.vocab_size)
        if self.knobs.head == "resident":
            return facts.vocab_size * facts.hidden_size * self.vocabulary_itemsize
        cast = c if c != self.vocabulary_itemsize or self.shape.device_type == "cuda" else 0
        on_device = self.vocabulary_itemsize if self.shape.device_type == "cpu" else 0
        return rows * facts.hidden_size * (on_device + cast)

    # groups ----------------------------------------------------------------------------------------------------------

    def _linear_adapter(self, linear: LinearFacts) -> int:
        return (
            (linear.in_features + linear.out_features) * self.shape.rank if linear.short_name in self.shape.targets else 0
        )

    def group_elements(self, group: GroupName) -> int:
        if group[0] == "layer":
            return sum(self._linear_adapter(linear) for linear in self.shape.facts.linears)
        hidden = self.shape.facts.hidden_size
        inner = max(1, hidden // 4)
        return 2 * hidden + 2 * inner * hidden + inner + hidden

    def group_bytes(self, group: GroupName) -> int:
        """fp32 values or gradients of a parameter group."""
        return 4 * self.group_elements(group)

    def states_bytes(self, group: GroupName) -> int:
        n_elements = self.group_elements(group)
        if self.knobs.optimizer == "adamw":
            return 8 * n_elements
        return 2 * (ceil(n_elements / 4) * 4 + 4 * ceil(n_elements / 256))

    def step_within(self, group: GroupName) -> int:
        return 8 * self.group_elements(group) + 4 * self.group_elements(group) if self.knobs.optimizer == "adamw8bit" else 0

    # what lives from step to step ------------------------------------------------------------------------------------

    def persistent(self, plan: Plan) -> dict[str, int]:
        """Bytes on the device by category before the first op of a steady step."""
        knobs = self.knobs
        groups = [group for segment in plan.segments for group in groups_of(segment)]
        flat = sum(_aligned(self.group_bytes(group)) for group in groups)
        aux = sum(_aligned(self.group_bytes(group)) for group in groups if group[0] == "aux")
        n_resident = sum(place == "resident" for place in knobs.weights)
        n_streamed = len(knobs.weights) - n_resident
        slots = min(knobs.ring, n_streamed)
        found = {
            "weights": (n_resident + slots) * self.layer_bytes + self.small_bytes,
            "adapters": flat - aux,
            "aux heads": aux,
            "workspace": self.unpack_buffer_bytes + 8 * len(groups),  # a norm and a step counter for each group
            "head": self.vocabulary_buffer_bytes,
        }
        if knobs.gradients == "device" or knobs.apply == "layer":
            found["gradients"] = flat
        if knobs.states == "device":
            found["optimizer"] = sum(self.states_bytes(group) for group in groups)
        return found

    def persistent_below(self, plan: Plan) -> dict[str, int]:
        """Bytes by lower tier: paged states, and the values before the update that go with them; host copies of weights."""
        found = {"host": sum(place == "host" for place in self.knobs.weights) * self.layer_bytes, "disk": 0}
        if self.knobs.states != "device":
            groups = [group for segment in plan.segments for group in groups_of(segment)]
            found[self.knobs.states] += sum(self.states_bytes(group) for group in groups)
            found["disk" if "disk" in self.knobs.tiers else "host"] += sum(self.group_bytes(group) for group in groups)
        return found

    # micro-batches ---------------------------------------------------------------------------------------------------

    def hidden_bytes(self, batch: MicroBatchSize) -> int:
        return batch.n_rows * self.shape.facts.hidden_size * self.shape.itemsize

    def batch_bytes(self, batch: MicroBatchSize) -> int:
        """Token ids, supervised positions and targets, and the positions of real tokens where there is padding."""
        real = 8 * batch.n_rows if batch.padded else 0
        return 8 * batch.n_rows + 16 * batch.n_supervised + real

    def frame_bytes(self, batch: MicroBatchSize) -> int:
        """Positions and rotary tables, by layer type (the same tables twice where a model has two types)."""
        facts = self.shape.facts
        tables = 2 * batch.n_tokens * facts.head_dim * self.shape.itemsize
        masks = 0
        if facts.model_type == "gemma2" or (facts.sliding_window and facts.sliding_window < batch.n_tokens):
            masks = len(set(facts.layer_types)) * batch.n_tokens**2
        return len(set(facts.layer_types)) * tables + 8 * batch.n_tokens + masks

    def embed_within(self, batch: MicroBatchSize) -> int:
        facts = self.shape.facts
        c, stored = self.shape.itemsize, self.vocabulary_itemsize
        gathered = min(batch.n_rows, facts.vocab_size) * facts.hidden_size * (stored + (c if c != stored else 0))
        scaled = self.hidden_bytes(batch) if facts.model_type in ("gemma2", "gemma3_text", "granite") else 0
        tables = 4 * 3 * batch.n_tokens * facts.head_dim
        return self.hidden_bytes(batch) + max(gathered, scaled, self.frame_bytes(batch) + tables) + 32 * batch.n_rows

    def within(self, op: str, batch: MicroBatchSize) -> int:
        return within_layer(self.shape, op, n_sequences=batch.n_sequences, n_tokens=batch.n_tokens)

    def graph(self, batch: MicroBatchSize) -> tuple[int, bool]:
        return graph_rest(self.shape, n_sequences=batch.n_sequences, n_tokens=batch.n_tokens)

    def loss_within(self, batch: MicroBatchSize, *, task: bool) -> int:
        """The gradient of the output, and a tile's loss with its backward."""
        facts, c = self.shape.facts, self.shape.itemsize
        hidden = facts.hidden_size
        fixed = self.hidden_bytes(batch) + 8 * batch.n_rows
        if task:
            tile = min(LOSS_TOKEN_TILE, batch.n_supervised)
            chunk = min(VOCABULARY_CHUNK[self.shape.device_type], facts.vocab_size)
            rows, capped = tile * hidden, facts.model_type == "gemma2"
            # tile and its norm's input (fp32), normed tile, sum; the scores in both dtypes; slopes of a soft cap
            scoring = rows * (12 if c == 4 else 14) + tile * chunk * ((4 if c == 4 else 6) + (8 if capped else 0))
            return fixed + max(scoring, rows * (24 if c == 4 else 26)) + 64 * tile
        tile = min(LOSS_TOKEN_TILE, batch.n_rows)
        inner = max(1, hidden // 4)
        rows = tile * hidden
        return (
            fixed
            + rows * (2 * c + (4 if c != 4 else 0))
            + 5 * rows * 4
            + 3 * tile * inner * 4
            + self.group_bytes(("aux", 0))
        )
