"""Bytes of everything that a plan names: weights, adapters, saved inputs, graphs, the loss, by arithmetic on model facts.

One `Sizes` for a run (model, adapters, dtype, device type, knobs), asked per micro-batch. Each number is that of the tensor
that the executor makes; a test compares them (tests/laws/test_timeline.py). No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import ceil

from lopt_edge.plan.costs.layer_bytes import (
    GraphBytes,
    LayerRun,
    backward_within,
    embed_bytes,
    forward_within,
    graph_bytes,
    loss_within,
)
from lopt_edge.plan.costs.module_bytes import mixed_elements
from lopt_edge.plan.costs.shape import LayerShape, Vocabularies
from lopt_edge.plan.facts.layers import LayerFacts, LinearFacts
from lopt_edge.plan.schedule.build import groups_of
from lopt_edge.plan.schedule.effects import Kind
from lopt_edge.plan.schedule.knobs import ELSEWHERE, Knobs, mlp_pieces
from lopt_edge.plan.schedule.ops import GroupName, Keep, Plan
from lopt_edge.plan.schedule.segments import Segment
from quant.gguf.types import BLOCK_TYPES, parts_bytes, scratch_bytes
from quant.sizes import MlpPieces, packed_sizes

DISK_GRAIN = 4096  # bytes: what a page file hands out is a multiple (a page of memory, a block of common file systems)
MOST_PAGES = 32  # tensors of one paged graph; with dropout 24 in a layer of Gemma 4 E4B, 26 in one of Qwen3.5 with experts
CACHE_ITEMSIZE = 2  # bfloat16: a boundary cache (run/tiers/feature_cache.py)
ALIGNMENT = 64  # bytes: pieces of a layer's buffer (run/tiers/weights.py), groups of the flat adapters (run/step/optim.py)


@dataclass(frozen=True)
class MicroBatchSize:
    """The size of a micro-batch: `n_sequences` of `n_tokens` each, padding included; `n_supervised` of them have a target.

    `n_real` of them are no padding, where there is any (None: not known, all of them at most). `in_a_row`: the lengths of
    the sequences that lie in its one row (packing), which then counts as one; of the largest step the longest ones.
    `scored`: its task loss is one of preferences, of so many sequences each, and keeps a number for each supervised token.
    """

    n_sequences: int
    n_tokens: int
    n_supervised: int
    padded: bool = False
    n_real: int | None = None
    in_a_row: tuple[int, ...] = ()
    scored: int = 0

    @property
    def n_rows(self) -> int:
        """The number of tokens, padding included."""
        return self.n_sequences * self.n_tokens

    @property
    def longest(self) -> int:
        """The tokens of its longest sequence, padding included."""
        return max(self.in_a_row, default=self.n_tokens)

    @property
    def attended(self) -> tuple[int, ...]:
        """The length of each sequence that is attended to by itself."""
        return self.in_a_row or (self.n_tokens,) * self.n_sequences

    @property
    def n_real_most(self) -> int:
        """The number of real tokens, or of all of them where that is not known."""
        return self.n_rows if self.n_real is None else self.n_real


def _aligned(n_bytes: int) -> int:
    return ceil(n_bytes / ALIGNMENT) * ALIGNMENT


@lru_cache(maxsize=64)
def _packed_bytes(kind: LayerFacts) -> tuple[int, int]:
    """The bytes of a layer's buffer of packed weights, and of the codes among them."""
    sizes = [packed_sizes(shape) for shape in kind.matrix_shapes]
    pieces = ((one.codes_bytes, one.absmax_bytes, one.nested_absmax_bytes) for one in sizes)
    return sum(_aligned(piece) for each in pieces for piece in each), sum(one.codes_bytes for one in sizes)


@lru_cache(maxsize=64)
def _in_pieces(shape: LayerShape, pieces: MlpPieces) -> LayerShape:
    """The shape with these pieces, the same object each time: a search compares shapes a million times."""
    return shape if pieces == shape.pieces else replace(shape, pieces=pieces)


def on_disk(n_bytes: int, n_pieces: int = 1) -> int:
    """The most that so many bytes take of a page file in so many pieces: each is rounded up to a grain."""
    return (ceil(n_bytes / DISK_GRAIN) + n_pieces - 1) * DISK_GRAIN


@dataclass(frozen=True)
class Sizes:
    """The bytes of everything that a run has. `vocabulary_itemsize` is that of the stored embedding and lm_head.
    `evaluates`: the run has held-out data.

    `groups` are the parameter groups of the run, where it has others than those of one step. `replaced` layers have no
    weights of their own, but mixing coefficients. Of the layers before `closed` neither moments nor gradients are there any
    more.
    """

    shape: LayerShape
    knobs: Knobs
    vocabulary_itemsize: int = 2
    evaluates: bool = False
    groups: tuple[GroupName, ...] = ()
    replaced: tuple[int, ...] = ()
    closed: int = 0

    def closing(self, closed: int, *, evaluates: bool) -> Sizes:
        """The sizes once the layers before `closed` train no more, of a run that evaluates or does not."""
        same = (closed, evaluates) == (self.closed, self.evaluates)
        return self if same else replace(self, closed=closed, evaluates=evaluates)

    def groups_of(self, segments: Sequence[Segment]) -> tuple[GroupName, ...]:
        """The parameter groups that are updated at some time."""
        return self.groups or tuple(group for segment in segments for group in groups_of(segment))

    def open_groups(self, segments: Sequence[Segment]) -> tuple[GroupName, ...]:
        """The parameter groups that are updated now or later."""
        return tuple(group for group in self.groups_of(segments) if group[0] != "layer" or group[1] >= self.closed)

    # weights ---------------------------------------------------------------------------------------------------------

    @cached_property
    def bytes_of_layers(self) -> tuple[int, ...]:
        """The bytes of each layer's buffer of packed weights (run/tiers/weights.py); a GGUF file's layers differ."""
        facts = self.shape.facts
        if facts.forms is None:
            by_kind = [_packed_bytes(kind)[0] for kind in facts.kinds]
            return tuple(by_kind[kind] for kind in facts.kind_of_layer)
        return tuple(
            sum(
                n_matrices * sum(_aligned(n_bytes) for n_bytes in parts_bytes(form, matrix))
                for form, matrix, n_matrices in facts.stored_matrices(layer)
            )
            for layer in range(facts.n_layers)
        )

    def _bytes_at(self, *places: str) -> list[int]:
        """The bytes of each layer with weights of its own that lies at one of these places."""
        layers = enumerate(zip(self.knobs.weights, self.bytes_of_layers, strict=True))
        return [n_bytes for layer, (place, n_bytes) in layers if layer not in self.replaced and place in places]

    @cached_property
    def code_bytes(self) -> int:
        """The bytes of 4-bit codes on the device: of resident layers, and of the largest in each buffer of the ring."""
        kinds = self.shape.facts.kind_of_layer
        codes = [_packed_bytes(kind)[1] for kind in self.shape.facts.kinds]
        own = [(place, codes[kinds[layer]]) for layer, place in enumerate(self.knobs.weights) if layer not in self.replaced]
        streamed = [n_bytes for place, n_bytes in own if place not in ("resident", ELSEWHERE)]
        ring = min(self.knobs.ring, len(streamed)) * max(streamed, default=0)
        return sum(n_bytes for place, n_bytes in own if place == "resident") + ring

    @cached_property
    def small_bytes(self) -> int:
        """The bytes of norms, biases and the like of all layers, which are always resident."""
        facts = self.shape.facts
        here = (facts.layer(layer) for layer, place in enumerate(self.knobs.weights) if place != ELSEWHERE)
        norms = facts.hidden_size + facts.beside_elements + (facts.own_inputs.width if facts.own_inputs else 0)
        return (sum(layer.small_elements for layer in here) + norms) * self.shape.itemsize + facts.table_bytes

    def unpack_buffer_bytes(self, segments: Sequence[Segment]) -> int:
        """The bytes of the one buffer into which weights are unpacked: the largest matrix, or a block of the MLP's three.

        With dropout the MLP is plain in training, in blocks without LoRA, in a tail and in evaluation.
        """
        facts, shape = self.shape.facts, self.shape
        linears = {linear for kind in facts.kinds for linear in kind.linears}
        kinds = [shape.of_kind(kind) for kind in range(len(facts.kinds))]
        found = [x.in_features * x.out_features for x in linears if not x.name.startswith("mlp.")]
        found += [x.in_features * x.out_features for one in kinds if not one.blocked for x in one.mlp_linears]
        found += [kind.experts.n_packed for kind in facts.kinds if kind.experts is not None]
        if self.replaced:
            found += [2 * mixed_elements(linear) for linear in linears]
        frozen = any(segment.loss == "none" for segment in segments)
        dropless = self.evaluates or any(segment.tail for segment in segments)
        if any(one.blocked or (replace(one, targets=()).blocked and (frozen or dropless)) for one in kinds):
            found.append(3 * min(self.knobs.mlp_block, max(one.layer.inner for one in kinds)) * facts.hidden_size)
        return max(found) * shape.itemsize

    @property
    def vocabulary_buffer_bytes(self) -> int:
        """The bytes of a chunk of the lm_head as stored, and in the compute dtype where that differs; all of it where it is
        resident."""
        facts, c = self.shape.facts, self.shape.itemsize
        rows = min(self.shape.kind.vocabulary_chunk, facts.vocab_size)
        if self.knobs.head == ELSEWHERE:
            return 0
        if row := self._stored_head.packed_row_bytes:
            in_memory = facts.vocab_size if self.knobs.head == "resident" else rows
            return in_memory * row + rows * facts.hidden_size * c
        stored = self._stored_head.itemsize
        if self.knobs.head == "resident":
            differs = c != stored or not self.shape.has_flash  # there half precision is float16, most models are bfloat16
            return facts.vocab_size * facts.hidden_size * stored + rows * facts.hidden_size * c * differs
        cast = c if c != stored or self.shape.kind.host_is_below else 0
        on_device = 0 if self.shape.kind.host_is_below else stored
        return rows * facts.hidden_size * (on_device + cast)

    # groups ----------------------------------------------------------------------------------------------------------

    def _linear_adapter(self, linear: LinearFacts) -> int:
        return (
            (linear.in_features + linear.out_features) * self.shape.rank if linear.short_name in self.shape.targets else 0
        )

    def group_elements(self, group: GroupName) -> int:
        """The number of elements of a parameter group."""
        if group[0] == "layer":
            layer = self.shape.facts.kind_of_layer[group[1]]
            mixtures = 2 * len(self.shape.facts.kinds[layer].linears) if group[1] in self.replaced else 0
            return self._elements_of_kind[layer] + mixtures
        return self._aux_elements

    @cached_property
    def _elements_of_kind(self) -> tuple[int, ...]:
        return tuple(sum(self._linear_adapter(linear) for linear in kind.linears) for kind in self.shape.facts.kinds)

    @cached_property
    def _aux_elements(self) -> int:
        hidden = self.shape.facts.hidden_size
        inner = max(1, hidden // 4)
        return 2 * hidden + 2 * inner * hidden + inner + hidden

    def group_bytes(self, group: GroupName) -> int:
        """The bytes of a parameter group's values, or of its gradients, in fp32."""
        return 4 * self.group_elements(group)

    def states_bytes(self, group: GroupName) -> int:
        """The bytes of a parameter group's optimizer states."""
        n_elements = self.group_elements(group)
        if self.knobs.optimizer == "adamw":
            return 8 * n_elements
        return 2 * (ceil(n_elements / 4) * 4 + 4 * ceil(n_elements / 256))

    def step_within(self, group: GroupName) -> int:
        """The most bytes within a group's STEP. Moments in 8 bits: both unpacked, and packed again one after the other (the
        first one's result lives on)."""
        n_elements = self.group_elements(group)
        packed = n_elements + 4 * ceil(n_elements / 256) + 1024  # codes, scales, a copy of the code map
        return 8 * n_elements + 2 * packed if self.knobs.optimizer == "adamw8bit" else 8

    # what lives from step to step ------------------------------------------------------------------------------------

    def persistent(self, plan: Plan) -> dict[str, int]:
        """The bytes on the device by category before the first op of a steady step."""
        moving = any(op.kind is Kind.STORE and op.item == "gradients" for op in plan.ops)
        return self.steady(plan.own_segments, gradients_move=moving)

    def steady(self, segments: Sequence[Segment], *, gradients_move: bool) -> dict[str, int]:
        """The bytes on the device by category before the first op of a steady step, for any plan over these segments."""
        knobs = self.knobs
        groups = self.groups_of(segments)
        flat = sum(_aligned(self.group_bytes(group)) for group in groups)
        aux = sum(_aligned(self.group_bytes(group)) for group in groups if group[0] == "aux")
        norms = 4 * len(groups)  # of the gradients of each group, in fp32
        found = {
            "weights": sum(self._bytes_at("resident")) + self.ring_bytes + self.small_bytes,
            "adapters": flat - aux + self.averages_bytes(segments),
            "aux heads": aux,
            "workspace": self.unpack_buffer_bytes(segments) + self._scratch_bytes + norms,
            "head": self.vocabulary_buffer_bytes,
        }
        if not gradients_move:
            # one block; where gradients move each group has its own
            found["gradients"] = sum(_aligned(self.group_bytes(group)) for group in self.open_groups(segments))
        if knobs.states == "device":
            found["optimizer"] = sum(self.states_bytes(group) for group in self.open_groups(segments))
        return found

    @property
    def ring_bytes(self) -> int:
        """The bytes of the buffers that streamed layers share."""
        streamed = self._bytes_at("host", "disk")
        return min(self.knobs.ring, len(streamed)) * max(streamed, default=0)

    def averages_bytes(self, segments: Sequence[Segment]) -> int:
        """The bytes of the fp32 averages of the adapters of tails' layers."""
        return sum(self.group_bytes(("layer", layer)) for layer in {layer for s in segments for layer in s.tail})

    def persistent_below(self, segments: Sequence[Segment]) -> dict[str, int]:
        """The bytes by lower tier: paged states, and the values before the update that go with them; host copies of
        weights."""
        knobs = self.knobs
        groups = self.open_groups(segments)
        found = {"host": sum(self._bytes_at("host")), "disk": self.journal_bytes(segments)}
        if knobs.states == "disk":
            found["disk"] += sum(on_disk(self.states_bytes(group)) for group in groups)
        elif knobs.states == "host":
            found["host"] += sum(self.states_bytes(group) for group in groups)
            if "disk" not in knobs.tiers:
                found["host"] += sum(self.group_bytes(group) for group in groups)
        return found

    def journal_bytes(self, segments: Sequence[Segment]) -> int:
        """The bytes of the values before the update on disk, in a file of their own: where states are paged and there are
        page files."""
        if self.knobs.states == "device" or "disk" not in self.knobs.tiers:
            return 0
        return sum(on_disk(self.group_bytes(group)) for group in self.open_groups(segments))

    @property
    def intact_bytes(self) -> int:
        """The bytes of the buffers through which the weights of layers come that will be replaced."""
        return min(2, len(self.replaced)) * max((self.bytes_of_layers[layer] for layer in self.replaced), default=0)

    # micro-batches ---------------------------------------------------------------------------------------------------

    def hidden_bytes(self, batch: MicroBatchSize) -> int:
        """The bytes of a micro-batch's hidden states, in the compute dtype."""
        return batch.n_rows * self.shape.facts.hidden_size * self.shape.itemsize

    def batch_bytes(self, batch: MicroBatchSize) -> int:
        """The bytes of token ids, supervised positions and targets, and of the positions of real tokens where there is
        padding."""
        ids = 0 if self.shape.kind.host_is_below else 8 * batch.n_rows  # they stay in host memory
        return ids + 16 * batch.n_supervised + (8 * batch.n_real_most if batch.padded else 0)

    def layer_context_bytes(self, batch: MicroBatchSize) -> int:
        """The bytes of positions, rotary tables and masks, which live as long as the micro-batch."""
        return self._embed(batch)[1]

    def embed_within(self, batch: MicroBatchSize) -> int:
        """The most bytes within EMBED."""
        return self._embed(batch)[0]

    def _embed(self, batch: MicroBatchSize) -> tuple[int, int]:
        return embed_bytes(
            self.shape, self._stored_embedding, batch.n_sequences, batch.n_tokens, packed=bool(batch.in_a_row)
        )

    def cache_within(self, batch: MicroBatchSize, *, reads: bool) -> int:
        """The most bytes while a boundary is read, or written and read back: one example as the cache holds it and in the
        compute dtype."""
        hidden = self.hidden_bytes(batch)
        cast = self.shape.itemsize if self.shape.itemsize != CACHE_ITEMSIZE else 0
        one = batch.longest * self.shape.facts.hidden_size * (CACHE_ITEMSIZE + cast)
        again = hidden if self.shape.facts.own_inputs else 0  # embeddings, for the context in the making as in EMBED
        return max(hidden + one, self._embed(batch)[0] + again if reads else 0)

    def align_within(self, batch: MicroBatchSize) -> int:
        """The most bytes within ALIGN: the gradient, and of a tile both sides, in fp32 where they are not, and their
        product or its gradient."""
        shape, arange = self.shape, 0 if batch.padded else 8 * batch.n_rows
        n_tile = min(self.knobs.token_tile, batch.n_real_most)
        each = 2 * shape.itemsize + 4 + (0 if shape.itemsize == 4 else 8 + shape.itemsize)
        return self.hidden_bytes(batch) + arange + n_tile * (shape.facts.hidden_size * each + 24)

    def receive_within(self, batch: MicroBatchSize) -> int:
        """The most bytes within RECV: a boundary from the process before, and the frame in the making. EMBED, which makes
        both, takes no less."""
        return self.embed_within(batch)

    def cache_bytes(self, n_tokens: int) -> int:
        """The bytes on disk of a boundary cache over so many tokens."""
        return CACHE_ITEMSIZE * n_tokens * self.shape.facts.hidden_size

    @property
    def _scratch_bytes(self) -> int:
        """The bytes of the buffer in which GGUF blocks are unpacked."""
        forms = self.shape.facts.forms
        return scratch_bytes(on_cpu=self.shape.kind.computes_on_cores) if forms is not None and forms.packed else 0

    @property
    def _stored_embedding(self) -> Vocabularies:
        forms = self.shape.facts.forms
        return self._stored(None if forms is None else forms.embedding, resident=False)

    @property
    def _stored_head(self) -> Vocabularies:
        forms = self.shape.facts.forms
        return self._stored(None if forms is None else forms.head, resident=self.knobs.head == "resident")

    def _stored(self, kind: str | None, *, resident: bool) -> Vocabularies:
        if kind is None:
            return Vocabularies(self.vocabulary_itemsize, resident)
        row_bytes, hidden = BLOCK_TYPES[kind].n_bytes((self.shape.facts.hidden_size,)), self.shape.facts.hidden_size
        plain = BLOCK_TYPES[kind].is_plain
        return Vocabularies(row_bytes // hidden, resident) if plain else Vocabularies(1, resident, row_bytes)

    @property
    def head_bytes(self) -> int:
        """The bytes of the lm_head as it is stored."""
        facts, stored = self.shape.facts, self._stored_head
        return facts.vocab_size * (stored.packed_row_bytes or facts.hidden_size * stored.itemsize)

    def loss_within(self, batch: MicroBatchSize, *, task: bool) -> int:
        """The most bytes within a loss: the gradient of the output, and a tile's loss with its backward."""
        beside = 0 if task or batch.padded else 8 * batch.n_rows  # all positions
        beside += 4 * batch.n_supervised if task and batch.scored else 0  # each one's loss
        return beside + loss_within(
            self.shape,
            self._stored_head,
            batch.n_sequences,
            batch.n_tokens,
            task=task,
            n_selected=batch.n_supervised if task else batch.n_real_most,
            tile=self.knobs.token_tile,
        )

    # layers ----------------------------------------------------------------------------------------------------------

    def forward_within(self, batch: MicroBatchSize, layer: int, segment: Segment) -> int:
        """The most bytes within a layer's forward without a graph."""
        return forward_within(self._run(batch, layer, segment))

    def graph(self, batch: MicroBatchSize, layer: int, segment: Segment) -> GraphBytes:
        """The bytes of a forward that makes a graph, and of what that keeps."""
        return graph_bytes(self._run(batch, layer, segment))

    def backward_within(self, batch: MicroBatchSize, layer: int, segment: Segment, *, kept: Keep, fresh: int) -> int:
        """The most bytes within a layer's backward, in which `fresh` bytes of gradients are made."""
        return backward_within(self._run(batch, layer, segment), kept.value, fresh)

    @cached_property
    def in_pieces(self) -> LayerShape:
        """The shape with the pieces in which its MLP runs."""
        return _in_pieces(self.shape, mlp_pieces(self.knobs, self.shape.device_type))

    @cached_property
    def _runs(self) -> dict[tuple[MicroBatchSize, int, str, bool, bool, bool, bool, bool], LayerRun]:
        """The runs of layers by what they depend on: most layers are alike, and a search asks for each of them."""
        return {}

    def _run(self, batch: MicroBatchSize, layer: int, segment: Segment) -> LayerRun:
        facts = self.shape.facts
        kind, first = facts.layer_types[layer], layer == (segment.reached[0] if segment.has_loss else segment.first)
        frozen, mixed, in_tail = segment.loss == "none", layer in self.replaced, layer in segment.tail
        gives_back = bool(facts.key_sources) and facts.gives_back(layer, segment.reached)
        key = (batch, facts.kind_of_layer[layer], kind, first, frozen, mixed, in_tail, gives_back)
        if key not in self._runs:
            shape = self.in_pieces.of_layer(layer)
            targets, dropout = () if frozen else shape.targets, shape.dropout and not in_tail
            shape = replace(shape, targets=targets, mixed=mixed or shape.mixed, dropout=dropout)
            lengths = tuple(sorted(set(batch.in_a_row)))
            masked = shape.masked(kind, batch.n_tokens) and not lengths
            window = shape.window(kind, batch.longest, in_a_row=bool(lengths))
            n_sequences, n_tokens = batch.n_sequences, batch.n_tokens
            self._runs[key] = LayerRun(shape, n_sequences, n_tokens, masked, first, window, lengths, gives_back)
        return self._runs[key]
