"""The experts of a model folder, matrix by matrix, whichever way its files spell them.

Published checkpoints have a tensor for each matrix of each expert; transformers 5 stacks them in memory, and some folders
are written so. The rule: whoever loads or packs experts sees one entry a matrix, under its published name; a stack is cut
by positions in the file, so that nothing is read for it. What is no stack is passed on as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod

from lopt_edge.plan.facts.layers import ExpertFacts
from lopt_edge.plan.facts.model import ModelFacts
from quant.headers import FolderError, TensorEntry


def by_expert(entries: Mapping[str, TensorEntry], facts: ModelFacts) -> dict[str, TensorEntry]:
    """The tensors of a folder, each expert's matrix with an entry of its own.

    Raises FolderError for a stack of another shape.
    """
    found, stacks = dict(entries), () if facts.family.experts is None else facts.family.experts.stacks
    for layer in range(facts.n_layers):
        experts, prefix, first = facts.layer(layer).experts, facts.layout.layer(layer), 0
        for name, n_matrices in stacks if experts is not None else ():
            if experts is not None and (stack := found.pop(prefix + name, None)) is not None:
                found |= _cut(stack, experts, prefix, range(first, first + n_matrices))
            first = (first + n_matrices) % len(experts.stored) if experts is not None else 0
    return found


def as_published(names: Iterable[str], facts: ModelFacts) -> dict[str, tuple[str, ...]]:
    """The tensors of a published checkpoint, in the order of `names`, and which of ours stand in each: one, or a stack's.

    A stack stands where the first of its matrices does.
    """
    family, stack_of, parts = facts.family.experts, dict[str, str](), dict[str, tuple[str, ...]]()
    for layer in range(facts.n_layers) if family is not None and family.publishes_stacks else ():
        experts, prefix, left = facts.layer(layer).experts, facts.layout.layer(layer), family.stored if family else ()
        for stack, n_matrices in family.stacks if family is not None and experts is not None else ():
            stored, left = left[:n_matrices], left[n_matrices:]
            numbers = range(experts.count) if experts is not None and stored else ()
            within = tuple(f"{prefix}{name.format(number)}.weight" for number in numbers for name in stored)
            stack_of |= dict.fromkeys(within, prefix + stack)
            parts |= {prefix + stack: within} if within else {}
    return {stack_of.get(name, name): parts.get(stack_of.get(name, name), (name,)) for name in names}


def _cut(stack: TensorEntry, experts: ExpertFacts, prefix: str, which: range) -> dict[str, TensorEntry]:
    """The entries of those matrices of each expert that stand in a stack, one under the other."""
    shapes = [experts.shapes[i] for i in which]
    expected = (experts.count, sum(rows for rows, _ in shapes), shapes[0][1])
    if stack.shape != expected:
        raise FolderError(f"tensor {stack.name!r} has shape {stack.shape}, config.json says {expected}")
    itemsize, start, found = stack.n_bytes // prod(stack.shape), stack.start, {}
    for expert in range(experts.count):
        for i, shape in zip(which, shapes, strict=True):
            name, n_bytes = f"{prefix}{experts.stored[i].format(expert)}.weight", prod(shape) * itemsize
            found[name] = replace(stack, name=name, shape=shape, start=start, n_bytes=n_bytes)
            start += n_bytes
    return found
