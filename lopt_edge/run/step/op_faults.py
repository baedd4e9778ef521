"""What becomes of an exception inside an op: an error of ours that names the step and the op and shows the plan around it.

Memory that was refused and numbers that are not finite get their own kinds, because a run can go on after them. Whoever
catches one finds in it whether the adapters are still those of the last finished step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lopt_edge.errors import LoptError, NotFinite, OutOfMemory, RunError
from lopt_edge.plan.schedule.ops import Plan

LESS_MEMORY = "lower --max-seq-len or --batch-size, or page more (--weights, --saved-inputs, --optimizer-states)"
# The second line has the allocators' words, the third the runtimes' and the drivers' (the latter where segments grow), the
# fourth oneDNN's (torch's matrix products on the CPU) where its own workspace is refused; then come CUDA's libraries: a
# kernel's own memory, and a handle's, are not the allocator's to refuse. A handle that cannot be made says no more than
# that.
REFUSALS = ("can't allocate memory", "can't start new thread", "Cannot allocate memory",
            "CUDA out of memory", "HIP out of memory", "XPU out of memory", "MPS backend out of memory",
            "CUDA error: out of memory", "HIP error: out of memory", "CUDA driver error: out of memory",
            "Triton Error [CUDA]: out of memory", "UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY",
            "could not create a primitive", "could not create a memory object",
            "CUBLAS_STATUS_ALLOC_FAILED", "HIPBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED",
            "CUSOLVER_STATUS_ALLOC_FAILED", "cudaErrorMemoryAllocation", "hipErrorOutOfMemory",
            "CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate", "when calling `cublasLtCreate",
            "HIPBLAS_STATUS_NOT_INITIALIZED when calling `hipblasCreate")  # fmt: skip


def op_error(plan: Plan, position: int, step: int, error: Exception, *, intact: bool) -> RunError:
    """The error of ours for `error`, raised in the op at `position`: NotFinite, OutOfMemory or RunError.

    `intact` says whether the step's updates, if there were any, have been undone.
    """
    text = plan.ops[position].text()
    memory = is_out_of_memory(error)
    untouched = not any(op.kind.name == "STEP" for op in plan.ops[:position])
    if isinstance(error, NotFinite):  # after early updates: values may be back, moments are not
        intact = intact and untouched
    reason = str(error) if isinstance(error, LoptError) else f"{type(error).__name__}: {error}"
    reason += "" if intact else "\nSome groups were updated in this step already: the adapter is between two steps."
    kind = NotFinite if isinstance(error, NotFinite) else OutOfMemory if memory else RunError
    fault = kind(
        f"{reason}\nThe plan around it:\n{plan.around(position)}",
        where=f"step {step}, op {position} ({text})",
        fix=LESS_MEMORY if memory else "",
    )
    fault.values_intact = intact
    if isinstance(error, NotFinite) and isinstance(fault, NotFinite):
        fault.of_loss, fault.op = error.of_loss, error.op or text
        fault.untouched = untouched
    return fault


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was refused: Python's, numpy's, torch's (CPU, CUDA) and the threads' ways to say so."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError | OutOfMemory):
        return True
    return isinstance(error, RuntimeError | OSError) and any(words in str(error) for words in REFUSALS)


@contextmanager
def memory_faults(doing: str) -> Iterator[None]:
    """A context for work outside of ops: refused memory becomes OutOfMemory, with `doing` as its place."""
    try:
        yield
    except LoptError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"{type(error).__name__}: {error}", where=doing, fix="give it more memory") from error
