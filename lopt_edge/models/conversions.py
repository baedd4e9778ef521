"""What checkpoints call the parts of a model that transformers calls otherwise, and stacks of experts: from its own tables.

transformers 5 has a table for each model type of what it renames, and of what it joins (the matrices of all experts in one
tensor) when it loads. Read backwards it says what a published folder holds. The rule: only plain names and the joining of
experts are read; for a model with another conversion the names do not fit, which the proof finds out (tracing/proof.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lopt_edge.plan.facts.families.family import Experts
from lopt_edge.plan.facts.layers import ExpertFacts

if TYPE_CHECKING:
    from torch import nn

PLAIN = re.compile(r"\^?[\w.\\]+\$?")  # a pattern that is a name, with its points escaped or not
ACTIVE = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts")  # keys for the experts that a token goes to
STACKS = ("gate_up_proj", "down_proj")


def conversions_of(*keys: str) -> tuple[Any, ...]:
    """The conversions that transformers has for a model type, or a class by name."""
    from transformers import conversion_mapping

    ask: Any = conversion_mapping.get_checkpoint_conversion_mapping
    return tuple(one for key in keys for one in ask(key) or ())


def renames_of(conversions: Sequence[Any]) -> Iterator[tuple[str, str]]:
    """Yield what names begin with in transformers, and in checkpoints instead."""
    for one in conversions:
        sources, targets = getattr(one, "source_patterns", []), getattr(one, "target_patterns", [])
        if len(sources) == len(targets) == 1 and PLAIN.fullmatch(sources[0]) and PLAIN.fullmatch(targets[0]):
            yield _plain(targets[0]), _plain(sources[0])


def _plain(pattern: str) -> str:
    return pattern.strip("^$").replace("\\", "").removeprefix(".")


def experts_of(layer: nn.Module, config: Any, conversions: Sequence[Any], *, full_weights: bool) -> ExpertFacts | None:
    """The experts of a layer, where they are two stacks of matrices as transformers has them; None where there are none, or
    others."""
    for path, module in layer.named_modules():
        shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
        if not path.endswith(".experts") or set(shapes) != set(STACKS) or not hasattr(module, "_apply_gate"):
            continue
        (count, rows, hidden), (_, out, inner) = (shapes[name] for name in STACKS)
        active = next((getattr(config, key) for key in ACTIVE if type(getattr(config, key, None)) is int), 0)
        if (rows, hidden, out) != (2 * inner, config.hidden_size, config.hidden_size) or not 1 <= active <= count:
            return None
        name = path.removesuffix(".experts")
        renames = tuple(pair for pair in renames_of(conversions) if pair[0].startswith(f"{name}."))
        stored = _stored(path, conversions, renames)
        return ExpertFacts(count, active, hidden, inner, name, renames, stored, full_weights)
    return None


def _stored(path: str, conversions: Sequence[Any], renames: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """The names of an expert's matrices in a checkpoint, {} for its number."""
    named: dict[str, list[str]] = {}
    for one in conversions:
        targets = getattr(one, "target_patterns", [""])
        stack = next((name for name in STACKS if f".{path}.{name}".endswith(targets[0])), None)
        if stack is not None and all("experts.*." in source for source in one.source_patterns):
            named[stack] = [source.removesuffix(".weight").replace("*", "{}") for source in one.source_patterns]
    found = [name for stack in STACKS for name in named.get(stack, [f"{path}.{{}}.{stack}"])]
    module = path.removesuffix("experts")
    before = next((old for new, old in renames if new == module), module)
    return tuple(before + name.removeprefix(".") if name.startswith(".") else name for name in found)


def record_of(experts: ExpertFacts, model_type: str) -> Experts:
    """The record of experts as a family has it."""
    from peft.utils import transformers_weight_conversion as of_peft  # what it applies to an adapter's targets as well
    from transformers import conversion_mapping

    kin: dict[str, str] = conversion_mapping._MODEL_TO_CONVERSION_PATTERN
    own, renamed = f"{experts.module}.experts", dict(experts.renames)
    names = [(f"{own}.gate_up_proj", len(experts.stored) - 1), (f"{own}.down_proj", 1)]
    published = [(renamed[name], count) for name, count in names if name in renamed]
    stacks = (*(published if len(published) == len(names) else ()), *names)
    return Experts(
        module=experts.module,
        renames=experts.renames,
        stored=experts.stored,
        stacks=stacks,
        takes_names=kin.get(model_type, model_type) in of_peft._MOE_TARGET_MODULE_MAPPING,
        full_weights=experts.full_weights,
        publishes_stacks=len(experts.stored) == len(STACKS),
    )
