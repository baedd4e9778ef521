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
from quant.mxfp4.stacks import BLOCKS_SUFFIX, SCALES_SUFFIX, cut_stacks


def by_expert(entries: Mapping[str, TensorEntry], facts: ModelFacts) -> dict[str, TensorEntry]:
    """The tensors of a folder, each expert's matrix with an entry of its own.

    Raises FolderError for a stack of another shape.
    """
    found, family = dict(entries), facts.family.experts
    for layer in range(facts.n_layers) if family is not None else ():
        if (experts := facts.layer(layer).experts) is None or family is None:
            continue
        prefix, first = facts.layout.layer(layer), 0
        for name, n_matrices in family.stacks:
            which, stack = range(first, first + n_matrices), prefix + name
            if stack in found:
                found |= _cut(found.pop(stack), experts, prefix, which, transposed=family.transposed)
            elif facts.forms is not None and (blocks := found.pop(stack + BLOCKS_SUFFIX, None)) is not None:
                names = [f"{prefix}{experts.stored[first].format(number)}.weight" for number in range(experts.count)]
                found |= cut_stacks(blocks, found.pop(stack + SCALES_SUFFIX, None), experts.shapes[first], names)
            first = (first + n_matrices) % len(experts.stored)
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


def _cut(
    stack: TensorEntry, experts: ExpertFacts, prefix: str, which: range, *, transposed: bool
) -> dict[str, TensorEntry]:
    """The entries of those matrices of each expert that stand in a stack, one under the other."""
    shapes = [experts.shapes[i] for i in which]
    n_rows, n_columns = sum(rows for rows, _ in shapes), shapes[0][1]
    expected = (experts.count, n_columns, n_rows) if transposed else (experts.count, n_rows, n_columns)
    if stack.shape != expected:
        raise FolderError(f"tensor {stack.name!r} has shape {stack.shape}, config.json says {expected}")
    itemsize, start, found = stack.n_bytes // prod(stack.shape), stack.start, {}
    for expert in range(experts.count):
        for i, shape in zip(which, shapes, strict=True):
            name, n_bytes = f"{prefix}{experts.stored[i].format(expert)}.weight", prod(shape) * itemsize
            place = replace(stack, name=name, shape=shape, start=start, n_bytes=n_bytes, transposed=transposed)
            found[name] = place
            start += n_bytes
    return found
