"""Our Triton kernels without a GPU: interpreted on the CPU against torch's forms, and compiled for each card of the list.

Both need Triton, which CUDA wheels of torch bring and CPU wheels do not: `pip install triton`, then `pytest -m real`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from lopt_edge.plan.facts.device_kinds import CUDA

ROOT = Path(__file__).parents[3]
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (pip install triton)"),
]
# Relative to the norm of the exact result: one rounding, and a few of the steps' sums. The interpreter cuts
# bfloat16 off where a GPU rounds it, so a last bit is missing more often.
BOUNDS = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 1e-2}
STEP_BOUNDS = {"float32": 2e-5, "bfloat16": 6e-2}
CALLED = {
    "llama": {"rms_norm", "rms_norm_backward", "rotate", "gate_", "gate_backward_", "vocabulary_chunk_"},
    "qwen3": {"rms_norm", "rms_norm_backward", "rotate", "gate_", "gate_backward_", "vocabulary_chunk_"},
    "gemma2": {"rotate", "vocabulary_chunk_"},  # its norms add one to their weights, its MLPs have gelu
    "granite": {"rms_norm", "rms_norm_backward", "rotate", "gate_", "gate_backward_", "vocabulary_chunk_"},
}


def test_interpreted_kernels_compute_what_torch_does(tmp_path):
    command = [sys.executable, "-m", "tests.run.kernels.interpreted", str(tmp_path)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0 and len(found) == 3 * 6 + 5, done.stderr[-3000:]
    for one in found:
        bound = (STEP_BOUNDS if "calls" in one else BOUNDS)[one["dtype"]]
        assert one["error"] <= bound, one
        assert "calls" not in one or set(one["calls"]) == CALLED[one["check"].removeprefix("step of ")], one


def variants(half: str) -> list[tuple[Any, dict[str, Any], dict[str, str]]]:
    """Each kernel as it is launched for an 8B: (kernel, what is constant, the types of the rest)."""
    from lopt_edge.run.kernels import cross_entropy, gated, norm, rotary

    wide = {"WIDTH": 4096, "BLOCK": 4096, "ROWS": 1}
    heads = {"HEADS": 32, "HALF": 64, "HEAD_BLOCK": 32, "HALF_BLOCK": 64}
    floats = {"epsilon": "fp32", "factor": "fp32", "cap": "fp32", "carried": "*fp32", "targets": "*i64"}
    tensors = ("x", "y", "g", "dx", "weight", "cosines", "sines", "gate", "up", "d", "scores")
    types = {**dict.fromkeys(tensors, f"*{half}"), **floats}
    return [
        (norm.forward_kernel, wide, types),
        (norm.backward_kernel, wide, types),
        (rotary.rotate_kernel, {**heads, "BACK": True}, types),
        (gated.forward_kernel, {"BLOCK": gated.BLOCK}, types),
        (gated.backward_kernel, {"BLOCK": gated.BLOCK}, types),
        (cross_entropy.chunk_kernel, {"CAPPED": True, "WEIGHTS": True, "BLOCK": cross_entropy.BLOCK}, types),
    ]


@pytest.mark.parametrize("capability", CUDA.triton_capabilities)
def test_kernels_compile_for_each_card(capability):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    number = int(capability.replace(".", ""))
    for kernel, constants, types in variants("fp16" if number < 80 else "bf16"):
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
        source = ASTSource(kernel, signature, constexprs=constants)
        options = {"num_warps": 4, "enable_fp_fusion": True}
        made = triton.compile(source, target=GPUTarget("cuda", number, 32), options=options)
        assert made.asm["cubin"][:4] == b"\x7fELF" and made.metadata.shared <= 48 << 10, (kernel.__name__, capability)
        assert f".target sm_{number}" in made.asm["ptx"]
