"""Whose kernels a run takes for norms, rotary positions, gates and the vocabulary's softmax: torch's, or our own.

The rule: `auto` takes our own where the device is one for which they are compiled in a test, Triton is there, and each of
them gives torch's numbers on it (checks.py); else torch's. What is chosen comes with its reason, and the planner is told
(LayerShape.kernels). Nothing is timed. The choice depends on the machine alone, so each process of a run makes it for
itself and finds the same.

No run has met a GPU yet: the reason says so until one has.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec

import torch

from lopt_edge.errors import InputError
from lopt_edge.plan.facts.device_kinds import AUTO, TORCH, TRITON, in_words
from lopt_edge.run.device import device_of
from lopt_edge.run.kernels.checks import KERNEL_BOUNDS, kernel_checks

NAMES = (AUTO, TORCH, TRITON)
UNTESTED = "compiled and interpreted in tests, run on no GPU yet: lopt-edge doctor --prove, or --kernels torch"


def choose_kernels(name: str, device: torch.device) -> tuple[str, str]:
    """The kernels (torch or triton) for auto or a name, and the reason in words. Raises InputError for what cannot be."""
    if name not in NAMES:
        raise InputError(f"{name!r} is unknown", where="kernels", fix=f"choose {in_words(*NAMES)}")
    if name == TORCH:
        return TORCH, "asked for"
    why = why_not(device)
    if why is None:
        return TRITON, f"Triton {version('triton')}; {UNTESTED}"
    if name == TRITON:
        raise InputError(why, where="kernels", fix=f"use --kernels {TORCH}, or {AUTO}")
    return TORCH, why


@lru_cache(maxsize=16)
def why_not(device: torch.device) -> str | None:
    """The reason why our kernels cannot run on a device; None where they can."""
    own = device_of(device)
    if not own.kind.triton_capabilities:
        return f"our own kernels are for a GPU, not for a {own.kind.title}"
    if torch.version.hip:
        return "our own kernels are untried on AMD"
    if (found := own.capability()) not in own.kind.triton_capabilities:
        return f"our own kernels are compiled for no card of compute capability {found}"
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    dtype = own.auto_dtype()[0]
    try:  # Triton wants a C compiler, a folder to write to and a driver that it knows: the kernels tell
        own.settle_allocator()  # these are a run's first tensors
        with own.made_current():
            errors = {name: work() for name, work in kernel_checks(device, dtype)}
    except Exception as error:  # whatever a compiler or a driver may raise
        lines = str(error).strip().splitlines() or [""]
        return f"a kernel of Triton failed: {type(error).__name__}: {lines[0][:120]}"
    off = [f"{name} by {error:.1e} of its size" for name, error in errors.items() if not error <= KERNEL_BOUNDS[dtype]]
    return f"our own kernels give other numbers than torch's here: {', '.join(off)}" if off else None
