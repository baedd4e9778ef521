"""The experts of a layer in a GGUF file, as the matrices that the family's checkpoints have.

llama.cpp keeps the gates of all experts of a layer in one tensor (experts, rows, columns), their ups in another and their
downs in a third, and of biases as many. A family whose checkpoints have gate and up in one matrix, row beside row
(gpt-oss), gets one entry for both: its rows come in turn from the two places. The rule: nothing is read for it; a stack of
another shape or form than the others' is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from lopt_edge.plan.facts.families.family import Experts
from quant.headers import Beside, TensorEntry

GATE, UP, DOWN = "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"
STACKS = (GATE, UP, DOWN)
ITEM_BYTES = 4  # of a bias


def expert_entries(
    stacks: Mapping[str, TensorEntry], family: Experts, prefix: str, *, count: int, refuse: Callable[[str], Exception]
) -> dict[str, TensorEntry]:
    """The entries of the experts of one layer whose names begin with `prefix`; `stacks` are by `PART.weight`, `PART.bias`.

    Raises what `refuse` makes of a sentence.
    """
    wanted = [f"{part}.{kind}" for kind in ("weight", "bias") for part in STACKS]
    if missing := [name for name in wanted if name not in stacks]:
        raise refuse(f"lacks {missing[0]} of {prefix.rstrip('.')}")
    gate, up, down, *biases = (stacks[name] for name in wanted)
    for one, n_sides in (*((stack, 3) for stack in (gate, up, down)), *((bias, 2) for bias in biases)):
        if len(one.shape) != n_sides or one.shape[0] != count:
            raise refuse(f"{one.name} is {list(one.shape)}, which is not of {count} experts")
    if (gate.shape, gate.dtype) != (up.shape, up.dtype) or biases[0].shape != biases[1].shape:
        raise refuse(f"{gate.name} and {up.name} differ in shape or form")
    if any(bias.dtype != "F32" for bias in biases):
        raise refuse(f"{biases[0].name} is not in F32")
    both, last = family.stored
    found = {}
    for expert in range(count):
        for name, entry in ((both, _in_turn(_cut(gate, expert), _cut(up, expert))), (last, _cut(down, expert))):
            found[f"{prefix}{name.format(expert)}.weight"] = entry
    module = both.partition("{}")[0]
    names = [f"{prefix}{module}{name}" for name in family.biases]
    found |= dict(zip(names, (_in_turn(biases[0], biases[1], unit=ITEM_BYTES), biases[2]), strict=True))
    return {name: replace(entry, name=name) for name, entry in found.items()}


def _cut(stack: TensorEntry, expert: int) -> TensorEntry:
    """The matrix of one expert in a stack."""
    n_bytes = stack.n_bytes // stack.shape[0]
    return replace(stack, shape=stack.shape[1:], start=stack.start + expert * n_bytes, n_bytes=n_bytes)


def _in_turn(first: TensorEntry, second: TensorEntry, *, unit: int = 0) -> TensorEntry:
    """Two tensors as one whose rows, or units of so many bytes, come in turn from both."""
    *sides, last = first.shape
    shape = (*sides, 2 * last) if unit else (2 * sides[0], last)
    beside = Beside(second.path, second.start, unit or first.n_bytes // first.shape[0])
    return replace(first, shape=shape, n_bytes=2 * first.n_bytes, beside=beside)
