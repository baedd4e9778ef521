"""Replays the programs of tools/trace_bytes.py: what one op on a layer allocates and releases, in order.

`layer_bytes.json` holds them by family, compute dtype and op; the tool's head says how to read one. Each size is a product
of dimensions. Where a module of ours works the program has a mark, and module_bytes.py says what it takes inside.
"""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.resources import files
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lopt_edge.plan.costs import expert_bytes, module_bytes
from lopt_edge.plan.costs.module_bytes import Heap
from lopt_edge.plan.costs.shape import Dimensions, case_key, more_general
from lopt_edge.plan.costs.tiles import backward_bytes, forward_bytes, heads_at_once
from lopt_edge.plan.costs.vocabulary_bytes import gather_rows
from quant.sizes import expert_tile

if TYPE_CHECKING:
    from lopt_edge.plan.costs.shape import LayerShape, Vocabularies
BEFORE_ATTENTION = ("q_proj", "k_proj", "v_proj", "qkv_proj")
GRADIENTS = ("grad", "keys", "values")  # that an op begins with: of the output, and of shared keys and values
Product = tuple[float, str]  # a coefficient and letters
WIDE_SCORES = (4.0, "nv")  # of the task loss in fp32, which our kernel (run/kernels/cross_entropy.py) does not make


class Token(NamedTuple):
    """One word of a program. `kind` is +, -, !, = or @ (keys or values that later layers attend to). `name` is what is
    released, or the mark; `unless` are the linear layers whose LoRA delays a release.

    `value`: it is done only where the layer's output is needed.
    """

    kind: str
    name: str = ""
    product: Product = (0.0, "")
    arguments: tuple[Product, ...] = ()
    unless: frozenset[str] = frozenset()
    value: bool = False


@lru_cache(maxsize=8)
def _table(path: str) -> dict[str, Any]:
    """The table of all families with a record, or the one at `path`."""
    file = Path(path) if path else files("lopt_edge.plan.costs") / "layer_bytes.json"
    loaded: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return loaded


@lru_cache(maxsize=256)
def program(case: str, op: str, table: str = "") -> tuple[Token, ...]:
    """The program of an op in a case, from a table (default: that of all families); where that has none, of the nearest
    more general case."""
    cases = _table(table)["cases"]
    found = next(cases[key] for key in (case, *more_general(case)) if key in cases)
    return tuple(_token(text) for text in _table(table)["programs"][found[op]].split())


def _token(text: str) -> Token:
    value, text = text.startswith("~"), text.removeprefix("~")
    kind, rest = text[0], text[1:]
    if kind == "+":
        return Token(kind, product=_product(rest), value=value)
    if kind == "!":
        name, *arguments = rest.split(":")
        sizes = tuple(_product(word) for word in arguments if word[0].isdigit())
        return Token(kind, ":".join([name, *arguments[: len(arguments) - len(sizes)]]), arguments=sizes, value=value)
    name, _, unless = rest.partition("?")
    return Token(kind, name, unless=frozenset(unless.split(",")) - {""}, value=value)


def _product(text: str) -> Product:
    number = text.rstrip("abcdefghijklmnopqrstuvwxyz")
    return float(number), text[len(number) :]


class Replay:
    """A heap on which programs run. `alive` is what they allocated and did not release, by name ("3"; "g3" before this op).

    `lora` are the layer's linear layers that keep their input (those with LoRA, where weights are mixed all), and "mlp"
    where one of the MLP's is among them. `from_mlp`: no gradient goes back beyond the MLP; `past_mlp`: nor as far.
    `window`: of attention that makes no mask for the micro-batch. `in_a_row`: the lengths of sequences that lie in one row,
    each once.
    """

    def __init__(
        self,
        shape: LayerShape,
        dimensions: Dimensions,
        *,
        stored: Vocabularies | None = None,
        from_mlp: bool = False,
        past_mlp: bool = False,
    ) -> None:
        self.shape, self.dimensions, self.stored, self.from_mlp, self.heap = shape, dimensions, stored, from_mlp, Heap()
        self.window: int | None = None
        self.in_a_row: tuple[int, ...] = ()
        self.past_mlp = past_mlp
        in_mlp = {linear.short_name for linear in shape.linears if linear.name.startswith("mlp.")}
        self.lora = frozenset(linear.short_name for linear in shape.linears if shape.saves(linear.short_name))
        self.lora |= {"mlp"} if in_mlp & self.lora else set()
        self.is_backward = self.in_attention = False
        self.alive: dict[str, int] = {}
        self.result = ""  # name of the output
        self.shared: list[str] = []  # names of what others keep

    def run(self, case: str, op: str, *, graph: bool = False, value: bool = True, paged: bool = False) -> None:
        """Run an op's program. `graph`: what a plain MLP saves stays. `value`: the output is needed. `paged`: the graph
        stays to the end."""
        number, tokens, self.is_backward = 0, program(case, op, self.shape.table), op.startswith("backward")
        beside, self.in_attention = self._attention_bytes(masked=" masked" in case), False
        for position, token in enumerate(tokens):
            skipped = token.value and not value
            if token.kind == "+":
                skipped |= self.shape.by_triton and self.shape.itemsize == 2 and token.product == WIDE_SCORES
                self.alive[str(number)] = self.heap.take(0 if skipped else self.bytes_of(token.product))
                number += 1
                if self.in_attention:
                    self.heap.touch(beside)
            elif token.kind == "-":
                stays = token.unless & self.lora or (paged and token.name not in GRADIENTS and not token.name.isdigit())
                if not stays:
                    self.drop(token.name)
            elif token.kind == "=":
                self.result = token.name
            elif token.kind == "@":
                self.shared.append(token.name)
            elif not skipped or token.name == "mlp_forward":
                after = self._released_next(tokens[position + 1 :]) if token.name.startswith("mlp_backward") else 0
                self._mark(token, graph=graph, value=not skipped, paged=paged, after=after)

    def _attention_bytes(self, *, masked: bool) -> int:
        """The bytes that fused attention takes beside its results. The program has no mark for it, so they are taken
        wherever it may be: between its inputs and the product that follows, and the same way back."""
        kernel, layer, copies = self.shape.fused_kernel, self.shape.layer, self.shape.kind.score_copies
        if copies and "t" in self.dimensions and layer.delta is None and self.shape.attention_kernel == "sdpa":
            return copies * self._rows * self.dimensions["t"] * layer.n_heads
        if kernel is None or masked or "t" not in self.dimensions:
            return 0
        group = layer.n_heads // layer.n_kv_heads
        sizes = {"group": group, "head_dim": layer.head_dim, "itemsize": self.shape.itemsize}
        device_type, n_kv_heads = self.shape.device_type, layer.n_kv_heads
        at_once = heads_at_once(kernel, self._rows, n_kv_heads=n_kv_heads, device_type=device_type, **sizes)
        return at_once * (backward_bytes if self.is_backward else forward_bytes)(kernel, self._rows, **sizes)

    def drop(self, name: str) -> None:
        """Release what lives under this name, if anything does."""
        self.heap.free(self.alive.pop(name, 0))

    def end_forward(self) -> None:
        """Rename the forward's tensors to what lived before: an op that comes after finds them as "g3"."""
        self.alive = {f"g{name}" if name.isdigit() else name: n_bytes for name, n_bytes in self.alive.items()}

    def _released_next(self, tokens: tuple[Token, ...]) -> int:
        """The bytes of this op's own tensors that go once a module has its result: the gradient that only it was given."""
        tokens = tokens[1:] if tokens[0].kind == "+" else tokens
        n_released = next(i for i, token in enumerate(tokens) if token.kind != "-" or not token.name.isdigit())
        return sum(self.alive.get(token.name, 0) for token in tokens[:n_released])

    def bytes_of(self, product: Product) -> int:
        """The bytes of a product of dimensions."""
        return round(product[0] * prod(self.dimensions[letter] for letter in product[1]))

    # marks -----------------------------------------------------------------------------------------------------------

    def _mark(self, token: Token, *, graph: bool, value: bool, paged: bool, after: int) -> None:
        name, _, of = token.name.partition(":")
        arguments = [self.bytes_of(product) for product in token.arguments]
        if self.is_backward:
            self.in_attention = of == "o_proj" and name == "lora_backward"
        else:
            self.in_attention = (self.in_attention or of in BEFORE_ATTENTION) and of != "o_proj"
        if of:
            self._linear(name, of)
        elif name.startswith("norm"):
            self.norm(name, *arguments)
        elif name.startswith("attention"):
            self._attention(backward=name == "attention_backward")
        elif name.startswith("delta"):
            self._delta(name)
        elif name.startswith("mamba"):
            self._mamba(name)
        elif name.startswith("experts"):
            self._experts(name)
        elif name == "gather" and self.stored:
            gather_rows(self.heap, self.shape, *arguments, stored=self.stored)
        elif self.shape.blocked:
            self._blocked_mlp(name, value=value)
        else:
            self._plain_mlp(name, graph=graph, value=value, paged=paged, given=after)

    @property
    def _rows(self) -> int:
        return self.dimensions["s"] * self.dimensions["t"]

    def _linear(self, name: str, of: str) -> None:
        linear = next(linear for linear in self.shape.linears if linear.short_name == of)
        if name == "unpack":
            unpack = module_bytes.unpack_for_backward if self.is_backward else module_bytes.unpack_for_forward
            unpack(self.heap, self.shape, linear, self._rows)
        elif of not in self.shape.targets:
            return
        elif name == "lora":
            module_bytes.lora_forward(self.heap, self.shape, linear, self._rows)
        else:
            need_x = name == "lora_backward"
            module_bytes.lora_backward(self.heap, self.shape, linear, self._rows, need_x=need_x)

    def norm(self, name: str, n_rows: int, width: int) -> None:
        """Take what a norm needs: it works on a tile of rows at a time (run/model/tiled.py)."""
        if self.shape.by_triton and self.shape.facts.family.plain_norms:
            return
        tile = max(1, self.shape.kind.norm_tile_bytes // (width * self.shape.itemsize))
        if self.shape.kind.fuses_norms and self.shape.facts.family.plain_norms:
            n_values = (n_rows > tile) + (name == "norm_backward")  # a tile's result, and the norm again
            self.heap.touch(min(tile, n_rows) * (4 + n_values * width * self.shape.itemsize))
            return
        inside = Replay(self.shape, {"n": min(tile, n_rows), "d": width})
        inside.run(case_key(self.shape.facts.family.name, self.shape.itemsize), name)
        self.heap.touch(inside.heap.peak)

    def _attention(self, *, backward: bool) -> None:
        """Take what attention of ours needs for one sequence at a time: in tiles of queries, or of sequences in a row."""
        if self.shape.attention_kernel == "sdpa":  # else torch's own, which has nothing inside
            run = module_bytes.sequence_backward if backward else module_bytes.sequence_forward
        else:
            run = module_bytes.attention_backward if backward else module_bytes.attention_forward
        alone = () if self.shape.attention_kernel == "sdpa" else (self.dimensions["t"],)
        for n_tokens in self.in_a_row or alone:
            run(self.heap, self.shape, n_tokens, self.window)

    def _delta(self, name: str) -> None:
        """Take what a delta rule needs: it works on a chunk of tokens at a time (run/model/delta_net.py)."""
        n_sequences, n_tokens = self.dimensions["s"], max(self.in_a_row, default=self.dimensions["t"])
        inside = Replay(self.shape, self.shape.delta_dimensions(n_sequences))
        inside.run(self.shape.delta_case(n_sequences), name)
        delta = self.shape.layer.delta
        assert delta is not None
        state = 4 * n_sequences * delta.n_value_heads * delta.key_dim * delta.value_dim
        self.heap.touch(module_bytes.chunk_states(state, n_tokens, backward=self.is_backward) + inside.heap.peak)

    def _mamba(self, name: str) -> None:
        """Take what a state space needs, likewise (run/model/mamba.py)."""
        n_sequences, mamba = self.dimensions["s"], self.shape.layer.mamba
        assert mamba is not None
        inside = Replay(self.shape, {"s": n_sequences})
        inside.run(case_key(self.shape.facts.family.name, self.shape.itemsize, "mamba", one=n_sequences == 1), name)
        state = 4 * n_sequences * mamba.n_heads * mamba.head_dim * mamba.n_state
        n_tokens = self.dimensions["t"]
        self.heap.touch(module_bytes.chunk_states(state, n_tokens, backward=self.is_backward) + inside.heap.peak)

    def _experts(self, name: str) -> None:
        """Take what experts need: they work on a tile of one expert's tokens at a time (quant/experts.py)."""
        n_tile = min(self._rows, expert_tile(on_cpu=self.shape.kind.computes_on_cores))
        inside = Replay(self.shape, self.shape.tile_dimensions(n_tile))
        inside.run(self.shape.tile_case, name)
        experts = expert_bytes.experts_forward if name == "experts_forward" else expert_bytes.experts_backward
        experts(self.heap, self.shape, self._rows, tile=inside.heap.peak)

    def _blocked_mlp(self, name: str, *, value: bool) -> None:
        if name != "mlp_forward":
            module_bytes.mlp_backward(self.heap, self.shape, self._rows, need_x=name == "mlp_backward")
        elif value:
            module_bytes.mlp_forward(self.heap, self.shape, self._rows)

    def _plain_mlp(self, name: str, *, graph: bool, value: bool, paged: bool, given: int) -> None:
        """Take what the plain MLP needs; its saved tensors live from the forward's mark to the backward's."""
        x_trains = not self.from_mlp
        if name == "mlp_forward":
            kept = module_bytes.plain_mlp_forward(
                self.heap, self.shape, self._rows, graph=graph and not self.past_mlp, value=value, x_trains=x_trains
            )
            self.alive["mlp"] = self.heap.take(kept)
        else:
            module_bytes.plain_mlp_backward(self.heap, self.shape, self._rows, x_trains=x_trains, paged=paged, given=given)
            if not paged:
                self.drop("mlp")
