"""What one decoder layer takes, by family and compute dtype: evaluates the table that tools/trace_bytes.py wrote.

`layer_bytes.json` holds, for each op on a layer, forms: sums of products of dimensions, in bytes, relative to the op's
beginning. `peak` are its moments outside our blocked MLP, `mlp_forward` and `mlp_backward` those at which that runs (its
own bytes are added here), `end` is what stays. On top come things that do not grow with the tokens: unpacked scales, a
look-up index, fresh gradients of one linear layer.

The table was traced on the CPU. On CUDA other attention kernels save slightly other things; callers add a margin there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from math import prod
from typing import Any

from lopt_edge.plan.facts import LinearFacts, ModelFacts

Form = dict[str, float]
UNPACK_CHUNK = 1 << 18  # quant.nf4.CHUNK_BYTES: packed bytes unpacked at a time
BLOCK_FEATURES = 1024  # quant.gated_mlp
NORM_TILE = {"cpu": 1 << 20, "cuda": 32 << 20}  # bytes of rows: run.tiled.ROW_BYTES
MLP_TOKEN_TILE = {"cpu": 1024, "cuda": 4096}


@dataclass(frozen=True)
class LayerShape:
    """What the forms are products of, and what the formulas need. `itemsize` is the compute dtype's."""

    facts: ModelFacts
    itemsize: int
    rank: int
    targets: tuple[str, ...]
    device_type: str = "cpu"
    dropout: bool = False

    def value(self, form: Form, *, n_sequences: int, n_tokens: int) -> int:
        """A form in bytes for sequences of this length; products with tokens^2 are per sequence."""
        facts = self.facts
        sizes = {"tokens": n_tokens, "hidden": facts.hidden_size, "heads": facts.n_heads, "kv_heads": facts.n_kv_heads,
                 "head_dim": facts.head_dim, "intermediate": facts.intermediate_size, "rank": self.rank}  # fmt: skip
        total = 0.0
        for key, coefficient in form.items():
            names = [part.split("^") for part in key.split("*")]
            total += coefficient * prod(sizes[name[0]] ** (int(name[1]) if len(name) > 1 else 1) for name in names)
        return round(total * n_sequences)

    @property
    def blocked(self) -> bool:
        """Whether the MLP runs in blocks (quant/gated_mlp.py)."""
        names = {linear.short_name for linear in self.facts.linears}
        cut = self.facts.hidden_size % 64 == 0 and self.facts.intermediate_size % 64 == 0
        return {"gate_proj", "up_proj", "down_proj"} <= names and cut


@lru_cache(maxsize=1)
def _table() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((files("lopt_edge.plan") / "layer_bytes.json").read_text(encoding="utf-8"))
    return loaded


def op_forms(shape: LayerShape, op: str) -> dict[str, Any]:
    """The forms of forward, graph, backward, backward_first or backward_graph; of "norm" the factors."""
    found: dict[str, Any] = _table()[shape.facts.model_type]["4" if shape.itemsize == 4 else "2"][op]
    return found


def within_layer(shape: LayerShape, op: str, *, n_sequences: int, n_tokens: int) -> int:
    """The most that an op on a layer takes at a time beyond what lived at its beginning."""
    forms = op_forms(shape, op)
    size = {"n_sequences": n_sequences, "n_tokens": n_tokens}
    linears = [linear for linear in shape.facts.linears if not (shape.blocked and linear.name.startswith("mlp."))]
    backward = op.startswith("backward")
    plain = max(shape.value(form, **size) for form in forms["peak"]) + max(
        _linear_fixed(shape, linear, backward=backward) for linear in linears
    )
    moments = [plain, *_norm_moments(shape, forms, size)]
    if not shape.blocked:
        return max(moments)
    n_rows = n_sequences * n_tokens
    for name, inside in (("mlp_forward", mlp_forward), ("mlp_backward", mlp_backward)):
        moments += [shape.value(form, **size) + inside(shape, n_rows) for form in forms[name]]
    return max(moments)


def _norm_moments(shape: LayerShape, forms: dict[str, Any], size: dict[str, int]) -> list[int]:
    """The moments at which a norm works on a tile (run/tiled.py)."""
    row_bytes = shape.facts.hidden_size * shape.itemsize
    tile = min(NORM_TILE[shape.device_type], size["n_sequences"] * size["n_tokens"] * row_bytes)
    factors = op_forms(shape, "norm")
    return [
        shape.value(form, **size) + round(factors[name] * tile)
        for name in ("forward", "backward")
        for form in forms[f"norm_{name}"]
    ]


def graph_rest(shape: LayerShape, *, n_sequences: int, n_tokens: int) -> tuple[int, bool]:
    """What a kept graph holds beside its input, and whether it holds that too."""
    forms = op_forms(shape, "graph")
    hidden = n_sequences * n_tokens * shape.facts.hidden_size * shape.itemsize
    holds_input = "hidden*tokens" not in forms["frees"]
    end = shape.value(forms["end"], n_sequences=n_sequences, n_tokens=n_tokens)
    return end - hidden + (0 if holds_input else hidden), holds_input


def _scales(linear: LinearFacts) -> int:
    """fp32 block scales of a matrix."""
    return linear.in_features * linear.out_features // 16


def _unpack_index(n_codes: int, itemsize: int) -> int:
    """int32 index of a chunk, and for half precision an fp32 copy of it."""
    chunk = min(UNPACK_CHUNK, n_codes)
    return 4 * chunk + (0 if itemsize == 4 else 8 * chunk)


def _linear_fixed(shape: LayerShape, linear: LinearFacts, *, backward: bool) -> int:
    """What one linear layer takes apart from its tokens: its scales and index, then its adapter's gradients."""
    n_codes = linear.in_features * linear.out_features // 2
    unpack = 2 * _scales(linear) + _unpack_index(n_codes, shape.itemsize) if shape.device_type == "cpu" else _scales(linear)
    if not backward or linear.short_name not in shape.targets:
        return unpack
    both = (linear.in_features + linear.out_features) * shape.rank
    return max(unpack, both * 4 + both * (shape.itemsize if shape.itemsize != 4 else 0))


def _mlp_linears(shape: LayerShape) -> list[LinearFacts]:
    by_name = {linear.short_name: linear for linear in shape.facts.linears}
    return [by_name[name] for name in ("gate_proj", "up_proj", "down_proj")]


def mlp_forward(shape: LayerShape, n_rows: int) -> int:
    """quant.gated_mlp._forward at its worst moment, its output included."""
    hidden, c = shape.facts.hidden_size, shape.itemsize
    width = min(BLOCK_FEATURES, shape.facts.intermediate_size)
    tile = min(MLP_TOKEN_TILE[shape.device_type], n_rows)
    adapters, low = _mlp_adapters(shape), n_rows * shape.rank
    scales = sum(_scales(linear) for linear in _mlp_linears(shape))
    total = n_rows * hidden * 4 + scales + adapters * (c if c != 4 else 0) + low * 4 + 2 * low * c
    block_copy = width * hidden // 2 + width * hidden // 16  # columns of the last matrix are cut out as copies
    index = _unpack_index(width * hidden // 2, c)
    in_tile = max(2 * tile * width * c, tile * width * c + (tile * hidden * c if c != 4 else 0))
    at_end = n_rows * hidden * c if c != 4 else 0
    return total + max(block_copy + index, in_tile, at_end, 2 * scales // 3)


def mlp_backward(shape: LayerShape, n_rows: int) -> int:
    """quant.gated_mlp._backward at its worst moment."""
    hidden, c = shape.facts.hidden_size, shape.itemsize
    width = min(BLOCK_FEATURES, shape.facts.intermediate_size)
    tile = min(MLP_TOKEN_TILE[shape.device_type], n_rows)
    adapters, low = _mlp_adapters(shape), n_rows * shape.rank
    scales = sum(_scales(linear) for linear in _mlp_linears(shape))
    total = scales + adapters * 4 + adapters * (c if c != 4 else 0) + 3 * low * c + 3 * low * 4
    total += n_rows * hidden * 4  # dx: the norm before the MLP always needs it
    in_tile = max(6 * tile * width * c, 2 * tile * width * c + (tile * hidden * c if c != 4 else 0))
    block_copy = width * hidden // 2 + width * hidden // 16 + _unpack_index(width * hidden // 2, c)
    at_end = n_rows * hidden * c if c != 4 else 0
    return total + max(in_tile, block_copy, at_end)


def _mlp_adapters(shape: LayerShape) -> int:
    """Elements of the MLP's adapters."""
    return sum(
        (linear.in_features + linear.out_features) * shape.rank
        for linear in _mlp_linears(shape)
        if linear.short_name in shape.targets
    )
