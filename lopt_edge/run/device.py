"""Which device to compute on and in which dtype, each with its reason. The choice depends on the machine's features alone,
never on a timing, so that the same machine always chooses the same and a resumed run computes as it did before.

Measured on 2 cores of an AMD EPYC with avx512_bf16: one 512 x 896 x 4864 product runs at 415 GFLOP/s in bfloat16 and at
152 in float32. But oneDNN compiles and keeps a bfloat16 kernel for every new number of tokens: ten steps on sequences of
many lengths took 841 MiB against 469 in float32, at half the speed. Without bf16 instructions bfloat16 is three times
slower than float32 (42 against 126 GFLOP/s). So `auto` is float32 on every CPU but those with AMX, and bfloat16 is there
to be asked for.
"""

from __future__ import annotations

import torch

from lopt_edge.errors import InputError
from lopt_edge.system.memory import peak_rss_bytes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str) -> tuple[torch.device, str]:
    """The device for auto, cpu or cuda, and why. Raises InputError for CUDA where there is none."""
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"{name!r} is unknown", where="device", fix="choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "this machine offers no CUDA device to torch", where="device", fix="use --device cpu, or see lopt-edge doctor"
        )
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", torch.cuda.current_device()), torch.cuda.get_device_name()
    return torch.device("cpu"), "asked for" if name == "cpu" else "no CUDA device found"


def choose_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The compute dtype, and why."""
    if name not in ("auto", *DTYPES):
        raise InputError(f"{name!r} is unknown", where="compute_dtype", fix=f"choose auto, {', '.join(DTYPES)}")
    if name == "float16" and device.type == "cpu":
        raise InputError(
            "float16 overflows in training and is slow on a CPU", where="compute_dtype", fix="use auto, bfloat16 or float32"
        )
    if name != "auto":
        return DTYPES[name], "asked for"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the GPU has bfloat16 matrix units"
        return torch.float16, "the GPU has no bfloat16 matrix units; gradients are scaled"
    if torch.cpu.get_capabilities().get("amx_bf16"):
        return torch.bfloat16, "the CPU has bfloat16 matrix units (AMX)"
    return torch.float32, "the steadiest in memory on a CPU without AMX"


def peak_device_bytes(device: torch.device) -> int:
    """The device tier's peak: reserved bytes on CUDA, the resident set on the CPU."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else peak_rss_bytes()
