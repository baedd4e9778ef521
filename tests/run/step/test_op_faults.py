"""The words in which libraries say that memory was refused, and those of other faults."""

from __future__ import annotations

import pytest

from lopt_edge.run.step.op_faults import is_out_of_memory

CREATED = "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"


@pytest.mark.parametrize(
    ("text", "memory"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB", True),
        ("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", True),
        ("CUDA driver error: out of memory", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        (CREATED, True),
        ("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasSgemm(handle, opa)`", False),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(handle)`", False),
        ("CUDA error: an illegal memory access was encountered", False),
        ("CUDA driver error: unknown error", False),
        ("HIP error: out of memory", True),
        ("XPU out of memory. Tried to allocate 20.00 MiB", True),
        ("MPS backend out of memory (MPS allocated: 9.00 GB, other allocations: 1.00 GB, max allowed: 9.07 GB)", True),
        ("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)", True),
        ("could not create a primitive", True),
        ("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory", True),
    ],
)
def test_refused_memory_is_told_from_other_faults(text, memory):
    assert is_out_of_memory(RuntimeError(text)) == memory
    assert not is_out_of_memory(ValueError(text)), "a text that a user gave, say"
