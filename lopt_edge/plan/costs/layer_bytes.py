"""What a decoder layer, the embedding and the losses take, op by op: from the traced programs of tools/trace_bytes.py.

Everything is relative to the op's beginning. A recomputed layer's backward is the forward program that makes the graph
(without the value of its last product), followed by the backward program.

The programs were traced on the CPU. On CUDA other attention kernels save slightly other things; callers add a margin there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from lopt_edge.plan.costs.own_input_bytes import own_inputs
from lopt_edge.plan.costs.programs import Replay, program
from lopt_edge.plan.costs.shape import LayerShape, Vocabularies
from lopt_edge.plan.facts.families.family import FULL, SLIDING
from lopt_edge.plan.facts.layers import KEPT

READS_INPUT = {"q_proj", "k_proj", "v_proj", "qkv_proj", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"}
BESIDE_MLP = ("o_proj", "out_proj", "per_layer_input_gate", "per_layer_projection")


@dataclass(frozen=True)
class LayerRun:
    """One layer run on one micro-batch. `first`: it is the first of its segment, so its input needs no gradient. A layer
    without LoRA has empty `shape.targets`. `in_a_row`: the lengths of sequences that lie in one row, each once.
    `gives_back`: gradients of keys and values that layers share flow in its backward."""

    shape: LayerShape
    n_sequences: int
    n_tokens: int
    masked: bool
    first: bool
    window: int | None = None
    in_a_row: tuple[int, ...] = ()
    gives_back: bool = False

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.shape, self.n_sequences, self.n_tokens, self.first, self.masked, self.in_a_row))

    @property
    def keys_bytes(self) -> int:
        """The bytes of its keys, in the compute dtype; those of its values are as many."""
        layer = self.shape.layer
        return self.n_sequences * self.n_tokens * layer.n_kv_heads * layer.head_dim * self.shape.itemsize

    @property
    def hidden_bytes(self) -> int:
        """The bytes of the hidden states, in the compute dtype."""
        return self.n_sequences * self.n_tokens * self.shape.facts.hidden_size * self.shape.itemsize

    def replay(self, **alive: int) -> Replay:
        """A replay of this layer's programs on an empty heap; `alive` is what lives before, in bytes by name."""
        dimensions = self.shape.dimensions(n_sequences=self.n_sequences, n_tokens=self.n_tokens)
        from_mlp, past_mlp = self.backward_op == "backward from mlp", self.backward_op.startswith("backward from per_layer")
        replay = Replay(self.shape, dimensions, from_mlp=from_mlp, past_mlp=past_mlp)
        replay.window, replay.in_a_row = self.window, self.in_a_row
        replay.alive |= alive
        return replay

    @property
    def case(self) -> str:
        """The key of this layer's programs in the table."""
        return self.shape.case(self.n_sequences, masked=self.masked, gives_back=self.gives_back)

    @property
    def graph_op(self) -> str:
        """The name of the program of a forward that makes a graph."""
        if self._beside_experts:
            return f"graph first from {self._beside_experts}"
        return "graph first" if self.first else "graph"

    @cached_property
    def _beside_experts(self) -> str:
        """The linear layers with LoRA of a first layer where all of them are of an expert that all tokens go to: they do
        not lie in a row, and the router's graph is not there."""
        names = [linear.short_name for linear in self.shape.linears if linear.short_name in self.shape.targets]
        others = READS_INPUT | set(BESIDE_MLP)
        alone = self.first and self.shape.layer.experts is not None and not others & set(names)
        return ",".join(names) if alone and self.shape.facts.family.unlisted is None else ""

    @property
    def backward_op(self) -> str:
        """The name of the backward's program: in a first layer gradients go back as far as its first linear layer with
        LoRA."""
        if not (self.first and self.shape.targets):
            return "backward"
        if self.shape.facts.family.unlisted is not None:
            return "backward first"
        linears = self.shape.linears
        names = [linear.short_name for linear in linears if linear.short_name in self.shape.targets]
        if READS_INPUT & set(names):
            return "backward first"
        if self._beside_experts:
            return f"backward from {self._beside_experts}"
        in_mlp = "mlp" if any(linear.short_name == "gate_proj" for linear in linears) else names[0]
        return f"backward from {names[0] if names[0] in BESIDE_MLP else in_mlp}"


@dataclass(frozen=True)
class GraphBytes:
    """The bytes of a graph: `within` the forward at most, and `rest` that the graph keeps beside its input."""

    within: int
    rest: int
    holds_input: bool


@lru_cache(maxsize=1024)
def forward_within(run: LayerRun) -> int:
    """The most bytes that a forward without a graph takes on top of what lives before it."""
    replay = run.replay()
    replay.run(run.case, "forward")
    return replay.heap.peak


@lru_cache(maxsize=1024)
def graph_bytes(run: LayerRun) -> GraphBytes:
    """The bytes of a forward that makes a graph, and of what that graph keeps."""
    replay = _with_graph(run, value=True)
    _leave_shared(replay)
    peak = replay.heap.peak
    holds_input = "input" in replay.alive
    return GraphBytes(peak, sum(replay.alive.values()) - run.hidden_bytes * holds_input, holds_input)


def _leave_shared(replay: Replay, *, but: frozenset[str] = frozenset()) -> None:
    """Count keys and values that later layers attend to no more, `but` those: the graph does not own them."""
    for name in (f"g{name}" for name in replay.shared):
        if name not in but:
            replay.drop(name)


def _with_graph(run: LayerRun, *, value: bool) -> Replay:
    """The replay after a forward with a graph: what is alive in it is what the graph keeps."""
    replay = run.replay(input=run.hidden_bytes)
    replay.run(run.case, run.graph_op, graph=True, value=value)
    replay.drop(replay.result)
    replay.end_forward()
    return replay


@lru_cache(maxsize=1024)
def backward_within(run: LayerRun, kept: str, fresh: int) -> int:
    """The most bytes that a backward takes. `kept` is input, graph or pages; `fresh` bytes of gradients are made once the
    graph is there."""
    replay = _with_graph(run, value=kept != "input")
    if kept == "input":  # nobody keeps those of a layer that is run again but what saved them
        tokens = program(run.case, run.backward_op, run.shape.table)
        _leave_shared(replay, but=frozenset(token.name for token in tokens if token.kind == "-"))
    else:
        _leave_shared(replay)
        replay.heap.live = replay.heap.peak = 0
    replay.heap.take(fresh)
    replay.alive["grad"] = run.hidden_bytes
    if run.gives_back and run.shape.layer.keys == KEPT:
        replay.alive |= {"keys": run.keys_bytes, "values": run.keys_bytes}
    replay.run(run.case, run.backward_op, paged=kept == "pages")
    return replay.heap.peak


@lru_cache(maxsize=256)
def embed_bytes(
    shape: LayerShape, stored: Vocabularies, n_sequences: int, n_tokens: int, *, packed: bool = False
) -> tuple[int, int]:
    """The bytes of EMBED: (the most within it, what stays beside the hidden states: positions, rotary tables, masks).

    `packed`: of sequences in a row, which have no masks.
    """
    shape, kinds = shape.with_attention, shape.facts.attention_types
    masked = not packed and any(shape.masked(kind, n_tokens) for kind in kinds)
    dimensions = shape.dimensions(n_sequences=n_sequences, n_tokens=n_tokens)
    if len(kinds) > 1:  # a table of positions for each, as wide as a head
        dimensions |= {"e": shape.facts.head_dim_of(SLIDING), "f": shape.facts.head_dim_of(FULL)}
    replay = Replay(shape, dimensions, stored=replace(stored, head_resident=False))
    replay.run(shape.case(n_sequences, masked=masked, two_kinds=len(kinds) > 1), "embed")
    if shape.facts.own_inputs is not None:
        own_inputs(replay, stored, n_sequences * n_tokens)
    replay.drop(replay.result)
    return replay.heap.peak, replay.heap.live


@lru_cache(maxsize=256)
def loss_within(
    shape: LayerShape, stored: Vocabularies, n_sequences: int, n_tokens: int, *, task: bool, n_selected: int, tile: int
) -> int:
    """The most bytes that a loss takes, the gradient of the output included; `n_selected` tokens have a loss, `tile` at a
    time."""
    n_tile = min(tile, n_selected)
    dimensions = shape.dimensions(n_sequences=n_sequences, n_tokens=n_tokens, n_tile=n_tile)
    replay = Replay(shape, dimensions, stored=stored)
    case = shape.case(n_sequences, masked=False)
    replay.run(case, "task loss" if task else "reconstruct loss")
    return replay.heap.peak
