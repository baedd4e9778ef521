"""The memory knobs of a run: what lies where, layer by layer. A value object; who chose it is plan/facts/budget.py's or
the user's.

The rule: no knob changes the arithmetic. Losses and gradients are bitwise those of the all-resident, all-device run
(design law 3), with three exceptions: `adamw8bit` keeps its moments in 8 bits, a `token_tile` sums a loss in other
portions, and `mlp_block` and `mlp_tile` do so with an MLP's products. In fp32 gradients of two sizes agree within 1e-5 of
their norm, bitwise where one tile holds all tokens that have a loss.

A larger block of the MLP takes more memory and fewer kernels: one of all features sums nothing up (quant/gated_mlp.py).
On a CPU it gains nothing, so there the smallest is the only one that the search knows.

A smaller tile is for short sequences on little memory, where the loss is a step's peak (8B, LoPT, 512 tokens: tiles of 256
take 2.1% less of the least that can be, 0.1% of what a card of 8 GB takes). From 2,048 tokens on a backward is the peak.

Settings that may differ by layer are written `CHOICE` or `CHOICE,FIRST-LAST=CHOICE,...`: `disk,0-5=resident`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from lopt_edge.errors import InputError
from lopt_edge.plan.facts.device_kinds import kind_of
from lopt_edge.plan.facts.model import ModelFacts
from quant.sizes import PIECES, MlpPieces

Tier = Literal["device", "host", "disk"]
Apply = Literal["step", "segment", "layer"]
Optimizer = Literal["adamw", "adamw8bit"]
WEIGHTS = ("resident", "host", "disk")
ACTIVATIONS = ("keep", "recompute", "page")
ELSEWHERE = "elsewhere"  # the place of a unit that another process of a pipeline has
MLP_PIECES = (PIECES.features, PIECES.tokens)  # features and tokens at a time, where nothing else is chosen
TOKEN_TILES = (1024, 512, 256)  # tokens whose chunk of logits exists at a time: the fastest first


@dataclass(frozen=True)
class Knobs:
    """The memory settings of a run. `weights` and `activations` have one entry a layer. `prefetch` is how many layers ahead
    a movement begins.

    `token_tile` is of the losses, in steps and evaluations. `mlp_block` is how many intermediate features of an MLP, and
    `mlp_tile` of how many tokens, are computed at a time.
    """

    weights: tuple[str, ...]
    activations: tuple[str, ...]
    saved_inputs: Tier = "device"
    pages: Tier = "disk"
    states: Tier = "device"
    gradients: Tier = "device"
    optimizer: Optimizer = "adamw"
    apply: Apply = "step"
    prefetch: int = 1
    head: str = "disk"
    token_tile: int = TOKEN_TILES[0]
    mlp_block: int = MLP_PIECES[0]
    mlp_tile: int = MLP_PIECES[1]

    @property
    def ring(self) -> int:
        """The number of buffers for streamed layers: the one that computes and those on their way."""
        return 0 if all(place in ("resident", ELSEWHERE) for place in self.weights) else self.prefetch + 1

    @property
    def tiers(self) -> set[str]:
        """The tiers below the device that anything uses, model weights left out."""
        used: set[str] = {self.states, self.gradients if self.apply != "layer" else "device"}
        used |= {self.saved_inputs} if "recompute" in self.activations else set()
        used |= {self.pages} if "page" in self.activations else set()
        return used - {"device"}

    def described(self) -> str:
        """The settings on one line, for people."""
        tile = "" if self.token_tile == TOKEN_TILES[0] else f"; losses of {self.token_tile} tokens at a time"
        return (
            f"weights {in_runs(self.weights)}; activations {in_runs(self.activations)}; saved inputs {self.saved_inputs}; "
            f"{self.optimizer} states {self.states}; gradients {self.gradients}; updates by {self.apply}{tile}"
            f"{pieces_in_words(self.mlp_block, self.mlp_tile)}"
        )


def pieces_in_words(features: int, tokens: int) -> str:
    """The pieces of an MLP as they stand at the end of a line; nothing where they are those of a CPU."""
    return "" if (features, tokens) == MLP_PIECES else f"; MLPs in blocks of {features} x {tokens} tokens"


def in_runs(choices: tuple[str, ...]) -> str:
    """The choices in words: one word if all layers agree, else each run of layers with its choice."""
    if len(set(choices)) == 1:
        return choices[0]
    starts = [i for i in range(len(choices)) if not i or choices[i] != choices[i - 1]]
    ends = [*(start - 1 for start in starts[1:]), len(choices) - 1]
    return ", ".join(f"{choices[start]} {start}-{end}" for start, end in zip(starts, ends, strict=True))


def default_knobs(facts: ModelFacts, device_type: str) -> Knobs:
    """The settings with everything on the device and one layer recomputed at a time. On a CPU the lm_head is read in chunks
    from its file: it would be the largest tensor in memory."""
    n_layers, kind = facts.n_layers, kind_of(device_type)
    head = "resident" if kind.host_is_below else "disk"
    return Knobs(
        ("resident",) * n_layers, ("recompute",) * n_layers, head=head, mlp_block=mlp_blocks(facts, device_type)[-1],
        mlp_tile=kind.mlp_tile,
    )  # fmt: skip


def mlp_blocks(facts: ModelFacts, device_type: str) -> tuple[int, ...]:
    """The blocks of intermediate features that a search may take, the fastest and largest first; one of those that have all
    features, and one where the model has no gated MLP."""
    if not has_blocked_mlp(facts):
        return (PIECES.features,)
    most, found = max(kind.inner for kind in facts.kinds), dict[int, int]()
    for size in kind_of(device_type).mlp_blocks:
        found.setdefault(min(size or most, most), size or most)
    return tuple(found.values())


def has_blocked_mlp(facts: ModelFacts) -> bool:
    """Whether a layer has a gated MLP of three matrices, which can be computed in blocks (quant/gated_mlp.py)."""
    return {"gate_proj", "up_proj", "down_proj"} <= {linear.short_name for kind in facts.kinds for linear in kind.linears}


def mlp_pieces(knobs: Knobs, device_type: str) -> MlpPieces:
    """The pieces in which MLPs run with these knobs."""
    return MlpPieces(knobs.mlp_block, knobs.mlp_tile, kind_of(device_type).joins_products)


def placement_of(knobs: Knobs) -> tuple[tuple[str, str], ...]:
    """The place of every unit of the model, as (unit, place). The token embedding's rows are read from its file for each
    batch."""
    layers = tuple((f"layer {i}", place) for i, place in enumerate(knobs.weights))
    return (("embed", "disk"), *layers, ("head", knobs.head))


def per_layer(text: str, choices: tuple[str, ...], *, n_layers: int, where: str) -> tuple[str, ...]:
    """The choice of each layer, from `CHOICE[,FIRST-LAST=CHOICE,...]`. Raises InputError."""
    first, *exceptions = [part.strip() for part in text.split(",")]
    forms = f"use {', '.join(choices)}, or e.g. {choices[-1]},0-5={choices[0]}"
    if first not in choices:
        raise InputError(f"{first[:40]!r} is unknown", where=where, fix=forms)
    result = [first] * n_layers
    for part in exceptions:
        match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?=(\w+)", part)
        if match is None or match[3] not in choices:
            raise InputError(f"{part[:40]!r} is not LAYERS=CHOICE", where=where, fix=forms)
        start, end = int(match[1]), int(match[2] or match[1])
        if not start <= end < n_layers:
            raise InputError(f"{part!r} names layers beyond 0-{n_layers - 1}", where=where, fix=forms)
        result[start : end + 1] = [match[3]] * (end + 1 - start)
    return tuple(result)
