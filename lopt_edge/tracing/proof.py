"""The proof that a family without a record runs here as it does in transformers: on a tiny random model of its config.

Tried are, against transformers' own model with the same weights, unpacked: the logits, of sequences shorter and longer than
a window; the gradients of LoRA on every linear layer, through the executor, against one graph of autograd; that no token
sees a later one; and that what layers are called with does not depend on the hidden states (a step may begin at a later
layer). The rule: a model that has not passed does not train, and the message says what differed. A proof that passed is
kept beside the traced programs (models/unlisted.py names the folder), for the versions that it was made with.

It needs seconds and a few MB. Not proved: generation with a cache.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lopt_edge.data import MicroBatch
from lopt_edge.errors import InputError
from lopt_edge.models.skeleton import layers_to_show
from lopt_edge.models.tiny import VOCABULARY, random_model, smaller
from lopt_edge.models.unlisted import config_of, read_facts
from lopt_edge.plan.facts.model import ModelFacts
from lopt_edge.plan.schedule.build import step_plan
from lopt_edge.plan.schedule.effects import Kind
from lopt_edge.plan.schedule.ops import GroupName
from lopt_edge.plan.schedule.segments import Segment
from lopt_edge.run.model.load import Model, load_model
from lopt_edge.run.model.lora import attach_adapters, layer_parameters
from lopt_edge.run.step.batches import make_batch
from lopt_edge.run.step.executor import Executor
from lopt_edge.run.step.losses import logits
from lopt_edge.run.step.optim import SegmentOptimizer
from quant.experts import PackedExperts
from quant.linear import PackedLinear

CPU, BOUND = torch.device("cpu"), 2e-4  # relative, of fp32 in another order of operations
LENGTHS, RANK, ALPHA = (6, 21), 4, 8
IN_CHUNKS = 150  # tokens: three chunks of a state space
MOST_LAYERS = 24  # of a tiny model that shows each kind


class Differs(Exception):
    """What differed in a proof, as a sentence."""


def ensure_proved(facts: ModelFacts, *, where: str) -> bool:
    """Prove that the model runs here, unless that was done; returns whether it was done now. Raises InputError."""
    own = facts.family.unlisted
    assert own is not None
    path = Path(own.table) / "proof.json"
    if path.exists():
        return False
    try:
        with tempfile.TemporaryDirectory(prefix="lopt-edge-proof-") as folder:
            found = _prove(facts, Path(folder) / "tiny")
    except Exception as error:  # of any kind, from code that is not ours
        differs = isinstance(error, Differs)
        reason = str(error) if differs else f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        what = f"the family {facts.family.name!r} is not one of the tested ones, and a tiny model of it does not run here"
        raise InputError(f"{what}: {reason}", where=where, fix="use a supported family (lopt-edge models)") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found), encoding="utf-8")
    return True


def _prove(facts: ModelFacts, folder: Path) -> dict[str, float]:
    """The largest relative differences of a proof that passed. Raises Differs."""
    own = facts.family.unlisted
    assert own is not None
    theirs = random_model(smaller(config_of(own.config, where="proof"), n_layers=_n_layers(facts)))
    theirs.save_pretrained(folder)
    tiny = read_facts(json.loads((folder / "config.json").read_text(encoding="utf-8")), where="proof")
    if len(tiny.kinds) < len(facts.kinds):
        raise Differs(f"a tiny model has {len(tiny.kinds)} kinds of layers, not {len(facts.kinds)}")
    ours = load_model(folder, tiny, device=CPU, dtype=torch.float32)
    _unpack_into(theirs, ours)
    found = {"logits": max(_check_logits(ours, theirs, length) for length in _lengths(facts))}
    _check_causal(ours)
    _check_calls(ours)
    return found | {"gradients": _check_gradients(ours, theirs)}


def _lengths(facts: ModelFacts) -> tuple[int, ...]:
    return (*LENGTHS, IN_CHUNKS) if any(kind.mamba is not None for kind in facts.kinds) else LENGTHS


def _n_layers(facts: ModelFacts) -> int:
    """As many layers, from the first on, as show each kind and each type of attention; two at least."""
    n_layers = layers_to_show(facts.layer_types, facts.kind_of_layer)
    if n_layers > MOST_LAYERS:
        raise Differs(f"its kinds of layers lie {n_layers} layers apart")
    return n_layers


def _unpack_into(theirs: nn.Module, ours: Model) -> None:
    for name, module in _linears(ours):
        theirs.get_submodule(name).get_parameter("weight").data.copy_(module.unpacked(torch.float32))
    for layer in range(ours.facts.n_layers):
        if (experts := ours.facts.layer(layer).experts) is None:
            continue
        path = f"{experts.module}.experts"
        packed, stacks = (
            ours.layers[layer].get_submodule(path),
            theirs.get_submodule(f"{ours.facts.layout.layer(layer)}{path}"),
        )
        assert isinstance(packed, PackedExperts)
        for number in range(experts.count):
            one = packed.unpacked(number, torch.empty(0))
            stacks.get_parameter("gate_up_proj").data[number] = one.gate_up
            stacks.get_parameter("down_proj").data[number] = one.down


def _linears(ours: Model) -> Iterator[tuple[str, PackedLinear]]:
    """Yield the path in transformers' model and our module of each linear layer."""
    for layer in range(ours.facts.n_layers):
        for linear in ours.facts.layer(layer).linears:
            module = ours.layers[layer].get_submodule(linear.name)
            assert isinstance(module, PackedLinear)
            yield f"{ours.facts.layout.layer(layer)}{linear.name}", module


def _ids(length: int) -> Tensor:
    return torch.randint(3, VOCABULARY - 1, (2, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def _our_logits(ours: Model, ids_BT: Tensor) -> Tensor:
    hidden_BTD = ours.embed(ids_BT)
    context = ours.layer_context(hidden_BTD, ids_BT)
    for layer in range(ours.facts.n_layers):
        hidden_BTD = ours.run_layer(layer, hidden_BTD, context)
    return logits(ours, hidden_BTD.flatten(0, 1)).view(*ids_BT.shape, -1)


def _check_logits(ours: Model, theirs: nn.Module, length: int) -> float:
    ids_BT = _ids(length)
    with torch.no_grad():
        wanted = theirs(ids_BT, use_cache=False).logits.float()
    found = _difference(_our_logits(ours, ids_BT), wanted)
    if not found <= BOUND:  # NaN, too
        raise Differs(f"logits of {length} tokens differ from transformers' by {found:.1e} of their size")
    return found


def _difference(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape:
        raise Differs(f"a result of shape {tuple(ours.shape)} where transformers has {tuple(theirs.shape)}")
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))


def _check_causal(ours: Model) -> None:
    ids_BT = _ids(LENGTHS[-1])
    changed = ids_BT.clone()
    changed[:, -1] = 2
    before, after = _our_logits(ours, ids_BT)[:, :-1], _our_logits(ours, changed)[:, :-1]
    if not _difference(after, before) <= BOUND:
        raise Differs("a token sees later ones: it is no causal language model")


def _check_calls(ours: Model) -> None:
    """Layers must be called with the same, whatever the hidden states are."""
    ids_BT = _ids(LENGTHS[0])
    hidden_BTD = ours.embed(ids_BT)
    contexts = (ours.layer_context(one, ids_BT, embedded=False) for one in (hidden_BTD, torch.ones_like(hidden_BTD)))
    for first, second in zip(*(context.tensors() for context in contexts), strict=True):
        if not torch.equal(first, second):
            raise Differs("its layers are called with hidden states other than their own")


def _check_gradients(ours: Model, theirs: nn.Module) -> float:
    """The largest relative difference of a gradient of LoRA, on every linear layer, from autograd's through one graph."""
    worst = 0.0
    for name, mine, grad in lora_gradients(ours, theirs):
        if grad is None or mine is None:
            if (grad is None) != (mine is None):
                raise Differs(f"only one of the two has a gradient of LoRA on {name}")
            continue
        worst = max(worst, found := _difference(mine, grad))
        if not found <= 10 * BOUND:
            raise Differs(f"the gradient of LoRA on {name} differs from autograd's by {found:.1e} of its size")
    return worst


def lora_gradients(ours: Model, theirs: nn.Module) -> Iterator[tuple[str, Tensor | None, Tensor | None]]:
    """Yield (name, ours, theirs) of each gradient of LoRA, on every linear layer: of a step through the executor, on the
    device of our model, and of one graph of autograd, in the dtype of transformers' model. It changes both."""
    facts, ids_BT = ours.facts, _ids(_lengths(ours.facts)[-1])
    layers = range(facts.n_layers)
    attach_adapters(ours, layers, targets=facts.linear_names, r=RANK, alpha=ALPHA, seed=3)
    generator = torch.Generator().manual_seed(5)
    for layer in layers:
        for b in layer_parameters(ours, layer)[1::2]:
            b.data.copy_(torch.empty(b.shape).normal_(0, 0.1, generator=generator))
    pairs = [
        (name, _Lora.of(module, next(theirs.parameters()))) for name, module in _linears(ours) if module.lora_a is not None
    ]
    for name, lora in pairs:
        theirs.set_submodule(name, _WithLora(theirs.get_submodule(name), lora))
    for parameter in theirs.parameters():
        parameter.requires_grad_(False)
    for _, lora in pairs:
        lora.a.requires_grad_(), lora.b.requires_grad_()
    scores = theirs(ids_BT, use_cache=False).logits[:, :-1].flatten(0, 1)
    torch.autograd.backward(nn.functional.cross_entropy(scores, ids_BT[:, 1:].flatten()))
    made = _our_gradients(ours, ids_BT)
    wanted = [matrix.grad for _, lora in pairs for matrix in (lora.a, lora.b)]
    names = [f"{name} {letter}" for name, _ in pairs for letter in "AB"]
    yield from zip(names, made, wanted, strict=True)


def _our_gradients(ours: Model, ids_BT: Tensor) -> list[Tensor | None]:
    n_layers = ours.facts.n_layers
    groups: dict[GroupName, list[nn.Parameter]] = {
        ("layer", layer): layer_parameters(ours, layer) for layer in range(n_layers)
    }
    optimizer = SegmentOptimizer(groups, mover=ours.mover, clip=0.0, clip_scope="segment", optimizer="adamw")
    executor = Executor(ours, heads={}, optimizer=optimizer, local_weight=1.0)
    plan = step_plan("e2e", (Segment(0, 0, n_layers - 1, "task"),), n_micro_batches=1)
    plan = replace(plan, ops=tuple(op for op in plan.ops if op.kind is not Kind.STEP))
    rows = ids_BT.tolist()
    batch = make_batch(MicroBatch(rows, [[*row[1:], -100] for row in rows], (ids_BT.shape[1],) * len(rows)), ours.device)
    executor.run(plan, [batch], step=1, learning_rates={})
    return [None if one.grad is None else one.grad.clone() for group in groups.values() for one in group]


@dataclass
class _Lora:
    """LoRA as its paper has it, in leaves of their own: y + s (x A) B."""

    a: Tensor
    b: Tensor
    scale: float

    @classmethod
    def of(cls, module: PackedLinear, like: Tensor) -> _Lora:
        assert module.lora_a is not None and module.lora_b is not None
        a, b = (matrix.detach().to(like, copy=True) for matrix in (module.lora_a, module.lora_b))
        return cls(a, b, module.scale)


class _WithLora(nn.Module):
    def __init__(self, linear: nn.Module, lora: _Lora) -> None:
        super().__init__()
        self.linear, self.lora = linear, lora

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__["_modules"]
        return modules[name] if name in modules else getattr(modules["linear"], name)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y + self.lora.scale * ((x @ self.lora.a) @ self.lora.b)
