"""The traced programs: how their text is read, what a replay does with each token, and that the whole table is sound.

That the table's programs are those of transformers' layers is the tool's own test (tests/tools/test_trace_bytes.py); that
the bytes are a run's, law 6 (tests/laws/test_timeline.py).
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lopt_edge.plan.costs import module_bytes, programs
from lopt_edge.plan.costs.layer_bytes import LayerRun, backward_within, graph_bytes
from lopt_edge.plan.costs.module_bytes import Heap
from lopt_edge.plan.costs.programs import Replay, Token, program
from lopt_edge.plan.costs.shape import HEADS, LayerShape, Vocabularies, case_key, more_general
from lopt_edge.plan.facts.device_kinds import CPU
from lopt_edge.plan.facts.families import FAMILIES as RECORDS
from lopt_edge.plan.facts.families.family import LINEAR
from lopt_edge.plan.facts.layers import OWN, SHARED
from lopt_edge.plan.facts.model import facts_from_config
from lopt_edge.run.model.tiled import TokenTiled
from lopt_edge.run.watch.tracker import MemoryTracker
from tools.tiny_models import FAMILIES, GEMMA4_E, tiny_config

SIZES = {"s": 2, "t": 5, "u": 6, "d": 64, "h": 4, "k": 2, "q": 8, "e": 32, "i": 192, "n": 7, "v": 11}
EVERY_OP = ("embed", "forward", "graph", "graph first", "backward", "backward first", "task loss", "reconstruct loss")


def make_shape(family: str = "llama", **changes: Any) -> LayerShape:
    facts = facts_from_config(tiny_config(family, hidden_size=64, intermediate_size=192).to_dict(), where="here")
    return LayerShape(**{"facts": facts, "itemsize": 4, "rank": 4, "targets": (), **changes})


@pytest.fixture
def replayed(monkeypatch):
    """(program text, shape, how to run it) -> the replay."""

    def replay(text: str, shape: LayerShape | None = None, *, alive: dict[str, int] | None = None, **how: bool) -> Replay:
        program.cache_clear()
        monkeypatch.setattr(programs, "_table", lambda path: {"cases": {"case": {"op": 0}}, "programs": [text]})
        found = Replay(shape or make_shape(), SIZES)
        for name, n_bytes in (alive or {}).items():
            found.alive[name] = found.heap.take(n_bytes)
        found.run("case", "op", **how)
        return found

    yield replay
    program.cache_clear()


def test_the_text_form():
    assert programs._token("+4std") == Token("+", product=(4.0, "std"))
    assert programs._token("~+0.5d") == Token("+", product=(0.5, "d"), value=True)
    assert programs._token("-g3?q_proj,k_proj") == Token("-", "g3", unless=frozenset({"q_proj", "k_proj"}))
    assert programs._token("!unpack:o_proj") == Token("!", "unpack:o_proj")
    assert programs._token("!norm_forward:1st:1d") == Token("!", "norm_forward", arguments=((1.0, "st"), (1.0, "d")))
    assert programs._token("~!mlp_forward") == Token("!", "mlp_forward", value=True)
    assert programs._token("=30") == Token("=", "30")


def test_allocations_and_releases_in_order(replayed):
    found = replayed("+4st +8d -0 +1s -1 =2")
    assert (found.heap.live, found.heap.peak) == (2, 40 + 512)
    assert (found.alive, found.result) == ({"2": 2}, "2")


def test_lora_delays_a_release(replayed):
    text = "+4d -0?q_proj,mlp +2d"
    assert replayed(text).alive == {"1": 128}
    assert replayed(text, make_shape(targets=("v_proj",))).alive == {"1": 128}
    assert replayed(text, make_shape(targets=("q_proj",))).alive == {"0": 256, "1": 128}
    assert replayed(text, make_shape(targets=("up_proj",))).alive == {"0": 256, "1": 128}, "one of the MLP's is the MLP's"


def test_an_output_that_nobody_reads_takes_nothing(replayed):
    text = "~!lora:q_proj +4d ~+8d -0 =1"
    assert replayed(text).alive == {"1": 512}
    found = replayed(text, make_shape(targets=("q_proj",)), value=False)
    assert found.alive == {"1": 0}
    assert found.heap.peak == 256


def test_pages_stay_until_the_backward_ends(replayed):
    text, before = "+4 -g1 -input -grad -0", {"g1": 100, "input": 10, "grad": 1}
    assert replayed(text, alive=before).alive == {}
    assert replayed(text, alive=before, paged=True).alive == {"g1": 100, "input": 10}


def test_the_forwards_names_do_not_meet_the_backwards(replayed):
    found = replayed("+4d +8d -0")
    found.alive["input"] = found.heap.take(1)
    found.end_forward()
    assert found.alive == {"g1": 512, "input": 1}


@pytest.mark.parametrize("after", ["+4std -0 -g1 +4 -1 -2", "-0 -g1 +4 -1"])
def test_a_plain_mlp_lets_go_of_a_gradient_that_only_it_was_given(replayed, monkeypatch, after):
    given = []
    monkeypatch.setattr(module_bytes, "plain_mlp_backward", lambda *_, **how: given.append(how["given"]))
    shape = make_shape(targets=("up_proj",), dropout=True)
    replayed(f"+8d !mlp_backward {after}", shape, alive={"g1": 1000})
    replayed(f"+8d !mlp_backward {after.replace('-0 ', '')} -0", shape, alive={"g1": 1000})
    assert given == [512, 0]


def test_keys_and_those_more_general():
    assert case_key("llama", 4, "grouped", masked=True, one=True) == "llama 4 grouped masked one"
    assert case_key("llama", 2, "two kinds") == "llama 2 two kinds"
    assert case_key("llama", 2) == "llama 2"
    assert more_general("x 4 single masked one") == ["x 4 single masked", "x 4 grouped masked one", "x 4 grouped masked"]
    assert more_general("x 4 equal") == ["x 4 grouped"]
    assert more_general("x 4 grouped") == []


def test_a_case_without_programs_takes_the_nearest(monkeypatch):
    cases = {"x 4 single masked": {"op": 0}, "x 4 grouped masked": {"op": 1}, "x 4 grouped masked one": {"op": 2}}
    monkeypatch.setattr(programs, "_table", lambda path: {"cases": cases, "programs": ["+1", "+2", "+3"]})
    program.cache_clear()

    def first(case: str) -> float:
        return program(case, "op")[0].product[0]

    assert first("x 4 single masked one") == 1
    assert first("x 4 equal masked one") == 3
    assert first("x 4 equal masked") == 2
    program.cache_clear()


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_case_has_sound_programs(family):
    """For both dtypes, heads of every kind, one sequence or several, with a mask and without."""
    found = {key for key in programs._table("")["cases"] if key.split()[0] == family}
    masks = {"masked" in key for key in found if len(key.split()) > 2}
    assert masks
    for itemsize, heads, masked, one in product((4, 2), HEADS, masks, (False, True)):
        shape = make_shape(family, itemsize=itemsize, targets=()).with_attention
        for kind in range(len(shape.facts.kinds)) if RECORDS[family].experts else [shape.layer_kind]:
            of_kind = shape.of_kind(kind)
            if of_kind.layer.delta is not None:
                continue
            experts = of_kind.layer.experts is not None
            key = case_key(family, itemsize, f"{heads} experts" if experts else heads, masked=masked, one=one)
            gated = any(linear.short_name == "gate_proj" for linear in of_kind.linears)
            own = [from_mlp(of_kind)] if gated else []
            for op in [*EVERY_OP, "backward from o_proj", *own]:
                check_program(of_kind, key, op)


@pytest.mark.parametrize("family", [name for name, record in RECORDS.items() if LINEAR in record.layer_types])
def test_a_delta_rule_has_sound_programs(family):
    for itemsize, one in product((4, 2), (False, True)):
        shape = make_shape(family, itemsize=itemsize, targets=())
        assert shape.layer.delta is not None
        for op in [*EVERY_OP, "backward from out_proj", from_mlp(shape)]:
            check_program(shape, case_key(family, itemsize, "delta", one=one), op)


def from_mlp(shape: LayerShape) -> str:
    """The backward as far as an MLP, or as the parts of an expert that all tokens go to, which do not lie in a row."""
    return "backward from mlp" if shape.layer.experts is None else "backward from gate_proj,up_proj"


def test_programs_of_layers_that_share_keys_are_sound():
    facts = facts_from_config(tiny_config("gemma4_text", **GEMMA4_E).to_dict(), where="here")
    for kind, itemsize, masked, one in product(range(len(facts.kinds)), (4, 2), (False, True), (False, True)):
        shape = LayerShape(facts, itemsize, 4, (), layer_kind=kind)
        for back in (False, True) if shape.layer.keys != OWN else (False,):
            case = shape.case(1 if one else 2, masked=masked, gives_back=back)
            never_first = shape.layer.keys == SHARED and back
            for op in (
                ("graph", "backward", "forward") if never_first else [*EVERY_OP, "backward from per_layer_projection"]
            ):
                check_program(shape, case, op)


def check_program(shape: LayerShape, case: str, op: str) -> None:
    """Releases are of what is alive, each but once; what a forward leaves has an output."""
    tokens = program(case, op)
    n_allocated = sum(token.kind == "+" for token in tokens)
    released = [token.name for token in tokens if token.kind == "-" and not token.unless]
    assert len(released) == len(set(released)), (case, op)
    assert all(int(name) < n_allocated for name in released if name.isdigit())
    replay = Replay(shape, shape.dimensions(n_sequences=2, n_tokens=50) | SIZES, stored=Vocabularies(4))
    for name in {token.name for token in tokens if token.kind == "-" and not token.name.isdigit()}:
        replay.alive[name] = replay.heap.take(1)
    replay.run(case, op)
    assert replay.heap.peak >= replay.heap.live == sum(replay.alive.values())
    assert replay.result in replay.alive or op.startswith("backward")
    assert not [name for name in replay.alive if name.startswith("g")], "the graph is gone after its backward"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_norm_takes_what_its_tile_takes(family, dtype):
    """On both sides of a tile (run/model/tiled.py); its result and x are the program's around it."""
    norm = TokenTiled(norm_of(family, dtype))
    tile = CPU.norm_tile_bytes // (64 * dtype.itemsize)
    replay = Replay(make_shape(family, itemsize=dtype.itemsize), SIZES)
    for n_rows in (10, tile + 1):
        x, g, tracker = (
            torch.randn(n_rows, 64).to(dtype).requires_grad_(),
            torch.randn(n_rows, 64).to(dtype),
            MemoryTracker(),
        )
        with tracker:
            tracker.watch([x, g, norm.weight])
            found = []
            for name in ("norm_forward", "norm_backward"):
                before = tracker.live_bytes
                tracker.start_peak()
                if name == "norm_forward":
                    y = norm(x)
                else:
                    torch.autograd.grad(y, x, g)
                found.append(tracker.peak_bytes - before - x.nbytes)
        for name, inside in zip(("norm_forward", "norm_backward"), found, strict=True):
            replay.heap = Heap()
            replay.norm(name, n_rows, 64)
            assert replay.heap.peak == inside, (name, n_rows)
            assert replay.heap.live == 0


def norm_of(family: str, dtype: torch.dtype) -> torch.nn.Module:
    norm = AutoModelForCausalLM.from_config(tiny_config(family, hidden_size=64)).model.norm
    return norm.to(dtype).requires_grad_(False)


# what a layer's replay says ---------------------------------------------------------------------------------------------


def make_run(targets: tuple[str, ...], *, family: str = "llama", first: bool = False, **changes: Any) -> LayerRun:
    shape = make_shape(family, targets=targets, **changes)
    return LayerRun(shape, 1, 50, masked=shape.masked("full_attention", 50), first=first)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_graph_grows_with_lora(family):
    names = make_shape(family).facts.linear_names
    run = make_run((), family=family)
    held = [graph_bytes(make_run(names[:n], family=family)) for n in range(len(names) + 1)]
    bytes_held = [graph.rest + run.hidden_bytes * graph.holds_input for graph in held]
    assert bytes_held == sorted(bytes_held)
    assert bytes_held[0] < bytes_held[-1]


def test_a_first_layers_backward_takes_less():
    """Its input is frozen; the later the first linear layer with LoRA, the less its graph holds."""
    every = make_shape().facts.linear_names
    entries = [every, ("o_proj",), ("down_proj",)]
    rests = [graph_bytes(make_run(targets, first=True)).rest for targets in entries]
    assert rests == sorted(rests, reverse=True) and len(set(rests)) == 3
    for targets in entries:
        plain, first = (backward_within(make_run(targets, first=first), "input", 0) for first in (False, True))
        assert first < plain, targets
    assert [make_run(t, first=True).backward_op for t in (*entries, ())] == [
        "backward first",
        "backward from o_proj",
        "backward from mlp",
        "backward",
    ]
    assert make_run(("down_proj",), family="phi3", first=True).backward_op == "backward from down_proj"


def test_recomputation_includes_its_forward_and_paging_holds_to_the_end():
    run = make_run(make_shape().facts.linear_names)
    graph = graph_bytes(run)
    kept, paged, recomputed = (backward_within(run, how, 0) for how in ("graph", "pages", "input"))
    assert kept <= paged < recomputed
    assert recomputed <= kept + graph.rest + graph.within
    assert backward_within(run, "graph", 1000) == kept + 1000


@pytest.mark.parametrize("family", ["llama", "qwen3", "smollm3"])
def test_fused_attention_on_a_gpu_takes_its_workspace(family):
    """With many heads in a narrow model attention sets the peak, and its backward is counted: flash's less than the
    memory-efficient kernel's, which a card without bfloat16 units runs; none where torch chooses (the CPU)."""
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    facts = facts_from_config(tiny_config(family, **heads).to_dict(), where="here")

    def backward(**changes: Any) -> int:
        shape = LayerShape(facts, 2, 4, facts.linear_names, **changes)
        return backward_within(LayerRun(shape, 1, 2000, masked=False, first=False), "input", 0)

    on_cpu, flash, efficient = backward(), backward(device_type="cuda"), backward(device_type="cuda", has_flash=False)
    assert efficient > flash >= on_cpu + 4 * 2000 * 32 * 128, "dq of all heads in fp32 is a part of it"
