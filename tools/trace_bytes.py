"""Finds what one decoder layer allocates, family by family, and writes lopt_edge/plan/layer_bytes.json for the planner.

The planner must know the bytes inside a layer without torch. transformers' layer code allocates in a fixed order, so this
tool runs each family's layer on small models and logs every allocation and release (run/tracker.py). The same run with
one dimension doubled (tokens, hidden size, heads, ...) gives the same log with other sizes; the factor of each size says
which dimensions it is a product of. So a moment of the log is a sum of products (a form), exact for every shape. Of all
moments of an op those are kept that can be the largest for some shape.

Left out: our own blocked MLP (its bytes are a formula in plan/layer_bytes.py; the moments at which it runs are marked),
tensors that do not grow with the tokens (weights being unpacked, gradients of adapters: a formula, too), and what kernels
take inside.

    python tools/trace_bytes.py            writes the table (under a minute)
    python tools/trace_bytes.py --check    exits with 1 if the committed table is not what this version gives
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lopt_edge.models import find_model, quantise_model
from lopt_edge.plan.knobs import Knobs
from lopt_edge.run import tiled
from lopt_edge.run.tracker import MemoryTracker
from quant import nf4
from quant.gated_mlp import PackedGatedMLP
from tests.laws.bench import make_bench, random_batch
from tests.models import FAMILIES, make_folder

TABLE = Path(__file__).resolve().parent.parent / "lopt_edge" / "plan" / "layer_bytes.json"
MARKS = ("mlp_forward", "mlp_backward", "norm_forward", "norm_backward")
BASE = {"tokens": 96, "hidden": 384, "heads": 12, "kv_heads": 2, "head_dim": 64, "intermediate": 192, "rank": 4}
OPS = {"forward": "FORWARD 1 mb=0 keep=input", "graph": "FORWARD 1 mb=0 keep=graph", "backward": "BACKWARD 1 mb=0",
       "backward_first": "BACKWARD 0 mb=0", "backward_graph": "BACKWARD 1 mb=0"}  # fmt: skip
Event = tuple[str, int, int]  # "+" | "-" | one of MARKS, number of the allocation, bytes
Log = dict[str, list[Event]]  # by op
Products = dict[int, tuple[float, dict[str, int]]]  # allocation -> its coefficient (bytes) and the dimensions' exponents


class EventLog(MemoryTracker):
    """Every allocation and release, in order, as (kind, number of the allocation, bytes)."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.numbers: dict[int, tuple[int, int]] = {}
        self.n_allocated = 0

    def _see(self, storage: torch.UntypedStorage) -> None:
        known = storage._cdata in self._sizes
        super()._see(storage)
        if not known and storage._cdata in self._sizes:
            self.numbers[storage._cdata] = (self.n_allocated, storage.nbytes())
            self.events.append(("+", self.n_allocated, storage.nbytes()))
            self.n_allocated += 1

    def _forget(self, key: int) -> None:
        super()._forget(key)
        self.events.append(("-", *self.numbers.pop(key)))


class _Opaque(torch.autograd.Function):
    """Stands for the blocked MLP: same input, output and saved tensor; marks the moments inside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log: EventLog, value_needed: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.log = log
        if not value_needed:
            return x.new_zeros(1).expand(x.shape)
        log.events.append(("mlp_forward", -1, 0))
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        ctx.log.events.append(("mlp_backward", -1, 0))
        result = grads[0] * 1.0
        del x
        return result, None, None


class _OpaqueNorm(torch.autograd.Function):
    """Stands for a norm in tiles: same input, output and saved tensor; the marks come once the output is there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log: EventLog) -> Tensor:
        ctx.save_for_backward(x)
        ctx.log = log
        y = torch.empty_like(x).copy_(x)
        log.events.append(("norm_forward", -1, 0))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x).copy_(grads[0])
        ctx.log.events.append(("norm_backward", -1, 0))
        return dx, None


class OpaqueNorm(nn.Module):
    def __init__(self, inner: nn.Module, log: EventLog) -> None:
        super().__init__()
        self.inner, self.log = inner, log

    def forward(self, x: Tensor) -> Tensor:
        return _OpaqueNorm.apply(x, self.log)


def norm_factors(inner: nn.Module, dtype: torch.dtype) -> dict[str, float]:
    """What one tile of a norm takes beside its input and output, in multiples of the tile."""
    width = inner.weight.shape[0]
    x, g = torch.randn(2048, width).to(dtype), torch.randn(2048, width).to(dtype)
    tracker, found = MemoryTracker(), {}
    with tracker:
        tracker.watch([x, g])
        held = tracker.live_bytes
        with torch.no_grad():
            y = inner(x)
        found["forward"] = (tracker.peak_bytes - held) / x.nbytes
        del y
        tracker.start_peak()
        held = tracker.live_bytes
        tiled._tile_gradient(inner, x, g)
        found["backward"] = (tracker.peak_bytes - held) / x.nbytes
    return {name: round(value, 2) for name, value in found.items()}


class OpaqueMLP(nn.Module):
    def __init__(self, mlp: PackedGatedMLP, log: EventLog) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.log = mlp.gate_proj, mlp.up_proj, mlp.down_proj, log

    def forward(self, x: Tensor) -> Tensor:
        return _Opaque.apply(x, self.log, self.down_proj.value_needed)


def run(family: str, dtype: torch.dtype, sizes: dict[str, int], *, activations: str) -> Log:
    """The events of each op of a second step."""
    folder = Path(tempfile.mkdtemp())
    changes = {"hidden_size": sizes["hidden"], "num_attention_heads": sizes["heads"],
               "num_key_value_heads": sizes["kv_heads"], "head_dim": sizes["head_dim"],
               "intermediate_size": sizes["intermediate"], "max_position_embeddings": 4096}  # fmt: skip
    if family == "phi3":  # its head size is hidden / heads
        changes["hidden_size"] = sizes["heads"] * sizes["head_dim"]
    make_folder(folder / "m", family, num_hidden_layers=4, **changes)
    quantise_model(find_model(str(folder / "m")), folder / "q")
    bench = make_bench(folder / "q", method="e2e", num_segments=1, dtype=dtype, rank=sizes["rank"],
                       knobs=Knobs(("resident",) * 4, (activations,) * 4))  # fmt: skip
    log, spans = EventLog(), {}
    for layer in bench.model.layers:
        for name, module in list(layer.named_modules()):
            if isinstance(module, tiled.TokenTiled):
                layer.set_submodule(name, OpaqueNorm(module.inner, log))
        if isinstance(layer.mlp, PackedGatedMLP):
            layer.mlp = OpaqueMLP(layer.mlp, log)
    for p in bench.executor.optimizer.groups.values():  # the opaque MLP gives its adapters no gradient
        for parameter in p.parameters:
            parameter.grad = None
    batch = random_batch((sizes["tokens"],), seed=1)
    rates = {0: 1e-3}
    bench.executor.run(bench.plan, [batch], step=1, learning_rates=rates)

    def observe(op: Any, after: bool) -> None:
        spans.setdefault(op.text(), []).append(len(log.events))

    bench.executor.observe = observe
    with log:
        log.watch([bench.executor.optimizer._values, bench.executor.optimizer._gradients])
        bench.executor.run(bench.plan, [batch], step=2, learning_rates=rates)
    return {text: log.events[first:last] for text, (first, last) in spans.items()}


def products(family: str, dtype: torch.dtype, *, activations: str) -> tuple[Log, Products]:
    """The base run's ops, and what each allocation in them is a product of."""
    base = run(family, dtype, BASE, activations=activations)
    exponents: dict[int, dict[str, int]] = {number: {} for number, _ in _allocations(base)}
    for name in BASE:
        changed = run(family, dtype, {**BASE, name: BASE[name] * 2}, activations=activations)
        for text in base:
            if [event[0] for event in base[text]] != [event[0] for event in changed[text]]:
                raise SystemExit(f"{family}: doubling {name} changes the order of allocations in {text}")
        for (number, size), (_, other) in zip(_allocations(base), _allocations(changed), strict=True):
            power = round(math.log2(other / size))
            if power:
                exponents[number][name] = power
    return base, {
        number: (size / math.prod(BASE[name] ** power for name, power in exponents[number].items()), exponents[number])
        for number, size in _allocations(base)
    }


def _allocations(log: Log) -> list[tuple[int, int]]:
    return [(number, size) for events in log.values() for kind, number, size in events if kind == "+"]


def forms(op: list[Event], allocated: Products) -> dict[str, Any]:
    """The moments of an op as sums of products, relative to its beginning."""
    live: Counter[str] = Counter()
    moments: list[tuple[Counter[str], str]] = [(Counter(), "")]
    for kind, number, _ in op:
        coefficient, powers = allocated.get(number, (0.0, {}))
        if powers.get("tokens"):
            live[_key(powers)] += coefficient * (1 if kind == "+" else -1)
        moments.append((Counter(live), kind))
    before = {number for kind, number, _ in op if kind == "-"} - {number for kind, number, _ in op if kind == "+"}
    end = {key: round(value, 6) for key, value in live.items() if abs(value) > 1e-6}
    frees = sorted(_key(allocated[number][1]) for number in before if allocated.get(number, (0.0, {}))[1].get("tokens"))
    return {
        "end": end,
        "frees": frees,
        "peak": _maximal([moment for moment, _ in moments]),
        **{name: _maximal([m for m, kind in moments if kind == name]) for name in MARKS},
    }


def _key(powers: dict[str, int]) -> str:
    return "*".join(f"{name}^{power}" if power > 1 else name for name, power in sorted(powers.items()))


def _maximal(moments: list[Counter[str]]) -> list[dict[str, float]]:
    """The moments that no other one exceeds in every product."""
    unique = {json.dumps({k: round(v, 6) for k, v in sorted(m.items()) if v}) for m in moments}
    found = [json.loads(text) for text in sorted(unique)]

    def below(a: dict[str, float], b: dict[str, float]) -> bool:
        return a != b and all(a.get(key, 0) <= b.get(key, 0) for key in {*a, *b})

    return [a for a in found if not any(below(a, b) for b in found)]


def trace(family: str, dtype: torch.dtype) -> dict[str, Any]:
    table = {}
    for activations, names in (
        ("recompute", ("forward", "backward", "backward_first")),
        ("keep", ("graph", "backward_graph")),
    ):
        base, allocated = products(family, dtype, activations=activations)
        for name in names:
            table[name] = forms(base[OPS[name]], allocated)
    table["norm"] = norm_factors(a_norm(family, dtype), dtype)
    return table


def a_norm(family: str, dtype: torch.dtype) -> nn.Module:
    """An input norm of the family."""
    folder = make_folder(Path(tempfile.mkdtemp()) / "m", family)
    model = make_bench(folder, method="e2e", num_segments=1, dtype=dtype).model
    return next(m.inner for m in model.layers[0].modules() if isinstance(m, tiled.TokenTiled))


def main() -> None:
    nf4.CHUNK_BYTES = 1 << 30  # unpacking in one go, so that its loop does not change the order of allocations
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(FAMILIES), help="which (default: all)")
    parser.add_argument("--check", action="store_true", help="compare with the committed table, write nothing")
    arguments = parser.parse_args()
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    found = {}
    for family in arguments.families.split(","):
        found[family] = {str(dtype.itemsize): trace(family, dtype) for dtype in (torch.float32, torch.bfloat16)}
        print(
            family, {name: len(value["peak"]) for name, value in found[family]["4"].items() if "peak" in value}, flush=True
        )
    if arguments.check:
        raise SystemExit(any(table.get(family) != value for family, value in found.items()))
    TABLE.write_text(json.dumps(table | found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
