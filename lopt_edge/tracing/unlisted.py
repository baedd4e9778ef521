"""What the layers of a family without a record take: traced once on the user's machine, and kept in the cache.

The listed families' programs are products of sizes, found with sizes that are primes (tools/trace_bytes.py), since a table
must hold for every model of a family. Here one model is at hand. So its layers are traced at their own sizes, with
stand-ins that compute nothing, for a few numbers of sequences and tokens; and each allocation must be one product of those
numbers in all of them. The programs read as the table's do, and plan/costs/programs.py replays both. Which linear layers
have LoRA is the run's choice, known here: a table is of one dtype and one choice.

The rule: what does not fit one product in all traces (a layer that works in chunks of tokens) is refused, never guessed.
Tables hold for the versions of this program, torch and transformers that traced them (models/unlisted.py names the folder).
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lopt_edge.errors import InputError
from lopt_edge.models.unlisted import config_of
from lopt_edge.plan.costs.shape import case_key, table_file
from lopt_edge.plan.facts.families.family import SLIDING
from lopt_edge.plan.facts.layers import ExpertFacts
from lopt_edge.plan.facts.model import ModelFacts
from lopt_edge.plan.schedule.build import step_plan
from lopt_edge.plan.schedule.effects import Kind
from lopt_edge.run.model import tiled
from lopt_edge.run.model.classes import skeleton_of
from lopt_edge.run.model.load import Model
from lopt_edge.run.model.mamba import MambaNet
from lopt_edge.run.model.own_body import compute_buffers, make_body
from lopt_edge.run.model.placed import put_recurrence, tiles_norm
from lopt_edge.run.tiers.moves import Mover
from lopt_edge.tracing.fit import fitted
from lopt_edge.tracing.log import EventLog
from lopt_edge.tracing.logs import log_of, merged
from lopt_edge.tracing.stand_ins import (
    OpaqueExperts,
    OpaqueLinear,
    OpaqueMamba,
    OpaqueMLP,
    OpaqueNorm,
    OpaqueVocabulary,
    put_attention,
)
from lopt_edge.tracing.step import Trace, Variant, make_segments, observed
from lopt_edge.tracing.tiles import traced_chunk, traced_tile
from quant.experts import Expert, Gate
from quant.linear import DropoutClock
from quant.sizes import DELTA_CHUNK as CHUNK

CPU = torch.device("cpu")
# Sequences (or one), tokens, one more than tokens, rows with a loss, rows of a vocabulary chunk: of three traces, and of
# one as long as shows whether a layer works in chunks of tokens (of 256 and less).
SIZES = tuple(
    dict(zip("stunv", each, strict=True))
    for each in ((2, 13, 14, 7, 11), (3, 17, 18, 9, 19), (5, 22, 23, 12, 29), (2, 293, 294, 31, 37))
)
LETTERS = "stunvx"  # x: tokens, and those before that a convolution sees
GRAPHS = ("graph", "backward")  # the ops of layers that train
WINDOW, NO_WINDOW = 5, 10_000
MAMBA_OPS = ("mamba_forward", "mamba_backward")


@dataclass(frozen=True)
class Case:
    """A case: a kind of layer, in the compute dtype, with the linear layers that train. `masked`: sequences are as long as
    the window. `one`: there is one sequence."""

    kind: int
    dtype: torch.dtype
    targets: tuple[str, ...]
    masked: bool
    one: bool


def ensure_table(facts: ModelFacts, *, itemsize: int, targets: tuple[str, ...], where: str) -> None:
    """Trace the programs of a family without a record, unless they are there. Raises InputError for what cannot be."""
    own = facts.family.unlisted
    assert own is not None
    path = Path(table_file(own.table, itemsize, targets))
    if path.exists():
        return
    dtype = torch.float32 if itemsize == 4 else torch.bfloat16
    trains = targets or facts.linear_names
    found: dict[str, dict[str, str]] = {}
    try:
        for case in _cases(facts, dtype, trains):
            key = case_key(facts.family.name, itemsize, f"kind{case.kind}", masked=case.masked, one=case.one)
            found[key] = _programs(facts, case)
        found[case_key(facts.family.name, itemsize)] = _norm_programs(facts, dtype)
        if (experts := next((kind.experts for kind in facts.kinds if kind.experts is not None), None)) is not None:
            found[case_key(facts.family.name, itemsize, "tile")] = _tile_programs(facts, experts, dtype)
        for one in (False, True) if any(kind.mamba is not None for kind in facts.kinds) else ():
            found[case_key(facts.family.name, itemsize, "mamba", one=one)] = _mamba_programs(facts, dtype, one=one)
    except Exception as error:  # of any kind, from layers that are not ours
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        what = f"what the layers of {facts.family.name!r} take cannot be planned ({reason})"
        raise InputError(what, where=where, fix="use a model of a supported family (lopt-edge models)") from error
    if targets:
        _write(path, found)
    # a layer without LoRA has no graph, and its forward is that of one with LoRA, whose marks then mean nothing
    without = {key: {op: text for op, text in ops.items() if not op.startswith(GRAPHS)} for key, ops in found.items()}
    _write(Path(table_file(own.table, itemsize, ())), without)


def _write(path: Path, found: dict[str, dict[str, str]]) -> None:
    """Write a table in the form of the one of all families; it appears whole."""
    texts: dict[str, int] = {}
    cases = {key: {op: texts.setdefault(text, len(texts)) for op, text in ops.items()} for key, ops in found.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}")
    beside.write_text(json.dumps({"cases": cases, "programs": list(texts)}, indent=1), encoding="utf-8")
    beside.replace(path)


def _cases(facts: ModelFacts, dtype: torch.dtype, targets: tuple[str, ...]) -> Iterator[Case]:
    slides = SLIDING in facts.layer_types
    for kind in range(len(facts.kinds)):
        for masked in (False, True) if slides else (False,):
            for one in (False, True):
                yield Case(kind, dtype, targets, masked, one)


def _programs(facts: ModelFacts, case: Case) -> dict[str, str]:
    """The programs of a case by op."""
    own = facts.family.unlisted
    assert own is not None
    every = [{**sizes, "s": 1 if case.one else sizes["s"], "x": sizes["t"] + own.n_before} for sizes in SIZES]
    traces = [_texts(facts, case, sizes) for sizes in every]
    letters = LETTERS.replace("s", "") if case.one else LETTERS
    letters = letters.replace("x", "") if own.n_before in (0, 1) else letters
    return {op: fitted([texts[op] for texts in traces], every, letters, what=op) for op in traces[0]}


def _texts(facts: ModelFacts, case: Case, sizes: dict[str, int]) -> dict[str, str]:
    """The programs of one trace, with numbers where products will be."""
    trains = frozenset(case.targets)
    wanted = {"rest": Variant(3, trains, trains), "first": Variant(1, trains, trains)}
    last = Variant(1, trains, frozenset())
    segments = make_segments([*(variant.n_layers for variant in wanted.values()), 1, 1])
    log = EventLog()
    model = _model(facts, case, sizes, segments[-1].last + 1, log)
    for variant, segment in zip([*wanted.values(), last, last], segments, strict=True):
        for layer in segment.layers:
            for module in model.layers[layer].modules():
                if isinstance(module, OpaqueLinear):
                    module.trains = module.holds = module.name in variant.trains
                elif isinstance(module, OpaqueMLP):
                    module.trains = bool(variant.trains & {"gate_proj", "up_proj", "down_proj"})
    plan = step_plan("lopt", segments, n_micro_batches=1)
    plan = replace(plan, ops=tuple(op for op in plan.ops if op.kind is not Kind.STEP))
    trace = observed(model, plan, {**sizes, "d": facts.hidden_size, "w": 1, "k": 1, "e": 1}, log)
    made = {"embed": _alone(trace, "EMBED mb=0"), "forward": _alone(trace, "FORWARD 0 mb=0 keep=input")}
    for name, segment in zip(wanted, segments, strict=False):
        numbers: dict[int, str] = {}
        graph = log_of(trace, f"FORWARD {segment.last} mb=0 keep=graph", str, numbers=numbers)
        backward = log_of(trace, f"BACKWARD {segment.last} mb=0", str, numbers=numbers)
        suffix = "" if name == "rest" else " first"
        made[f"graph{suffix}"] = merged({"": graph}, before=False)
        made[f"backward{suffix}"] = merged({"": backward}, before=True)
    for name, segment in (("task loss", segments[0]), ("reconstruct loss", segments[-2])):
        made[name] = _alone(trace, f"LOSS {segment.index} mb=0")
    return made


def _alone(trace: Trace, op: str) -> str:
    return merged({"": log_of(trace, op, str, numbers={})}, before=False)


def _model(facts: ModelFacts, case: Case, sizes: dict[str, int], n_layers: int, log: EventLog) -> Model:
    """A model of `n_layers` layers of the case's kind, at their own sizes, with stand-ins in the place of our modules."""
    own = facts.family.unlisted
    assert own is not None
    config = config_of(own.config, where="trace")
    if facts.sliding_window is not None:
        config.sliding_window = WINDOW if case.masked else NO_WINDOW
    whole = skeleton_of(config, own.attention or put_attention(log, tiled=False))
    compute_buffers(whole, device=CPU)
    body, layers, norm = make_body(whole, facts.layout, n_results=own.n_results)
    # of its kind the layer that has a window, if there is one: where sequences are longer, it has a mask
    alike = [index for index in range(facts.n_layers) if facts.kind_of_layer[index] == case.kind]
    index = min(alike, key=lambda i: (facts.layer_types[i] == SLIDING) != case.masked)
    body.of_layer = (index,) * n_layers
    copies = [copy.deepcopy(layers[index]) for _ in range(n_layers)]
    for layer in copies:
        _put_stand_ins(layer, facts, case, norm, log)
    for module in (*copies, body.decoder, norm):
        _fill(module, case.dtype)
    kinds = {"kinds": (facts.kinds[case.kind],), "kind_of_layer": (0,) * n_layers, "n_layers": n_layers}
    traced = replace(facts, **kinds, layer_types=(facts.layer_types[index],) * n_layers)  # type: ignore[arg-type]
    vocabulary: Any = OpaqueVocabulary(sizes["v"], facts.hidden_size, case.dtype, log)
    clock, mover = DropoutClock(), Mover(CPU)
    return Model(
        traced, config, copies, norm, nn.Identity(), vocabulary, vocabulary, CPU, case.dtype, clock, mover, body=body
    )


def _tile_programs(facts: ModelFacts, experts: ExpertFacts, dtype: torch.dtype) -> dict[str, str]:
    """The programs of a tile of an expert's tokens (quant/experts.py), values and gradient."""
    own = facts.family.unlisted
    assert own is not None
    whole = skeleton_of(config_of(own.config, where="trace"), "eager")
    gate = next(module._apply_gate for module in whole.modules() if hasattr(module, "_apply_gate"))
    gate_up, down = torch.zeros(2 * experts.inner, experts.hidden), torch.zeros(experts.hidden, experts.inner)
    expert = Expert(gate_up.to(dtype), down.to(dtype))
    full = experts.full_weights
    traces = [traced_tile(cast(Gate, gate), expert, n_rows=sizes["n"], full_weights=full) for sizes in SIZES]
    texts = [{op: _alone(trace, op) for op in trace.spans} for trace in traces]
    return {op: fitted([text[op] for text in texts], list(SIZES), "n", what=op) for op in texts[0]}


def _mamba_programs(facts: ModelFacts, dtype: torch.dtype, *, one: bool) -> dict[str, str]:
    """The programs of a chunk of a state space, values and gradient."""
    own = facts.family.unlisted
    assert own is not None
    layer = next(index for index in range(facts.n_layers) if facts.layer(index).mamba is not None)
    linear, mamba = facts.layer(layer).linears, facts.layer(layer).mamba
    assert mamba is not None
    whole = skeleton_of(config_of(own.config, where="trace"), "eager")
    compute_buffers(whole, device=CPU)
    net = whole.get_submodule(f"{facts.layout.decoder}.{facts.layout.stack}.{layer}.{mamba.module}".removeprefix("."))
    core = MambaNet(net).core
    _fill(core, dtype)
    width = next(each.out_features for each in linear if each.name == f"{mamba.module}.in_proj")
    sizes = [{"s": 1 if one else each["s"]} for each in (SIZES[:1] if one else SIZES[:3])]
    traces = [traced_chunk(core, (torch.zeros(each["s"], CHUNK, width, dtype=dtype),), MAMBA_OPS) for each in sizes]
    texts = [{op: _alone(trace, op) for op in trace.spans} for trace in traces]
    return {op: fitted([text[op] for text in texts], sizes, "" if one else "s", what=op) for op in MAMBA_OPS}


def _put_stand_ins(layer: nn.Module, facts: ModelFacts, case: Case, norm: nn.Module, log: EventLog) -> None:
    own = facts.family.unlisted
    for linear in facts.kinds[case.kind].linears:
        layer.set_submodule(linear.name, OpaqueLinear(linear.short_name, linear.in_features, linear.out_features, log))
    if (mamba := facts.kinds[case.kind].mamba) is not None:
        put_recurrence(layer, facts.kinds[case.kind])
        layer.set_submodule(f"{mamba.module}.core", OpaqueMamba(mamba.n_heads * mamba.head_dim, log))
    if (experts := facts.kinds[case.kind].experts) is not None:
        layer.set_submodule(f"{experts.module}.experts", OpaqueExperts(log))
    if own is not None and own.gated_mlp and facts.hidden_size % 64 == 0 and facts.kinds[case.kind].inner % 64 == 0:
        layer.mlp = OpaqueMLP(layer.get_submodule("mlp.down_proj"), log)
    for name, module in list(layer.named_modules()):
        if tiles_norm(module, facts, like=norm):
            layer.set_submodule(name, OpaqueNorm(log))


def _fill(module: nn.Module, dtype: torch.dtype) -> None:
    """Put ones in the place of all that has no numbers yet."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if not tensor.is_meta:
            continue
        owner, _, leaf = name.rpartition(".")
        ones = torch.ones(tensor.shape, dtype=dtype)
        is_parameter = isinstance(tensor, nn.Parameter)
        setattr(module.get_submodule(owner), leaf, nn.Parameter(ones, requires_grad=False) if is_parameter else ones)


def _norm_programs(facts: ModelFacts, dtype: torch.dtype) -> dict[str, str]:
    """The programs of a tile of a norm (run/model/tiled.py), values and gradient."""
    own = facts.family.unlisted
    assert own is not None
    whole = skeleton_of(config_of(own.config, where="trace"), "eager")
    inner = whole.get_submodule(f"{facts.layout.decoder}.{facts.layout.last}".removeprefix("."))
    _fill(inner, dtype)
    traces = []
    for sizes in SIZES:
        x, g = (torch.ones(sizes["n"], facts.hidden_size, dtype=dtype) for _ in range(2))
        trace, log = Trace(given={"norm_forward": {}, "norm_backward": {}}), EventLog()
        trace.result = dict.fromkeys(trace.given, -1)
        with log:
            log.watch([x, g, *inner.parameters()])
            log.events.clear()
            with torch.no_grad():
                inner(x)
            trace.spans["norm_forward"] = list(log.events)
            log.events.clear()
            _ignored: Tensor = tiled._tile_gradient(inner, x, g)
            del _ignored
            trace.spans["norm_backward"] = list(log.events)
        traces.append({op: _alone(trace, op) for op in trace.spans})
    return {op: fitted([texts[op] for texts in traces], list(SIZES), "n", what=op) for op in traces[0]}
