"""What the decoder layers of a model have, kind by kind, as far as bytes and seconds depend on it.

Layers of one model may differ: attention with a window or without one, or none at all, in whose place a recurrence over
the tokens stands. Layers that have the same matrices, heads and small parameters are of one *kind*. The rule: every number
comes from the config through the family's record; nothing here compares a `model_type`. No torch, no transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lopt_edge.errors import InputError
from lopt_edge.plan.facts.families.family import ALWAYS, LINEAR, Experts, Family
from quant.sizes import packed_sizes


@dataclass(frozen=True)
class LinearFacts:
    """One linear layer of a decoder layer; `name` is its path inside the layer, e.g. self_attn.q_proj."""

    name: str
    in_features: int
    out_features: int
    bias: bool

    @property
    def short_name(self) -> str:
        """The last word of its path, e.g. q_proj: what `lora_targets` name."""
        return self.name.rsplit(".", 1)[-1]


@dataclass(frozen=True)
class DeltaFacts:
    """The sizes of a gated delta rule (arXiv 2412.06464), which stands in the place of attention.

    Its state has a matrix of `key_dim` x `value_dim` for each value head. `kernel`: tokens that its convolution sees.
    """

    n_key_heads: int
    n_value_heads: int
    key_dim: int
    value_dim: int
    kernel: int

    @property
    def conv_features(self) -> int:
        """The features of queries, keys and values together, which pass through the convolution."""
        return 2 * self.n_key_heads * self.key_dim + self.value_features

    @property
    def value_features(self) -> int:
        """The features of all value heads."""
        return self.n_value_heads * self.value_dim

    @property
    def small_elements(self) -> int:
        """The numbers of its convolution, its decay (two a head) and its norm."""
        return self.conv_features * self.kernel + 2 * self.n_value_heads + self.value_dim


@dataclass(frozen=True)
class MambaFacts:
    """The sizes of a selective state space (arXiv 2405.21060) in a layer: its state has `head_dim` x `n_state` numbers for
    each head. `module` is transformers' module of the layer that has it."""

    n_heads: int
    head_dim: int
    n_state: int
    module: str


@dataclass(frozen=True)
class ExpertFacts:
    """The experts of a layer, in the place of an MLP: `count` gated MLPs of `inner` features; a token goes to `active`.

    `module` is transformers' module of the layer that has them, `renames` what its names begin with there and in
    checkpoints, `stored` the names of the matrices, {} for the number. `full_weights`: those of a token's experts are fp32.
    `biases`: the names in the experts' module of what is added to the products, in the order of the matrices.
    """

    count: int
    active: int
    hidden: int
    inner: int
    module: str
    renames: tuple[tuple[str, str], ...]
    stored: tuple[str, ...]
    full_weights: bool
    biases: tuple[str, ...] = ()

    def stored_name(self, name: str) -> str:
        """The name in a checkpoint of a tensor of the layer."""
        return next((to + name.removeprefix(own) for own, to in self.renames if name.startswith(own)), name)

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """The shapes (out, in) of an expert's matrices; the last one writes the hidden states."""
        n_reading = len(self.stored) - 1
        return (*[(2 * self.inner // n_reading, self.hidden)] * n_reading, (self.hidden, self.inner))

    @property
    def n_packed(self) -> int:
        """The parameters of one expert."""
        return sum(rows * columns for rows, columns in self.shapes)

    def matrices(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yield the name in the layer and the shape of each matrix, expert by expert."""
        for expert in range(self.count):
            yield from zip((name.format(expert) for name in self.stored), self.shapes, strict=True)


@dataclass(frozen=True)
class OwnInputs:
    """What each layer is told of a token anew, beside its hidden states: `width` features, of each of `n_tokens` ids."""

    width: int
    n_tokens: int


# Whose keys and values a layer attends to: its own, its own which later layers read as well, or an earlier layer's.
OWN, KEPT, SHARED = "own", "kept", "shared"


@dataclass(frozen=True)
class LayerFacts:
    """What the decoder layers of one kind have. `delta`: in the place of attention, whose heads then mean nothing;
    `experts`: in the place of an MLP; `mamba`: beside attention or in its place. `inner`: features inside the MLP. `keys`:
    OWN, KEPT or SHARED. `own_input`: whether the layer is told of each token anew.

    `small_elements` counts the numbers of norms, biases and whatever else of a layer is not packed.
    """

    linears: tuple[LinearFacts, ...]
    n_heads: int
    n_kv_heads: int
    head_dim: int
    small_elements: int
    inner: int
    delta: DeltaFacts | None = None
    experts: ExpertFacts | None = None
    keys: str = OWN
    own_input: bool = False
    mamba: MambaFacts | None = None

    def stored_name(self, name: str) -> str:
        """The name in a checkpoint of a tensor of the layer."""
        return name if self.experts is None else self.experts.stored_name(name)

    def reads_past(self, linear: LinearFacts) -> bool:
        """Whether transformers may read a linear layer's matrix past its module, where an adapter would not be seen: a
        fused kernel does with a state space's output projection, so that peft refuses it."""
        return self.mamba is not None and linear.name == f"{self.mamba.module}.out_proj"

    @property
    def last_module(self) -> str:
        """The path of the module whose output is the last that the layer adds to its hidden states."""
        return self.linears[-1].name if self.experts is None else f"{self.experts.module}.experts"

    @property
    def values_are_keys(self) -> bool:
        """Whether its attention has no projection of its own for values."""
        made = {"v_proj", "qkv_proj"} & {linear.short_name for linear in self.linears}
        return self.delta is None and self.keys != SHARED and not made

    @property
    def n_packed(self) -> int:
        """The number of parameters that are stored in 4 bits."""
        experts = 0 if self.experts is None else self.experts.count * self.experts.n_packed
        return sum(linear.in_features * linear.out_features for linear in self.linears) + experts

    @property
    def n_idle(self) -> int:
        """The number of those that a token does not meet: of the experts to which it does not go."""
        return 0 if self.experts is None else (self.experts.count - self.experts.active) * self.experts.n_packed

    @property
    def matrix_shapes(self) -> Iterator[tuple[int, int]]:
        """The shapes (out, in) of all its matrices, in the order in which they lie in its buffer."""
        yield from ((linear.out_features, linear.in_features) for linear in self.linears)
        if self.experts is not None:
            yield from (shape for _, shape in self.experts.matrices())

    @property
    def packed_bytes(self) -> int:
        """The bytes of its matrices in 4 bits."""
        return sum(packed_sizes(shape).total_bytes for shape in self.matrix_shapes)


MOST_EXPERTS, MOST_FEATURES = 4096, 2**16  # of a layer, and inside an expert: more is no model
HEAD_KEYS = ("num_attention_heads", "num_key_value_heads", "head_dim")
DELTA_KEYS = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim",
              "linear_conv_kernel_dim")  # fmt: skip


def layer_kind(
    known: Mapping[str, Any], family: Family, layer: int, layer_type: str, *, keys: str = OWN, where: str
) -> LayerFacts:
    """What a layer has, of a config in which heads are said. Raises InputError for numbers that do not go together."""
    own = _checked(family.overrides(known, layer, layer_type), where)
    delta = _delta(known, where) if layer_type == LINEAR else None
    experts = _experts(known, family.experts, layer, where)
    n_heads, n_kv_heads, head_dim = ({**known, **own}[key] for key in HEAD_KEYS)
    if n_heads % n_kv_heads:
        raise InputError("num_attention_heads is not a multiple of num_key_value_heads", where=where)
    own_input = (known.get(family.own_inputs) or 0) if family.own_inputs else 0
    inner = known[family.inner] * (2 if keys == SHARED and known.get(family.wider) else 1)
    sizes = {
        "hidden": known["hidden_size"],
        "inner": inner,
        "own input": own_input,
        "one": 1,
        "q": n_heads * head_dim,
        "kv": n_kv_heads * head_dim,
    }
    if delta is not None:
        sizes |= {"conv": delta.conv_features, "value": delta.value_features, "value heads": delta.n_value_heads}

    def size(words: str) -> int:
        return sum(sizes[word] for word in words.split("+"))

    linears = tuple(
        LinearFacts(name, size(reads), size(writes), bias=bias == ALWAYS or (bias != "" and bool(known.get(bias))))
        for name, reads, writes, bias, unless, only in family.projections_of(layer_type)
        if not (unless and known.get(unless)) and not (experts and family.experts and family.experts.replaces(name))
        if (not only or known.get(only)) and not (keys == SHARED and writes == "kv")
    )
    small = (
        family.scalars + family.norms * known["hidden_size"] + sum(linear.out_features for linear in linears if linear.bias)
    )
    small += known["hidden_size"] * bool(own_input)  # the norm behind what it is told
    if experts is not None:
        small += experts.count * (experts.hidden + bool(family.experts and family.experts.router_bias))  # the router
        small += experts.count * sum(rows for rows, _ in experts.shapes if experts.biases)
    if delta is not None:
        small += delta.small_elements
    elif family.qk_norm == "head":
        small += (1 if keys == SHARED else 2) * head_dim
    elif family.qk_norm == "projection":
        small += sizes["q"] + sizes["kv"]
    small += n_heads * family.sinks
    found = LayerFacts(linears, n_heads, n_kv_heads, head_dim, small, inner, delta, experts, keys, bool(own_input))
    if found.values_are_keys and own_input:
        raise InputError(f"{family.own_inputs} beside values that are keys is not supported", where=where)
    return found


def key_sources(known: Mapping[str, Any], family: Family, layer_types: tuple[str, ...], where: str) -> dict[int, int]:
    """The layers that attend to keys and values of another, and which, as transformers chooses it. Raises InputError."""
    n_shared = (known.get(family.shared_keys) or 0) if family.shared_keys else 0
    if type(n_shared) is not int or not 0 <= n_shared < len(layer_types):
        what = f"must be an integer from 0 to {len(layer_types) - 1}, not {str(n_shared)[:40]!r}"
        raise InputError(f"{family.shared_keys} {what}", where=where)
    first = len(layer_types) - n_shared
    last_of = {layer_type: layer for layer, layer_type in enumerate(layer_types[:first])}
    if n_shared and last_of.keys() != set(layer_types):
        raise InputError(f"{family.shared_keys} {n_shared} leaves a type of layer without keys of its own", where=where)
    if n_shared and not known.get(family.own_inputs):
        raise InputError(f"{family.shared_keys} without {family.own_inputs} is not supported", where=where)
    return {layer: last_of[layer_types[layer]] for layer in range(first, len(layer_types))}


def _checked(own: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    for key, value in own.items():
        if key not in HEAD_KEYS[1:]:
            raise InputError(f"per_layer_config sets {str(key)[:40]!r}, which is not supported", where=where)
        if type(value) is not int or not 1 <= value < 2**16:
            raise InputError(f"{key} of a layer must be a positive integer, not {str(value)[:40]!r}", where=where)
    return own


def _delta(known: Mapping[str, Any], where: str) -> DeltaFacts:
    found = DeltaFacts(*(known[key] for key in DELTA_KEYS))
    if found.n_value_heads % found.n_key_heads:
        raise InputError("linear_num_value_heads is not a multiple of linear_num_key_heads", where=where)
    return found


def _experts(known: Mapping[str, Any], family: Experts | None, layer: int, where: str) -> ExpertFacts | None:
    if family is None or not family.lies_in(known, layer):
        return None
    count, active = (_first(known, keys, where, most=MOST_EXPERTS) for keys in (family.count, family.active))
    inner = _first(known, family.inner, where, most=MOST_FEATURES)
    if active > count:
        raise InputError(f"{family.active[0]} {active} is more than the {count} experts", where=where)
    names = family.module, family.renames, family.stored
    return ExpertFacts(count, active, known["hidden_size"], inner, *names, family.full_weights, family.biases)


def _first(known: Mapping[str, Any], keys: tuple[str, ...], where: str, *, most: int) -> int:
    """The number under the first of these keys that is there. Raises InputError."""
    value = next((known[key] for key in keys if known.get(key) is not None), None)
    if type(value) is not int or not 1 <= value <= most:
        raise InputError(f"{keys[0]} must be an integer from 1 to {most}, not {str(value)[:40]!r}", where=where)
    return value
