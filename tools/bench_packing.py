"""Measures what packing gains on short sequences: tokens a second of packed rows beside one sequence a micro-batch.

    python tools/make_model.py --shape smollm2-135m --output /tmp/model
    python tools/bench_packing.py --model /tmp/model --cache-dir /tmp/cache

The rule: both ways are whole `finetune` runs over the same rows, with the same windows, one after the other in this
process; nothing else differs (the planner chooses memory settings for each). The lengths are drawn once, so that their mean
is 200 tokens and the longest has 2,048. The first window, the largest, warms up and is not counted. Tokens a second are of
the processor time of all threads, on which other work on the machine counts as little as can be; those of the clock stand
beside. Two last rows have attention alone over a row of 2,048 tokens: sequence by sequence (run/model/sequences.py) and
with a block-diagonal mask, in processor time forward and backward.

Rows are appended to tools/results/packing.csv. It measures no memory and no quality.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from bench_peers import append, common_columns
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lopt_edge import finetune
from lopt_edge.config.load import load_config
from lopt_edge.run.model.sequences import Sequences, attend
from lopt_edge.training.session.callbacks import StepRecord

MEAN, LONGEST, SPREAD = 200, 2048, 0.9  # tokens; of the logarithm of a length
RESULTS = Path(__file__).resolve().parent / "results" / "packing.csv"
COLUMNS = (
    "date", "hardware", "threads", "versions", "commit", "model", "shape", "dtype", "grad_accum", "steps", "way",
    "mean_tokens", "longest_tokens", "tokens", "cpu_seconds", "tokens_per_cpu_second", "tokens_per_second",
    "times_unpacked",
)  # fmt: skip


def lengths(n: int) -> list[int]:
    """The lengths of n sequences: log-normal, the longest LONGEST, scaled to the mean MEAN."""
    drawn = random.Random(0)
    found = [drawn.lognormvariate(0, SPREAD) for _ in range(n - 1)]
    factor = (MEAN * n - LONGEST) / sum(found)
    return [LONGEST, *(max(2, min(LONGEST, round(factor * length))) for length in found)]


@dataclass
class Timed:
    """The tokens and seconds of the steps after the first."""

    marks: list[tuple[float, float, int]] = field(default_factory=list)  # processor time, clock, tokens of the step

    def __call__(self, record: StepRecord) -> None:
        self.marks.append((time.process_time(), time.perf_counter(), record.tokens))

    @property
    def tokens(self) -> int:
        return sum(tokens for _, _, tokens in self.marks[1:])

    @property
    def seconds(self) -> tuple[float, float]:
        (cpu, clock, _), (cpu_end, clock_end, _) = self.marks[0], self.marks[-1]
        return cpu_end - cpu, clock_end - clock


def run(options: argparse.Namespace, root: Path, data: Sequence[dict[str, str]], *, packing: bool) -> Timed:
    """One run over the rows."""
    found = Timed()
    config = load_config(
        None,
        {
            "model": str(options.model), "data": "rows", "output": str(root / f"packing-{packing}"), "batch_size": 1,
            "grad_accum": options.grad_accum, "max_seq_len": LONGEST, "epochs": 1, "packing": packing, "device": "cpu",
            "compute_dtype": options.dtype, "cache_dir": options.cache_dir, "lora_r": options.lora_r,
        },
    )  # fmt: skip
    finetune(config, data=data, on_step=found)
    return found


def attention_seconds(row: tuple[int, ...], *, heads: int, kv_heads: int, head_dim: int) -> dict[str, float]:
    """The processor time of attention over a row, forward and backward, both ways."""
    n_tokens = sum(row)
    shapes = [(1, count, n_tokens, head_dim) for count in (heads, kv_heads, kv_heads)]
    parts = [torch.randn(shape).requires_grad_() for shape in shapes]
    of = torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row))
    mask = ((of == of[:, None]) & torch.ones(n_tokens, n_tokens, dtype=torch.bool).tril())[None, None]

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    ways = {
        "attention by sequence": lambda q, k, v: attend(torch.nn.Identity(), q, k, v, None, sequences=Sequences(row))[0],
        "attention with a mask": masked,
    }
    found = {}
    for name, way in ways.items():
        times = []
        for _ in range(5):
            begin = time.process_time()
            torch.autograd.grad(way(*parts).sum(), parts)
            times.append(time.process_time() - begin)
        found[name] = sorted(times)[2]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--cache-dir")
    parser.add_argument("--grad-accum", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3, help="the first one, with the largest window, is not counted")
    parser.add_argument("--lora-r", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--csv", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.device, options.seq_len = "cpu", LONGEST
    torch.set_num_threads(options.threads)
    sizes = lengths(options.grad_accum * options.steps)
    data = [{"text": " ".join(["the"] * size)} for size in sizes]  # a token a word, and one for the end
    shared = common_columns(options) | {"grad_accum": options.grad_accum}
    shared |= {"mean_tokens": round(sum(sizes) / len(sizes)), "longest_tokens": max(sizes)}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for packing in (False, True):
            found = run(options, Path(folder), data, packing=packing)
            cpu, clock = found.seconds
            row = {"way": "packed" if packing else "one sequence a micro-batch", "tokens": found.tokens}
            row |= {"cpu_seconds": f"{cpu:.2f}", "tokens_per_cpu_second": f"{found.tokens / cpu:.1f}"}
            rows.append(shared | row | {"tokens_per_second": f"{found.tokens / clock:.1f}"})
    rows[1]["times_unpacked"] = f"{float(rows[1]['tokens_per_cpu_second']) / float(rows[0]['tokens_per_cpu_second']):.2f}"
    row_of_2048 = (*[MEAN] * (LONGEST // MEAN), LONGEST % MEAN)
    for name, seconds in attention_seconds(row_of_2048, heads=14, kv_heads=2, head_dim=64).items():
        rows.append(shared | {"way": name, "shape": "14/2 heads of 64", "tokens": LONGEST, "cpu_seconds": f"{seconds:.4f}"})
    append(options.csv, rows, COLUMNS)
    for row in rows:
        print(row["way"], row.get("tokens_per_cpu_second", row["cpu_seconds"]), row.get("times_unpacked", ""), sep="\t")


if __name__ == "__main__":
    main()
