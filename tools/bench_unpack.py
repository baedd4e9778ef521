"""Measures how fast packed matrices are unpacked, every form beside NF4 in one run; writes a row each to
tools/results/unpack.csv.

    python tools/bench_unpack.py [--rows 2048] [--columns 4096] [--passes 5]

Each number is the median of several passes over the forms in turn. It is processor time of one thread, so that other work
on the machine counts as little as can be.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from pathlib import Path

import torch

from quant.gguf.types import BLOCK_TYPES, TYPES
from quant.gguf.unpack import Scratch, new_scratch
from quant.gguf.weight import GgufWeight
from quant.mxfp4.stacks import KIND as MXFP4
from quant.mxfp4.weight import Mxfp4Weight
from quant.nf4 import pack
from quant.packed import Packed

GROUPED = (
    "INT2_G128_F16",
    "INT4_G128_F16",
    "INT4_G128_F16_ORDER",
    "INT8_G128_F16",
    "FP8_G128_F32",
)  # GPTQ, AWQ, compressed-tensors, FP8
TABLE = Path(__file__).resolve().parent / "results" / "unpack.csv"


def forms(shape: tuple[int, int]) -> dict[str, Packed]:
    """A random matrix in each form."""
    torch.manual_seed(0)
    found: dict[str, Packed] = {"NF4": pack(torch.randn(shape))}
    scratch = Scratch(new_scratch(torch.device("cpu")))
    for kind in (*TYPES.values(), *(BLOCK_TYPES[name] for name in GROUPED)):
        blocks = torch.randint(0, 60, (kind.n_bytes(shape),), dtype=torch.uint8)  # scales that are small normal numbers
        order = torch.randperm(shape[1]).int() if kind.is_ordered else None
        found[kind.name] = GgufWeight(blocks, shape, kind, scratch, order)
    n_blocks = shape[0] * shape[1] // 32
    codes = torch.randint(0, 256, (16 * n_blocks,), dtype=torch.uint8)
    exponents = torch.randint(118, 124, (n_blocks,), dtype=torch.uint8)
    found[MXFP4] = Mxfp4Weight(codes, exponents, shape, scratch)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--passes", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    shape = (options.rows, options.columns)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        out, seconds = torch.empty(shape, dtype=dtype), dict[str, list[float]]()
        found = forms(shape)
        for _ in range(options.passes):
            for name, weight in found.items():
                begin = time.process_time()
                weight.unpack_into(out)
                seconds.setdefault(name, []).append(time.process_time() - begin)
        nf4 = statistics.median(seconds["NF4"])
        for name, weight in found.items():
            median = statistics.median(seconds[name])
            rows.append(
                {
                    "form": name,
                    "to": str(dtype).removeprefix("torch."),
                    "shape": f"{shape[0]}x{shape[1]}",
                    "packed_bytes": weight.n_bytes,
                    "cpu_milliseconds": f"{1e3 * median:.1f}",
                    "times_nf4": f"{median / nf4:.2f}",
                }
            )
            print(*rows[-1].values(), flush=True, sep="\t")
    with TABLE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
