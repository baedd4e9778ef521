"""How long a step takes: a clock that walks the plan's ops with a device profile's rates.

Arithmetic passes one op after the other. A movement begins where the plan begins it, on a channel of its direction (up,
or down), and its WAIT costs only what is not over by then: so prefetching, the ring, and what hides behind what follow
from the plan, as in the executor. An op's arithmetic is its matrix products, attention, the unpacking of 4-bit weights,
passes over hidden states, and a fixed overhead.

The rule: it knows rates and counts, no clock of a machine; tools/validate_planner.py measures how close it comes. What it
does not know: a disk that slows down under load, a GPU shared with a desktop, cores that a copy takes from the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil

from lopt_edge.plan.costs.shape import LayerShape
from lopt_edge.plan.costs.sizes import MicroBatchSize, Sizes
from lopt_edge.plan.facts.layers import ExpertFacts
from lopt_edge.plan.facts.profile import DeviceProfile
from lopt_edge.plan.schedule.effects import REDUCED, Effect, Kind
from lopt_edge.plan.schedule.ops import Keep, Op, Plan
from lopt_edge.plan.schedule.segments import Segment
from quant.sizes import DELTA_CHUNK

FORWARD_PASSES, BACKWARD_PASSES = 24, 70  # reads and writes of a (tokens, hidden) tensor outside the products
# A product of few rows does not reach the rate: it takes as long as one of so many rows more. Fitted on a CPU, 0.5B shape,
# 64 to 2,048 tokens: predicted / measured seconds were 0.52 to 0.98 without it.
FEW_ROWS = 64
CHUNK_BACKWARD = 5  # of a delta rule's chunk, whose forward has about as many operations as a layer: traced, 400 to 75
ATTENTION_BACKWARD = 2.5  # of a forward: the scores again, and four products instead of two
# Of a layer's overhead, for each expert that tokens go to: measured on one core with experts of 64 x 64, 0.5 ms in a
# forward and 0.8 in a backward.
EXPERT_OVERHEAD = 0.35
UPDATES = (Kind.STEP, Kind.REDUCE, Kind.AGREE)  # what comes once a step, however many micro-batches it has
LINK_BYTES_PER_SECOND = 1e9  # between two processes of one machine; measured on loopback: 1 to 2 GB/s
UPDATE_BYTES = {"adamw": 28, "adamw8bit": 60}  # a parameter's reads and writes; 8 bits: unpacked and packed again


@dataclass(frozen=True)
class LayerSeconds:
    """The seconds of one layer's arithmetic for one micro-batch; `again` is what a recomputation adds to the backward."""

    forward: float
    backward: float
    again: float


def layer_seconds(shape: LayerShape, rates: _Rates, batch: MicroBatchSize) -> LayerSeconds:
    """The seconds of one layer's arithmetic. A blocked MLP multiplies five times in its backward (two products again, three
    for gradients), other weights once.

    A mixture of two weights unpacks both, and multiplies twice in the backward.
    """
    facts, rows = shape.facts, batch.n_rows
    outside = sum(x.in_features * x.out_features for x in shape.linears if not x.name.startswith("mlp."))
    in_mlp = sum(x.in_features * x.out_features for x in shape.linears if x.name.startswith("mlp."))
    adapters = sum((x.in_features + x.out_features) * shape.rank for x in shape.linears if x.short_name in shape.targets)
    product = 2 * (rows + FEW_ROWS) / rates.product_flops
    attention = _mixing_flops(shape, batch) / rates.attention_flops
    hidden = rows * facts.hidden_size * shape.itemsize / rates.bandwidth
    unpack, overhead, mixed = 1 / rates.unpack_rate, rates.overhead, 2 if shape.mixed else 1
    again_mlp = 0.0 if shape.blocked else 2 / 3
    unpack = mixed * (unpack + shape.itemsize / rates.bandwidth)  # a product reads what was unpacked
    forward = product * (outside + in_mlp + adapters) + attention + unpack * (outside + in_mlp)
    backward = product * (mixed * outside + in_mlp * (5 / 3 if shape.blocked else mixed) + 4 * adapters)
    backward += ATTENTION_BACKWARD * attention + unpack * (outside + in_mlp)
    again = product * (outside + again_mlp * in_mlp + adapters / 2) + attention + unpack * (outside + again_mlp * in_mlp)
    if (experts := shape.layer.experts) is not None:
        of_experts = _expert_seconds(experts, rates, rows, unpack)
        forward, backward = forward + of_experts.forward, backward + of_experts.backward
    chunks = 0.0
    if shape.layer.delta is not None or shape.layer.mamba is not None:
        one_by_one = batch.in_a_row or (batch.n_tokens,)
        chunks = overhead * sum(ceil(n_tokens / DELTA_CHUNK) for n_tokens in one_by_one)
    blocks = _block_seconds(shape, rates, rows)
    forward, backward = forward + blocks, backward + 2 * blocks
    return LayerSeconds(
        forward + FORWARD_PASSES * hidden + overhead + chunks,
        backward + BACKWARD_PASSES * hidden + overhead + CHUNK_BACKWARD * chunks,
        again + FORWARD_PASSES / 2 * hidden + chunks,
    )


def _block_seconds(shape: LayerShape, rates: _Rates, n_rows: int) -> float:
    """The seconds that an MLP's blocks beyond the first add to a forward: launches, and a pass over the fp32 sum."""
    each, facts, pieces = shape.kind.block_seconds, shape.facts, shape.pieces
    if not each or not shape.blocked:
        return 0.0
    n_more = ceil(shape.layer.inner / pieces.features) - 1
    return n_more * (each * ceil(n_rows / pieces.tokens) + 8 * n_rows * facts.hidden_size / rates.bandwidth)


def _expert_seconds(experts: ExpertFacts, rates: _Rates, n_rows: int, unpack: float) -> LayerSeconds:
    """The seconds of the experts of a layer, where tokens choose among them evenly: each that is chosen is unpacked, once a
    pass, and multiplied with its tokens. A backward multiplies twice again where the forward did once, and nothing is
    recomputed before it."""
    n_chosen = experts.count * (1 - (1 - experts.active / experts.count) ** n_rows)
    products = 2 * (n_rows * experts.active + FEW_ROWS * n_chosen) / rates.product_flops
    once = experts.n_packed * (unpack * n_chosen + products)
    of_calls = EXPERT_OVERHEAD * rates.overhead * n_chosen
    return LayerSeconds(once + of_calls, once + experts.n_packed * products * 2 / 3 + 2 * of_calls, 0.0)


def _mixing_flops(shape: LayerShape, batch: MicroBatchSize) -> float:
    """The operations of causal attention, once, or of the delta rule in its place: of each chunk's products and solves."""
    layer = shape.layer
    if (delta := layer.delta) is not None:
        k, v = delta.key_dim, delta.value_dim
        of_token = DELTA_CHUNK * (5 * k + 3 * v) + 6 * k * v
        return batch.n_rows * delta.n_value_heads * of_token
    found = 2.0 * sum(n_tokens**2 for n_tokens in batch.attended) * layer.n_heads * layer.head_dim
    if (mamba := layer.mamba) is not None:  # in a chunk scores and values of each pair of tokens, and the state in and out
        of_token = 2 * DELTA_CHUNK * (mamba.n_state + mamba.head_dim) + 4 * mamba.n_state * mamba.head_dim
        of_mamba = float(batch.n_rows * mamba.n_heads * of_token)
        has_attention = any("attn" in linear.name or "attention" in linear.name for linear in layer.linears)
        return of_mamba + found * has_attention
    return found


@dataclass(frozen=True)
class _Rates:
    """The rates of a profile for one compute dtype: hashable, so that a layer is computed once."""

    product_flops: float
    attention_flops: float
    bandwidth: float
    unpack_rate: float
    overhead: float


_layer_seconds = lru_cache(maxsize=256)(layer_seconds)


@dataclass(frozen=True)
class StepSeconds:
    """The time of one optimizer step: `compute_seconds` of arithmetic, the rest waiting for bytes; and how many bytes move
    each way."""

    seconds: float
    compute_seconds: float
    bytes_up: int
    bytes_down: int

    @property
    def bytes_moved(self) -> int:
        """The bytes that move in both directions."""
        return self.bytes_up + self.bytes_down


def step_seconds(
    plan: Plan,
    sizes: Sizes,
    batches: Sequence[MicroBatchSize],
    profile: DeviceProfile,
    arrivals: dict[int, float] | None = None,
) -> StepSeconds:
    """The time of one step, by a walk over its plan; `batches` has one entry a micro-batch.

    `arrivals` holds when each boundary comes from the process before; after the walk, when each one reaches the process
    after.
    """
    clock = _Clock(sizes, batches, profile)
    clock.arrivals.update(arrivals or {})
    found = clock.walk(plan, plan.ops)
    if arrivals is not None:
        arrivals.clear()
        arrivals.update(clock.sent)
    return found


def seconds_with_passes(
    plan: Plan,
    sizes: Sizes,
    batches: Sequence[MicroBatchSize],
    profile: DeviceProfile,
    *,
    others: Sequence[MicroBatchSize],
) -> tuple[StepSeconds, StepSeconds]:
    """The time of one step, and that of its passes alone, without updates and what moves for them, over other
    micro-batches."""
    updates = [op.kind in UPDATES or op.item in ("states", REDUCED) for op in plan.ops]
    first = updates.index(True) if True in updates else len(updates)
    clock = _Clock(sizes, batches, profile)
    if tuple(others) == tuple(batches) and all(updates[first:]):  # one walk then knows both
        passes = clock.walk(plan, plan.ops[:first])
        return clock.walk(plan, plan.ops[first:]), passes
    alone = tuple(op for op, is_update in zip(plan.ops, updates, strict=True) if not is_update)
    return clock.walk(plan, plan.ops), _Clock(sizes, others, profile).walk(plan, alone)


class Costs:
    """The seconds of an op's arithmetic and the bytes of a movement, for one run on one device."""

    def __init__(self, sizes: Sizes, batches: Sequence[MicroBatchSize], profile: DeviceProfile) -> None:
        self.sizes, self.batches, self.profile = sizes, batches, profile
        self._layers: dict[tuple[int, MicroBatchSize, bool, bool], LayerSeconds] = {}
        self._groups = dict[tuple[str, str, int], int]()
        itemsize, forms = sizes.shape.itemsize, sizes.shape.facts.forms
        attention = profile.attention_by_dtype.get("float32", profile.attention_flops) if itemsize == 4 else None
        self.rates = _Rates(
            profile.flops(itemsize),
            attention or profile.attention_flops,
            profile.memory_bandwidth,
            profile.unpack_rate / (1.0 if forms is None else sizes.shape.facts.unpack_times),
            profile.op_overhead_seconds,
        )

    def layer(self, index: int, batch: MicroBatchSize, *, trains: bool = True, mixed: bool = False) -> LayerSeconds:
        """The seconds of layer `index`; `trains`: with LoRA gradients, `mixed`: its weights are a mixture of two."""
        kind = self.sizes.shape.facts.kind_of_layer[index]
        key = (kind, batch, trains, mixed)
        if key not in self._layers:  # shapes are slow to compare, and a plan asks for each of its ops
            shape = replace(self.sizes.in_pieces.of_kind(kind), mixed=mixed)
            if not trains:
                shape = replace(shape, targets=(), dropout=False, mixed=False)
            self._layers[key] = _layer_seconds(shape, self.rates, batch)
        return self._layers[key]

    def embed(self, batch: MicroBatchSize) -> float:
        """The seconds of an EMBED."""
        n_bytes = batch.n_rows * self.sizes.head_bytes / self.sizes.shape.facts.vocab_size
        return n_bytes / self.profile.file_read + self.rates.overhead

    def loss(self, batch: MicroBatchSize, *, task: bool) -> float:
        """The seconds of a loss, tile by tile: the vocabulary's rows are read once for each (where they are not resident)
        and multiplied twice."""
        sizes, facts, rates = self.sizes, self.sizes.shape.facts, self.rates
        if not task:
            return 6 * batch.n_rows * sizes.group_elements(("aux", 0)) / self.profile.flops(4) + rates.overhead
        elements = facts.vocab_size * facts.hidden_size
        n_tiles = -(-batch.n_supervised // sizes.knobs.token_tile)
        found = 4 * (batch.n_supervised + n_tiles * FEW_ROWS) * elements / rates.product_flops
        found += 6 * batch.n_supervised * facts.vocab_size * 4 / rates.bandwidth
        if sizes.knobs.head != "resident":
            found += n_tiles * sizes.head_bytes / self.profile.file_read
            found += n_tiles * elements * 2 * sizes.shape.itemsize / rates.bandwidth
        return found + rates.overhead

    def align(self, batch: MicroBatchSize) -> float:
        """The seconds of an ALIGN."""
        n_bytes = 4 * batch.n_rows * self.sizes.shape.facts.hidden_size
        return 8 * n_bytes / self.rates.bandwidth + self.rates.overhead

    def cache(self, batch: MicroBatchSize, *, reads: bool) -> float:
        """The seconds of a boundary that is read from the cache or written to it."""
        n_bytes = self.sizes.cache_bytes(batch.n_rows)
        return n_bytes / (self.profile.disk_read if reads else self.profile.disk_write) + self.rates.overhead

    def update(self, group: tuple[str, int]) -> float:
        """The seconds of a parameter group's STEP."""
        n_bytes = self.sizes.group_elements(group) * UPDATE_BYTES[self.sizes.knobs.optimizer]
        return n_bytes / self.rates.bandwidth + self.rates.overhead / 4

    def average(self, layer: int) -> float:
        """The seconds of an AVERAGE: two reads and a write of each number."""
        return 12 * self.sizes.group_elements(("layer", layer)) / self.rates.bandwidth + self.rates.overhead / 4

    def page_bytes(self, batch: MicroBatchSize, layer: int, segment: Segment) -> int:
        """The bytes of a layer's saved tensors that are paged."""
        graph = self.sizes.graph(batch, layer, segment)
        return graph.rest + (self.sizes.hidden_bytes(batch) if graph.holds_input else 0)

    def moved_bytes(self, op: Op, plan: Plan) -> int:
        """The bytes of a movement, by what its row says that it moves."""
        moves = op.effect.moves
        if moves == "weights":
            return self.sizes.bytes_of_layers[op.target]
        if moves == "group":
            key = (op.item, op.unit, op.target)
            if key not in self._groups:
                states = op.item == "states"
                self._groups[key] = self.sizes.states_bytes(op.group) if states else self.sizes.group_bytes(op.group)
            return self._groups[key]
        batch = self.batches[op.micro_batch]
        return self.sizes.hidden_bytes(batch) if moves == "input" else self.page_bytes(batch, op.target, plan.scope(op))


class _Clock:
    """The clock of a walk: `now` of the arithmetic, when each channel is free, and when each movement under way ends."""

    def __init__(self, sizes: Sizes, batches: Sequence[MicroBatchSize], profile: DeviceProfile) -> None:
        self.costs = Costs(sizes, batches, profile)
        self.now = self.computed = 0.0
        self.free = {"up": 0.0, "down": 0.0, "link": 0.0}
        self.moved = {"up": 0, "down": 0}
        self.ends: dict[tuple[str, str, int, int], float] = {}
        self.kept: dict[tuple[int, int], Keep] = {}
        self.arrivals: dict[int, float] = {}
        self.sent: dict[int, float] = {}
        self._rates: dict[tuple[str, str], float] = {}
        costs, batch_of = self.costs, batches
        self.formulas: dict[str, Callable[[Op, Plan], float]] = {  # by the name that a row gives
            "embed": lambda op, _: costs.embed(batch_of[op.micro_batch]),
            "cache read": lambda op, _: costs.cache(batch_of[op.micro_batch], reads=True),
            "cache write": lambda op, _: costs.cache(batch_of[op.micro_batch], reads=False),
            "align": lambda op, _: costs.align(batch_of[op.micro_batch]),
            "update": lambda op, _: costs.update(op.group),
            "average": lambda op, _: costs.average(op.target),
            "loss": self.loss,
            "forward": self.forward,
            "backward": self.backward,
        }

    def walk(self, plan: Plan, ops: Sequence[Op]) -> StepSeconds:
        """The time since the clock began, after these ops of the plan."""
        for op in ops:
            row = op.effect
            if row.role == "wait":
                self.now = max(self.now, self.ends.pop((op.item, op.unit, op.micro_batch, op.target), 0.0))
            elif row.role in ("up", "down"):
                self.move(op, plan, row)
            elif row.role == "exchange":
                self.exchange(op, plan)
            elif row.seconds == "arrive":
                self.now = max(self.now, self.arrivals.get(op.micro_batch, 0.0))
            elif row.seconds == "send":
                n_bytes = self.costs.sizes.hidden_bytes(self.costs.batches[op.micro_batch])
                self.sent[op.micro_batch] = self.now + n_bytes / LINK_BYTES_PER_SECOND
            elif row.seconds:
                seconds = self.formulas[row.seconds](op, plan)
                self.now, self.computed = self.now + seconds, self.computed + seconds
        end = max(self.now, *self.free.values())
        return StepSeconds(end, self.computed, self.moved["up"], self.moved["down"])

    def move(self, op: Op, plan: Plan, row: Effect) -> None:
        n_bytes = self.costs.moved_bytes(op, plan)
        way, moves = row.role, row.moves
        begin = max(self.now, self.free[way])
        self.free[way] = begin + n_bytes / self.rate(op, way, moves)
        self.moved[way] += n_bytes
        item = moves if moves in ("input", "pages") else op.item
        self.ends[item, op.unit, op.micro_batch, op.target] = self.free[way]

    def exchange(self, op: Op, plan: Plan) -> None:
        """Begin a sum over ranks: each rank sends all chunks but its own, then its own sum to all others."""
        n_bytes = 2 * (plan.ranks - 1) / plan.ranks * self.costs.sizes.group_bytes(op.group)
        self.free["link"] = max(self.now, self.free["link"]) + n_bytes / LINK_BYTES_PER_SECOND
        self.ends[REDUCED, op.unit, -1, op.target] = self.free["link"]

    def rate(self, op: Op, way: str, moves: str) -> float:
        """The bytes/s from or to the tier below."""
        knobs = self.costs.sizes.knobs
        if moves == "weights":
            tier = knobs.weights[op.target]
        elif moves == "pages":
            tier = knobs.pages
        elif moves == "input":
            tier = knobs.saved_inputs
        else:
            tier = knobs.states if op.item == "states" else knobs.gradients
        if (tier, way) not in self._rates:
            profile = self.costs.profile
            self._rates[tier, way] = profile.up(tier) if way == "up" else profile.down(tier)
        return self._rates[tier, way]

    def loss(self, op: Op, plan: Plan) -> float:
        segment, batch = plan.segments[op.target], self.costs.batches[op.micro_batch]
        return self.costs.align(batch) if segment.loss == "align" else self.costs.loss(batch, task=segment.reads_out)

    def forward(self, op: Op, plan: Plan) -> float:
        self.kept[op.micro_batch, op.target] = op.keep
        return self.layer(op, plan).forward

    def backward(self, op: Op, plan: Plan) -> float:
        layer = self.layer(op, plan)
        recomputed = self.kept[op.micro_batch, op.target] is Keep.INPUT
        return layer.backward + (layer.again if recomputed else 0.0)

    def layer(self, op: Op, plan: Plan) -> LayerSeconds:
        segment, batch = plan.segment_of(op.target), self.costs.batches[op.micro_batch]
        return self.costs.layer(op.target, batch, trains=segment.loss != "none", mixed=op.target in segment.replaced)
