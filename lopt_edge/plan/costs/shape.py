"""The shapes that decide what an op takes: of a layer, of its vocabularies, of a micro-batch.

The rule: whatever a byte form or a program may depend on is a field here, so two layers with equal fields take equal
bytes. It knows no op and no method.
"""

from __future__ import annotations

from dataclasses import dataclass

from lopt_edge.plan.facts.device_kinds import DeviceKind, kind_of
from lopt_edge.plan.facts.model import ModelFacts


@dataclass(frozen=True)
class LayerShape:
    """The shape of a layer, of which the programs are functions. `itemsize` is the compute dtype's, `targets` are the
    linear layers with LoRA.

    `mixed`: its weights are mixtures of others' (quant/mixed.py).
    """

    facts: ModelFacts
    itemsize: int
    rank: int
    targets: tuple[str, ...]
    device_type: str = "cpu"
    dropout: bool = False
    mixed: bool = False

    @property
    def kind(self) -> DeviceKind:
        """The kind of device on which the layer runs."""
        return kind_of(self.device_type)

    @property
    def attention_kernel(self) -> str:
        """The attention that the layer runs with: torch's scaled_dot_product_attention, or run/model/query_tiles.py."""
        return self.facts.family.attention

    def saves(self, short_name: str) -> bool:
        """Whether a linear layer keeps its input for the backward."""
        return self.mixed or short_name in self.targets

    @property
    def blocked(self) -> bool:
        """Whether the MLP runs in blocks (quant/gated_mlp.py)."""
        names = {linear.short_name for linear in self.facts.linears}
        in_blocks = self.facts.hidden_size % 64 == 0 and self.facts.intermediate_size % 64 == 0
        cut = in_blocks or self.facts.forms is not None  # a row of a GGUF matrix is whole blocks
        dropped = self.dropout and bool({"gate_proj", "up_proj", "down_proj"} & set(self.targets))
        return {"gate_proj", "up_proj", "down_proj"} <= names and cut and not dropped and not self.mixed

    def dimensions(self, *, n_sequences: int, n_tokens: int, n_tile: int = 0) -> Dimensions:
        """The sizes that the programs' letters stand for."""
        facts = self.facts
        return {"s": n_sequences, "t": n_tokens, "u": n_tokens + 1, "d": facts.hidden_size, "h": facts.n_heads,
                "k": facts.n_kv_heads, "q": facts.n_heads + 2 * facts.n_kv_heads, "e": facts.head_dim,
                "i": facts.intermediate_size, "n": n_tile,
                "v": min(self.kind.vocabulary_chunk, facts.vocab_size)}  # fmt: skip

    def masked(self, layer_type: str, n_tokens: int) -> bool:
        """Whether a layer of this type gets a mask (transformers makes none where the attention kernel's own does)."""
        window = self.facts.sliding_window
        slides = layer_type == "sliding_attention" and window is not None and n_tokens >= window
        return slides and self.attention_kernel == "sdpa"

    def window(self, layer_type: str, n_tokens: int) -> int | None:
        """The number of earlier tokens that attention in tiles of queries sees; None where it sees all."""
        window = self.facts.sliding_window if layer_type == "sliding_attention" else None
        all_seen = self.attention_kernel == "sdpa" or window is None or n_tokens <= window
        return None if all_seen else window

    def case(self, n_sequences: int, *, masked: bool, two_kinds: bool = False) -> str:
        """The key of this shape's programs in the traced table."""
        facts = self.facts
        heads = "equal" if facts.n_kv_heads == facts.n_heads else "single" if facts.n_kv_heads == 1 else "grouped"
        return case_key(
            facts.family.name, self.itemsize, "two kinds" if two_kinds else heads, masked=masked, one=n_sequences == 1
        )


@dataclass(frozen=True)
class Vocabularies:
    """The embedding or the lm_head as stored: bytes of a number, whether the lm_head lies on the device, and the bytes of a
    row in blocks (0: plain numbers)."""

    itemsize: int
    head_resident: bool = False
    packed_row_bytes: int = 0


Dimensions = dict[str, int]  # by the programs' letters
HEADS = ("grouped", "single", "equal")


def case_key(family: str, itemsize: int, heads: str = "", *, masked: bool = False, one: bool = False) -> str:
    """The key of a case in the table. `heads` is one of HEADS, or "two kinds" (of attention, for EMBED), or "" (a norm)."""
    words = [family, "4" if itemsize == 4 else "2", heads, "masked" * masked, "one" * one]
    return " ".join(word for word in words if word)


def more_general(key: str) -> list[str]:
    """The other keys whose programs hold for this one, if it has none of its own: the nearest first."""
    grouped = key.replace(" single", " grouped").replace(" equal", " grouped")
    found = [key.removesuffix(" one"), grouped, grouped.removesuffix(" one")]
    return [other for other in dict.fromkeys(found) if other != key]
