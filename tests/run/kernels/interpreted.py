"""What our kernels compute, each against its torch form, and whole steps with both: in a process with TRITON_INTERPRET=1.

The interpreter runs each program of a kernel in numpy, on the CPU. Prints the largest relative error of each check as JSON,
and raises SystemExit where the wiring is wrong.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from lopt_edge.models.folder import find_model
from lopt_edge.models.four_bit import quantise_model
from lopt_edge.plan.facts.device_kinds import TRITON
from lopt_edge.run.kernels.checks import kernel_checks, relative
from tests.laws.bench import make_bench, random_batch
from tools.tiny_models import make_folder

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FAMILIES = ("llama", "qwen3", "gemma2", "granite")  # norms of heads; a soft cap and no silu; a factor of logits


def step(root: Path, family: str, dtype: torch.dtype) -> tuple[float, dict[str, int]]:
    """The largest relative difference of a step's gradients and loss between both kernels, and the calls of each."""
    folder = root / family
    if not folder.exists():
        quantise_model(find_model(str(make_folder(root / f"{family}-source", family, num_hidden_layers=2))), folder)
    batches, found, calls = [random_batch((11, 7)), random_batch((9, 9), seed=1)], [], Calls()
    for kernels in ("torch", TRITON):
        bench = make_bench(folder, method="lopt", num_segments=2, n_micro_batches=2, dtype=dtype, kernels=kernels)
        with calls:
            grads = bench.gradients(batches)
        found.append([*grads.values(), torch.tensor(bench.result.loss)])
        if kernels == "torch" and calls.found:
            raise SystemExit(f"torch's form called {calls.found}")
    errors = [relative(mine, theirs.double()) for mine, theirs in zip(found[1], found[0], strict=True)]
    return max(errors), calls.found


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts calls of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func._schema.name.partition("::")
        if space == "lopt_edge":
            self.found[name] = self.found.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def main() -> None:
    for dtype in DTYPES:
        for name, work in kernel_checks(torch.device("cpu"), dtype):
            print(json.dumps({"check": name, "dtype": str(dtype).removeprefix("torch."), "error": work()}), flush=True)
    for family in FAMILIES:
        for dtype in (torch.float32, torch.bfloat16) if family == "llama" else (torch.float32,):
            error, calls = step(Path(sys.argv[1]), family, dtype)
            found = {"check": f"step of {family}", "dtype": str(dtype).removeprefix("torch."), "error": error}
            print(json.dumps(found | {"calls": calls}), flush=True)


if __name__ == "__main__":
    main()
