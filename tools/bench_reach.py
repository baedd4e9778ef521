"""Compares the kinds of step of a boundary that closes, in one process: open, closed, closed with its cache.

    python tools/make_model.py --shape qwen2.5-0.5b --output /tmp/model
    python tools/bench_reach.py --model /tmp/model [--seq-len 512] [--repeats 3]

The rule: the kinds take turns on the same batch, and what is compared is the process' CPU time (one thread), so that a
machine that does other things beside it disturbs all kinds alike; the ratio to the open step, which is `e2e`'s, is what may
be quoted, not the seconds. A cached step reads what a filling step wrote. One layer is recomputed at a time. The bytes are
the planner's for each kind alone, moments of closed layers let go (a law compares such predictions with tracked bytes).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lopt_edge.config.load import load_config  # noqa: E402
from lopt_edge.models.folder import find_model  # noqa: E402
from lopt_edge.models.four_bit import four_bit_folder  # noqa: E402
from lopt_edge.plan.schedule.knobs import default_knobs  # noqa: E402
from lopt_edge.planning.worst_case import question  # noqa: E402
from lopt_edge.run.tiers.feature_cache import FeatureCache  # noqa: E402
from tests.laws.bench import Bench, make_bench, random_batch  # noqa: E402

KINDS = ("open", "closed-fill", "closed-read")
COURSE = {"method": "lopt", "open_until": 0.25, "epochs": 2}


def seconds(bench: Bench, *, seq_len: int, repeats: int, scratch: Path) -> dict[str, float]:
    """The median CPU seconds of a step of each kind, after one of each that warms up."""
    batch = replace(random_batch((seq_len,), vocab=bench.model.facts.vocab_size), examples=(0,))
    bench.executor.caches["boundary"] = FeatureCache(
        scratch, identity={}, lengths=[seq_len], width=bench.model.facts.hidden_size
    )
    rates, found = dict.fromkeys(range(2), 1e-4), {kind: list[float]() for kind in KINDS}
    for step in range(1, repeats + 2):
        for kind in KINDS:
            plan = replace(bench.plans[kind], closed=0)  # open steps come again here
            started = time.process_time()
            bench.executor.run(plan, [batch], step=step, learning_rates=rates)
            found[kind].append(time.process_time() - started)
    return {kind: median(times[1:]) for kind, times in found.items()}


def predicted_bytes(model: Path, *, seq_len: int) -> dict[str, int]:
    """The planner's bytes of each kind of step, and the whole run's share of seconds under `course`."""
    given = {"model": str(model), "max_seq_len": seq_len, "grad_accum": 1, "device": "cpu", **COURSE}
    workload = question(load_config(None, given, placeholder="(none)")).search.workload
    knobs = default_knobs(workload.shape.facts, "cpu")
    return {kind.name: workload.predict(knobs, kind=kind).device_bytes for kind in workload.kinds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cache-dir", type=Path, default=Path(tempfile.gettempdir()) / "lopt-edge-bench")
    options = parser.parse_args()
    torch.set_num_threads(1)
    n_bytes = predicted_bytes(options.model, seq_len=options.seq_len)
    folder, _ = four_bit_folder(find_model(str(options.model)), cache_dir=str(options.cache_dir))
    with tempfile.TemporaryDirectory() as scratch:
        bench = make_bench(folder, rank=16, boundary_cache="given", **COURSE)
        times = seconds(bench, seq_len=options.seq_len, repeats=options.repeats, scratch=Path(scratch))
        bench.executor.mover.close()
    print(f"{'kind of step':14s} {'of an open one':>15s} {'predicted MiB':>14s}")
    for kind in KINDS:
        print(f"{kind:14s} {times[kind] / times['open']:15.3f} {n_bytes[kind] / 2**20:14.0f}")
    run = 0.25 * times["open"] + 0.5 * times["closed-fill"] + 0.25 * times["closed-read"]
    print(f"a run of two epochs, closed at a quarter: {run / times['open']:.3f} of e2e's steps")


if __name__ == "__main__":
    main()
