"""For trace_bytes.py: the cases that have a program of their own, and one traced step of a case.

The real executor runs transformers' layers with stand-ins (lopt_edge/tracing) over a plan whose segments are variants:
which linear layers have LoRA, and which one saves its input. So one step holds all that a case's programs are made from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import nn
from trace_shared import share_keys

from lopt_edge.plan.costs.layer_bytes import READS_INPUT
from lopt_edge.plan.costs.shape import HEADS, case_key
from lopt_edge.plan.facts.families import family_of
from lopt_edge.plan.facts.families.family import FULL, LINEAR, SLIDING, everywhere
from lopt_edge.plan.facts.layers import KEPT, OWN, SHARED
from lopt_edge.plan.facts.model import ModelFacts, facts_from_config
from lopt_edge.plan.schedule.build import step_plan
from lopt_edge.plan.schedule.effects import Kind
from lopt_edge.run.model.delta_net import DeltaCore
from lopt_edge.run.model.load import Model
from lopt_edge.run.model.placed import put_recurrence
from lopt_edge.run.tiers.moves import Mover
from lopt_edge.tracing.log import EventLog
from lopt_edge.tracing.stand_ins import (
    OpaqueDelta,
    OpaqueExperts,
    OpaqueLinear,
    OpaqueMLP,
    OpaqueNorm,
    OpaqueVocabulary,
    put_attention,
)
from lopt_edge.tracing.step import Trace, Variant, make_segments, observed
from quant.linear import DropoutClock
from tools.tiny_models import FAMILIES, tiny_config

# Families that may have a window, in SDPA with a mask, and those that may have layers of both kinds of attention.
WINDOWED = ("mistral", "ministral3", "phi3", "qwen2", "qwen3", "gemma3_text", "gemma4_text", "smollm3", "olmo3",
            "exaone4", "qwen3_moe", "mixtral")  # fmt: skip
VALUES_ARE_KEYS = ("gemma4_text",)  # in the layers without a window
LAYER_TYPES = tuple(name for name in FAMILIES if "layer_types" in family_of(name).asks)
DENSE, EXPERTS = "", " experts"  # words of a case: what stands behind the attention
BLOCKED = ("q_proj", "k_proj", "v_proj", "o_proj", "mlp")  # parts of a layer that train; the MLP is one
SHARED_PARTS = ("gate_proj", "up_proj", "down_proj", "shared_expert_gate")  # of an expert that all tokens go to
PARTS = dict.fromkeys(FAMILIES, BLOCKED) | {
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "glm4": (*BLOCKED[:4], "gate_up_proj", "down_proj"),
    "arcee": (*BLOCKED[:4], "up_proj", "down_proj"),
    "granitemoehybrid": (*BLOCKED[:4], "input_linear", "output_linear"),
    "qwen3_5_moe_text": (*BLOCKED[:4], *SHARED_PARTS),
}
OWN_PARTS = ("per_layer_input_gate", "per_layer_projection")  # of layers that are told of tokens anew
OWN_CASES = (" own", " own kept", " own kept back", " own shared", " own shared back")
DELTA_PARTS = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj", "mlp")


@dataclass(frozen=True)
class Case:
    """A case: what a program is a function of, beside the sizes and which linear layers have LoRA.

    `heads`: fewer heads of keys and values than of queries (grouped), one of them (single), or as many (equal), with k=v
    where the values are the keys; with own where the layer is told of tokens anew, and then kept or shared where layers
    share keys, with back where their gradients flow; or a layer with a delta rule in the place of attention (delta), or a
    chunk of such a rule (chunk, with its heads). Views of dimensions of size 1 save copies, so that one sequence is a case
    of its own.
    """

    family: str
    dtype: torch.dtype
    heads: str = "grouped"
    masked: bool = False  # the layer gets a mask
    one: bool = False  # sequence
    both: bool = False  # the model has full and sliding attention (only EMBED is traced)

    @property
    def has_experts(self) -> bool:
        """Whether the layer has experts."""
        return self.heads.endswith(EXPERTS) or (self.heads == "delta" and not has_dense(self.family))

    @property
    def has_own(self) -> bool:
        """Whether the layer is told of tokens anew."""
        return "own" in self.heads.split()

    @property
    def keys(self) -> str:
        """Whose keys it attends to, as LayerFacts has it."""
        return next((word for word in (KEPT, SHARED) if word in self.heads.split()), OWN)

    @property
    def gives_back(self) -> bool:
        """Whether gradients of shared keys flow in its backward."""
        return self.heads.endswith(" back")

    @property
    def kv_heads(self) -> str:
        """How many heads of keys there are: the first word of `heads`."""
        return self.heads.split()[0]

    @property
    def key(self) -> str:
        """The name of the case in plan/costs/layer_bytes.py."""
        return case_key(
            self.family, self.dtype.itemsize, "two kinds" if self.both else self.heads, masked=self.masked, one=self.one
        )


def cases(family: str) -> Iterator[Case]:
    """The cases of a family's layers."""
    yield from _attention_cases(family, DENSE if has_dense(family) else EXPERTS)
    if has_dense(family) and family_of(family).experts is not None:
        yield from _attention_cases(family, EXPERTS)
    for what in OWN_CASES if family_of(family).own_inputs else ():
        found = _attention_cases(family, what)
        yield from (case for case in found if not case.both and case.kv_heads != "equal")  # which no such model has
    if family in VALUES_ARE_KEYS:
        for dtype in (torch.float32, torch.bfloat16):
            for one in (False, True):
                yield Case(family, dtype, "grouped k=v", one=one)
    if LINEAR in family_of(family).layer_types:
        for dtype in (torch.float32, torch.bfloat16):
            for one in (False, True):
                yield Case(family, dtype, "delta", one=one)


def delta_cases(family: str) -> Iterator[Case]:
    """The cases of a chunk of a family's delta rule."""
    for dtype in (torch.float32, torch.bfloat16) if LINEAR in family_of(family).layer_types else ():
        for heads in ("grouped", "equal"):
            for one in (False, True):
                yield Case(family, dtype, f"chunk {heads}", one=one)


def has_dense(family: str) -> bool:
    """Whether a family has layers with an MLP (all layers but those with experts)."""
    experts = family_of(family).experts
    return experts is None or experts.lies_in is not everywhere


def tile_cases(family: str) -> Iterator[Case]:
    """The cases of a tile of an expert's tokens."""
    for dtype in (torch.float32, torch.bfloat16) if family_of(family).experts is not None else ():
        yield Case(family, dtype, "tile")


def _attention_cases(family: str, what: str) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for masked in (False, True) if family in WINDOWED else (False,):
            for one in (False, True):
                for heads in HEADS if masked else ("grouped",):  # without a mask attention takes them as they are
                    yield Case(family, dtype, f"{heads}{what}", masked, one)
                if family in LAYER_TYPES and (family in WINDOWED or family_of(family).attention != "sdpa"):
                    yield Case(family, dtype, masked=masked, one=one, both=True)


EVERYWHERE = Variant(
    1, frozenset(name for names in (*PARTS.values(), DELTA_PARTS, OWN_PARTS) for name in names), frozenset()
)


def variants(case: Case) -> dict[tuple[str, str], Variant]:
    """The variants by (what is traced, the one linear layer that saves its input, or "").

    `rest`: a layer whose input needs a gradient (the last of three). `first`: a segment's first layer, LoRA everywhere.
    `from X`: a segment's first layer, LoRA from X on. `only X`: on X alone (X reads the layer's input). `from X,Y`: on
    these of an expert that all tokens go to, whose parts do not lie in a row.
    """
    names = (*DELTA_PARTS[:-1], *PARTS[case.family][4:]) if case.heads == "delta" else PARTS[case.family]
    names = tuple(name for name in names if not (name == "mlp" and case.has_experts))
    names = tuple(name for name in names if not (name == "v_proj" and case.heads.endswith("k=v")))
    names = tuple(name for name in names if not (name in ("k_proj", "v_proj") and case.keys == SHARED))
    names = (*names, *OWN_PARTS) if case.has_own else names
    every, found = frozenset(names), {}
    if case.keys == SHARED and case.gives_back:  # the layer whose keys it reads lies before it in its segment
        for name in ("", *(name for name in names if name != "mlp")):
            found["rest", name] = Variant(3, every, frozenset({name} if name else ()))
        return found
    for name in ("", *(name for name in names if name != "mlp")):
        held = frozenset({name} if name else ())
        found["rest", name], found["first", name] = Variant(3, every, held), Variant(1, every, held)
    abreast = SHARED_PARTS if case.has_experts and SHARED_PARTS[-1] in names else ()
    for some in (some for n in range(len(abreast)) for some in combinations(abreast, n + 1)):
        found[f"from {','.join(some)}", ""] = Variant(1, frozenset(some), frozenset(some))
    for position, entry in enumerate(names):
        if entry in abreast:
            continue
        if entry in READS_INPUT:
            found[f"only {entry}", ""] = Variant(1, frozenset({entry}), frozenset({entry}))
            continue
        for name in ("", *(name for name in names[position + 1 :] if name != "mlp")):
            held = frozenset({entry, name} if name else {entry})
            found[f"from {entry}", name] = Variant(1, held, held)
    return found


def sizes_of(case: Case, primes: dict[str, int]) -> dict[str, int]:
    """The value of each letter."""
    group = 1 if case.kv_heads == "equal" else primes["group"]
    kv_heads = 1 if case.kv_heads == "single" else primes["k"]
    r, o = (1, primes["o of 1"]) if case.heads == "chunk equal" else (primes["r"], primes["o"])
    return {
        **primes,
        "f": primes["f"],
        "e": primes["e"] * (1 if family_of(case.family).rotary_share is None else 4),  # of which a part is rotated
        "r": r,
        "o": o,
        "j": primes["l"] * r,
        "c": primes["l"] * (2 * primes["m"] + r * o),
        "s": 1 if case.one else primes["s"],
        "k": kv_heads,
        "h": kv_heads * group,
        "q": kv_heads * (group + 2),
    }


def make_model(case: Case, sizes: dict[str, int], n_layers: int, log: EventLog) -> Model:
    """The model of transformers' layers with stand-ins in place of our modules."""
    from transformers import AutoModelForCausalLM

    window = 5 if case.masked else 1000
    kinds = ["sliding_attention", "full_attention"] if case.both else [_layer_type(case)]
    changes: dict[str, Any] = {"num_hidden_layers": n_layers, "vocab_size": 64, "sliding_window": window}
    if case.family in LAYER_TYPES:
        changes |= {"layer_types": (kinds * n_layers)[:n_layers], "use_sliding_window": True}
    if family_of(case.family).own_inputs:
        changes |= {"attention_k_eq_v": not case.has_own, "num_kv_shared_layers": 0}
        changes |= {"hidden_size_per_layer_input": sizes["w"] if case.has_own else 0}
    if case.family in VALUES_ARE_KEYS:
        wider = sizes["f" if case.both else "e"]
        changes |= {"global_head_dim": wider, "num_global_key_value_heads": sizes["k"]}
    if family_of(case.family).experts is not None and has_dense(case.family):
        changes |= {"mlp_only_layers": [] if case.has_experts else list(range(n_layers))}
    if case.family == "smollm3":
        changes["no_rope_layers"] = [1] * n_layers  # a layer without rotation takes less
    config = tiny_config(case.family, **changes)
    for name, letter in (
        ("hidden_size", "d"),
        ("num_attention_heads", "h"),
        ("num_key_value_heads", "k"),
        ("head_dim", "e"),
        ("intermediate_size", "i"),
        ("shared_intermediate_size", "i"),
        ("shared_expert_intermediate_size", "i"),
        *DELTA_SIZES,
        *(EXPERT_SIZES if case.has_experts else ()),
    ):
        setattr(config, name, sizes[letter])  # transformers would refuse such sizes in a config's making
    if family_of(case.family).rotary_share is not None:
        config.rope_parameters["partial_rotary_factor"] = (sizes["z"] + 0.5) / sizes["e"]  # transformers rounds down
    tiled = family_of(case.family).attention == "query tiles"
    config._attn_implementation = put_attention(log, tiled=tiled)
    facts = facts_from_config(config.to_dict(), where="trace")
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM._model_mapping[type(config)](config).eval().model
    layers = list(skeleton.layers)
    if case.keys != OWN:
        facts = share_keys(case, facts, layers)
    for index, layer in enumerate(layers):
        _put_stand_ins(layer, facts, index, log)
        for name, parameter in layer.named_parameters():
            if parameter.is_meta:  # of a router
                owner, _, leaf = name.rpartition(".")
                ones = torch.ones(parameter.shape, dtype=case.dtype)
                setattr(layer.get_submodule(owner), leaf, nn.Parameter(ones, requires_grad=False))
        for name, buffer in layer.named_buffers():
            if buffer.is_meta:  # numbers of a layer that a checkpoint has
                layer.register_buffer(name, torch.ones(buffer.shape, dtype=case.dtype))
    skeleton.norm.weight = nn.Parameter(torch.ones(sizes["d"], dtype=case.dtype), requires_grad=False)
    vocabulary: Any = OpaqueVocabulary(sizes["v"], sizes["d"], case.dtype, log)
    return Model(
        facts,
        config,
        layers,
        skeleton.norm,
        type(skeleton.rotary_emb)(config=config),
        vocabulary,
        vocabulary,
        torch.device("cpu"),
        case.dtype,
        DropoutClock(),
        Mover(torch.device("cpu")),
    )


EXPERT_SIZES = (
    ("num_experts", "y"),
    ("num_local_experts", "y"),
    ("num_experts_per_tok", "p"),
)  # in a config, and their letters
# Sizes of a delta rule in a config, and their letters; the other families ignore them.
DELTA_SIZES = (("linear_num_key_heads", "l"), ("linear_num_value_heads", "j"), ("linear_key_head_dim", "m"),
               ("linear_value_head_dim", "o"))  # fmt: skip


def _layer_type(case: Case) -> str:
    if case.heads == "delta":
        return LINEAR
    if case.heads.endswith("k=v"):
        return FULL
    return FULL if LINEAR in family_of(case.family).layer_types else SLIDING


def _put_stand_ins(layer: nn.Module, facts: ModelFacts, index: int, log: EventLog) -> None:
    recomputed_whole, kind = facts.family.post_norm, facts.layer(index)
    linears = kind.linears
    for linear in linears:
        opaque = OpaqueLinear(linear.short_name, linear.in_features, linear.out_features, log)
        opaque.last = linear.name == kind.last_module and not recomputed_whole
        layer.set_submodule(linear.name, opaque)
    if kind.delta is not None:
        put_recurrence(layer, kind)
        core = next(name for name, module in layer.named_modules() if isinstance(module, DeltaCore))
        layer.set_submodule(core, OpaqueDelta(log))
    if kind.experts is not None:
        layer.set_submodule(kind.last_module, OpaqueExperts(log))
    elif hasattr(getattr(layer, "mlp", None), "gate_proj"):
        layer.mlp = OpaqueMLP(layer.mlp.down_proj, log)
    for name, module in list(layer.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            layer.set_submodule(name, OpaqueNorm(log))


def run(case: Case, sizes: dict[str, int]) -> Trace:
    """The trace of one step over all variants, each a segment, and a segment with a local loss."""
    wanted = [] if case.both else list(variants(case).values())
    segments = make_segments([*(variant.n_layers for variant in wanted), 1, 1])
    log = EventLog()
    model = make_model(case, sizes, segments[-1].last + 1, log)
    for variant, segment in zip([*wanted, *[EVERYWHERE] * 2], segments, strict=True):
        for layer in segment.layers:
            for module in model.layers[layer].modules():
                if isinstance(module, OpaqueLinear | OpaqueMLP):
                    module.trains, module.holds = module.name in variant.trains, module.name in variant.holds
    plan = step_plan("lopt", segments, n_micro_batches=1)
    ops = plan.ops[:1] if case.both else tuple(op for op in plan.ops if op.kind is not Kind.STEP)
    return observed(model, replace(plan, ops=ops), sizes, log)
