"""From the log of an op to its program: what it allocates and releases, in order.

    +4std  allocate 4 x sequences x tokens x hidden bytes       -3    release the third allocation
    -3?q_proj,k_proj  ... unless one of these has LoRA          -g3   release the forward program's third allocation
    !name:...  a module of ours begins, or has its result       ~     left out where a layer is recomputed
    =5  this allocation is the layer's output       @7  keys or values that later layers attend to

What a number of bytes is a product of is the caller's matter. plan/costs/programs.py replays a program.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from lopt_edge.tracing.step import Trace


@dataclass
class Log:
    """The log of one op: births and marks in order (as text), and at which of them (how many came before) each tensor is
    released."""

    births: list[str]
    releases: dict[str, float]
    result: str = ""
    shared: tuple[str, ...] = ()


def log_of(trace: Trace, op: str, product: Callable[[int], str], *, numbers: dict[int, str]) -> Log:
    """The log of one op. `numbers` names what lived before (the graph's tensors); its own allocations are added to it."""
    names = {**numbers, **trace.given[op]}
    births: list[str] = []
    releases: dict[str, float] = {}
    n_own = 0
    for event in trace.spans[op]:
        if event.kind == "-":
            if event.number in names:
                releases[names[event.number]] = len(births)
            continue
        text = "~" if event.value else ""
        if event.kind == "+":
            names[event.number] = str(n_own)
            n_own += 1
            text += f"+{product(event.n_bytes)}"
        else:
            text += ":".join([event.kind, *(product(size) for size in event.shape)])
        births.append(text)
    numbers.update({number: f"g{name}" for number, name in names.items() if name.isdigit()})
    shared = tuple(names[number] for number in trace.shared.get(op, ()) if number in names)
    return Log(births, releases, names.get(trace.result[op], ""), shared)


def merged(logs: dict[str, Log], *, before: bool) -> str:
    """The program of an op from its logs by the linear layer that holds its input ("" is none of them).

    `before`: whether what lives before the op ("g3", "input") is released in it at the latest, so that a log without its
    release is one in which it never lived.
    """
    first = next(iter(logs.values()))
    for name, log in logs.items():
        if log.births != first.births:
            raise ValueError(
                f"the allocations with {name or 'nothing'} held are not those of {next(iter(logs)) or 'nothing'}"
            )
    at: dict[int, list[str]] = {}
    for tensor in sorted({tensor for log in logs.values() for tensor in log.releases}, key=_order):
        missing = -1.0 if before and not tensor.isdigit() else math.inf
        ends = {name: log.releases.get(tensor, missing) for name, log in logs.items()}
        for end in sorted({end for end in ends.values() if 0 <= end < math.inf}):
            later = [name for name, other in ends.items() if name and other > end]
            if ends.get("", end) <= end:
                at.setdefault(int(end), []).append(f"-{tensor}" + (f"?{','.join(later)}" if later else ""))
    tokens: list[str] = []
    for position in range(len(first.births) + 1):
        tokens += at.get(position, [])
        tokens += first.births[position : position + 1]
    result = [f"={first.result}"] if first.result.isdigit() else []
    return " ".join([*tokens, *result, *(f"@{name}" for name in first.shared)])


def _order(tensor: str) -> tuple[str, int]:
    return tensor.rstrip("0123456789"), int("".join(filter(str.isdigit, tensor)) or -1)
