"""The shapes that decide what an op takes: of a layer, of its vocabularies, of a micro-batch.

The rule: whatever a byte form or a program may depend on is a field here, so two layers with equal fields take equal
bytes. It knows no op and no method.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

from lopt_edge.plan.costs.tiles import EFFICIENT, FLASH, FLASH_WIDEST
from lopt_edge.plan.facts.device_kinds import TORCH, TRITON, DeviceKind, kind_of
from lopt_edge.plan.facts.layers import OWN, LayerFacts, LinearFacts
from lopt_edge.plan.facts.model import ModelFacts
from quant.sizes import DELTA_CHUNK, PIECES, MlpPieces


@dataclass(frozen=True)
class LayerShape:
    """The shape of a layer, of which the programs are functions. `itemsize` is the compute dtype's, `targets` are the
    linear layers with LoRA.

    `mixed`: its weights are mixtures of others' (quant/mixed.py). `pieces`: those of its MLP. `layer_kind` says which of
    the model's kinds of layers, `has_flash` whether flash attention runs on the device in half precision, `deterministic`
    whether a run does without kernels that sum in whatever order their blocks end, `kernels` whose norms, gates and softmax
    of the vocabulary run: torch's, or our own in Triton (run/kernels).
    """

    facts: ModelFacts
    itemsize: int
    rank: int
    targets: tuple[str, ...]
    device_type: str = "cpu"
    dropout: bool = False
    mixed: bool = False
    layer_kind: int = 0
    has_flash: bool = True
    deterministic: bool = False
    pieces: MlpPieces = PIECES
    kernels: str = TORCH

    @property
    def layer(self) -> LayerFacts:
        """What layers of this kind have."""
        return self.facts.kinds[self.layer_kind]

    @property
    def table(self) -> str:
        """The file of its programs, where those are not in the table of all families."""
        own = self.facts.family.unlisted
        return "" if own is None else table_file(own.table, self.itemsize, self.targets)

    @property
    def linears(self) -> tuple[LinearFacts, ...]:
        """The linear layers, in the order in which they run."""
        return self.layer.linears

    @property
    def mlp_linears(self) -> list[LinearFacts]:
        """The linear layers of its MLP, where it has one and no experts."""
        return [linear for linear in self.linears if linear.name.startswith("mlp.")]

    def of_layer(self, index: int) -> LayerShape:
        """The shape of decoder layer `index` of the same model."""
        return self.of_kind(self.facts.kind_of_layer[index])

    def of_kind(self, layer_kind: int) -> LayerShape:
        """The shape of a layer of another kind of the same model."""
        return self if layer_kind == self.layer_kind else replace(self, layer_kind=layer_kind)

    @property
    def with_attention(self) -> LayerShape:
        """The shape of the first kind of layer that has attention: positions and masks are made for it."""
        found = (kind for kind, layer in enumerate(self.facts.kinds) if layer.delta is None)
        return self.of_kind(next(found, self.layer_kind))

    @property
    def kind(self) -> DeviceKind:
        """The kind of device on which the layer runs."""
        return kind_of(self.device_type)

    @property
    def attention_kernel(self) -> str:
        """The attention that the layer runs with: torch's scaled_dot_product_attention, or run/model/query_tiles.py."""
        return self.facts.family.attention

    @property
    def fused_kernel(self) -> str | None:
        """The kernel by whose name attention without a mask is called; None where torch chooses."""
        if not self.kind.attention_bytes or self.attention_kernel != "sdpa" or self.layer.delta is not None:
            return None
        flash = self.itemsize == 2 and self.has_flash and not self.deterministic
        return FLASH if flash and self.layer.head_dim <= FLASH_WIDEST else EFFICIENT

    @property
    def by_triton(self) -> bool:
        """Whether our own kernels run where there are some."""
        return self.kernels == TRITON

    @property
    def gates_in_place(self) -> bool:
        """Whether what lies between the products of an MLP in blocks makes no tensor of its own (run/kernels/gated.py)."""
        return self.by_triton and self.facts.gates_by_silu

    def saves(self, short_name: str) -> bool:
        """Whether a linear layer keeps its input for the backward."""
        return self.mixed or short_name in self.targets

    @property
    def blocked(self) -> bool:
        """Whether the MLP runs in blocks (quant/gated_mlp.py)."""
        own = self.facts.family.unlisted
        whole = self.layer.experts is None and (own is None or own.gated_mlp)  # an expert for all tokens is as it is
        names = {linear.short_name for linear in self.linears if whole}
        in_blocks = self.facts.hidden_size % 64 == 0 and self.layer.inner % 64 == 0
        cut = in_blocks or self.facts.forms is not None  # a row of a GGUF matrix is whole blocks
        dropped = self.dropout and bool({"gate_proj", "up_proj", "down_proj"} & set(self.targets))
        return {"gate_proj", "up_proj", "down_proj"} <= names and cut and not dropped and not self.mixed

    def dimensions(self, *, n_sequences: int, n_tokens: int, n_tile: int = 0) -> Dimensions:
        """The sizes that the programs' letters stand for."""
        facts, layer = self.facts, self.layer
        found = {"s": n_sequences, "t": n_tokens, "u": n_tokens + 1, "d": facts.hidden_size, "h": layer.n_heads,
                 "k": layer.n_kv_heads, "q": layer.n_heads + 2 * layer.n_kv_heads, "e": layer.head_dim, "f": layer.head_dim,
                 "i": layer.inner, "n": n_tile, "z": facts.rotary_dim,
                 "v": min(self.kind.vocabulary_chunk, facts.vocab_size)}  # fmt: skip
        if (delta := layer.delta) is not None:
            found |= {"c": delta.conv_features, "j": delta.n_value_heads, "o": delta.value_dim}
        if (experts := layer.experts) is not None:
            found |= {"y": experts.count, "p": experts.active}
        if (own := facts.family.unlisted) is not None:
            found |= {"x": n_tokens + own.n_before}
        if facts.own_inputs is not None:
            found |= {"w": facts.own_inputs.width}
        return found

    def delta_dimensions(self, n_sequences: int) -> Dimensions:
        """The sizes that the letters of a delta rule's own programs stand for (one chunk of tokens)."""
        delta = self.layer.delta
        assert delta is not None
        return {"s": n_sequences, "x": DELTA_CHUNK + delta.kernel - 1, "l": delta.n_key_heads, "j": delta.n_value_heads,
                "m": delta.key_dim, "o": delta.value_dim, "c": delta.conv_features}  # fmt: skip

    def delta_case(self, n_sequences: int) -> str:
        """The key of the programs of one chunk of a delta rule."""
        delta = self.layer.delta
        assert delta is not None
        heads = "equal" if delta.n_key_heads == delta.n_value_heads else "grouped"
        return case_key(self.facts.family.name, self.itemsize, f"chunk {heads}", one=n_sequences == 1)

    def tile_dimensions(self, n_rows: int) -> Dimensions:
        """The sizes that the letters of the programs of an expert's tile stand for."""
        experts = self.layer.experts
        assert experts is not None
        return {"n": n_rows, "d": experts.hidden, "i": experts.inner}

    @property
    def tile_case(self) -> str:
        """The key of the programs of an expert's tile."""
        return case_key(self.facts.family.name, self.itemsize, "tile")

    def masked(self, layer_type: str, n_tokens: int) -> bool:
        """Whether a layer of this type gets a mask (transformers makes none where the attention kernel's own does)."""
        window = self.facts.sliding_window
        slides = layer_type == "sliding_attention" and window is not None and n_tokens >= window
        return slides and self.attention_kernel == "sdpa"

    def window(self, layer_type: str, n_tokens: int, *, in_a_row: bool = False) -> int | None:
        """The number of earlier tokens that attention sees which makes no mask for the micro-batch: attention in tiles of
        queries, and of sequences in a row; None where it sees all."""
        window = self.facts.sliding_window if layer_type == "sliding_attention" else None
        by_mask = self.attention_kernel == "sdpa" and not in_a_row
        return None if by_mask or window is None or n_tokens <= window else window

    def case(self, n_sequences: int, *, masked: bool, two_kinds: bool = False, gives_back: bool = False) -> str:
        """The key of this shape's programs in the traced table. `gives_back`: gradients of keys and values that several
        layers share flow in its backward."""
        layer = self.layer
        if self.facts.family.unlisted is not None:
            name, one = self.facts.family.name, n_sequences == 1
            return case_key(name, self.itemsize, f"kind{self.layer_kind}", masked=masked, one=one)
        heads = "equal" if layer.n_kv_heads == layer.n_heads else "single" if layer.n_kv_heads == 1 else "grouped"
        heads = f"{heads} k=v" if layer.values_are_keys else heads
        heads = f"{heads} experts" if layer.experts is not None else heads
        heads = f"{heads} own" if layer.own_input else heads
        heads = heads if layer.keys == OWN else f"{heads} {layer.keys}{' back' * gives_back}"
        heads = "two kinds" if two_kinds else heads if layer.delta is None else "delta"
        return case_key(self.facts.family.name, self.itemsize, heads, masked=masked, one=n_sequences == 1)


@dataclass(frozen=True)
class Vocabularies:
    """The embedding or the lm_head as stored: bytes of a number, whether the lm_head lies on the device, and the bytes of a
    row in blocks (0: plain numbers)."""

    itemsize: int
    head_resident: bool = False
    packed_row_bytes: int = 0


Dimensions = dict[str, int]  # by the programs' letters
HEADS = ("grouped", "single", "equal")


def table_file(folder: str, itemsize: int, targets: tuple[str, ...]) -> str:
    """The file of traced programs of a family without a record, by compute dtype and by the linear layers with LoRA."""
    return f"{folder}/{hashlib.sha256(' '.join([str(itemsize), *targets]).encode()).hexdigest()[:12]}.json"


def case_key(family: str, itemsize: int, heads: str = "", *, masked: bool = False, one: bool = False) -> str:
    """The key of a case in the table. `heads` is one of HEADS (with "k=v" where values are keys, with "experts" where they
    are there, with "own" where the layer is told of tokens anew, and "kept" or "shared" where layers share keys, with
    "back" where their gradients flow), or "two kinds" (of attention, for EMBED), or "delta" (a rule in the place of
    attention), or "chunk" with one of HEADS (a chunk of such a rule), or "tile" (an expert's), or "" (a norm)."""
    words = [family, "4" if itemsize == 4 else "2", heads, "masked" * masked, "one" * one]
    return " ".join(word for word in words if word)


def more_general(key: str) -> list[str]:
    """The other keys whose programs hold for this one, if it has none of its own: the nearest first."""
    grouped = key.replace(" single", " grouped").replace(" equal", " grouped")
    found = [key.removesuffix(" one"), grouped, grouped.removesuffix(" one")]
    return [other for other in dict.fromkeys(found) if other != key]
