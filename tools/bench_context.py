"""Peak device memory against length, and the longest sequence that a card's memory can train on.

For each length, method and card: one real training step and its optimizer update (the second of two, so that moments
exist), in a process of its own, capped to the card's size with `set_per_process_memory_fraction`; what counts is the peak
of *reserved* bytes. `--longest` searches the longest length whose step completes, in grains of 8,192 tokens. Ids are
random, one sequence, all tokens supervised; the model is a folder of make_model.py (random weights in the real shape).

    python tools/make_model.py --shape llama-3.1-8b --quantized --output /tmp/l8b
    python tools/bench_context.py --model /tmp/l8b --device cuda --settings resident,streamed --seq-len 2048
    python tools/bench_context.py --model /tmp/l8b --device cuda --settings smallest --longest --card-gb 24,16,12,8

`--predict` needs no GPU and no weights: the same table from the planner's timeline, marked `predicted`. Settings:
`resident` keeps layers on the device and streams the lm_head by chunks, saved inputs and states on the tier below;
`streamed` keeps saved inputs and weights below; `smallest` everything. Rows go to tools/results/context.csv. It compares
with nobody (bench_peers.py does).
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lopt_edge.config.load import load_config
from lopt_edge.models.folder import find_model
from lopt_edge.plan.costs.predict import predict
from lopt_edge.plan.costs.shape import LayerShape
from lopt_edge.plan.costs.sizes import MicroBatchSize, Sizes
from lopt_edge.plan.facts.model import ModelFacts, facts_from_config
from lopt_edge.plan.methods import course_of
from lopt_edge.plan.schedule.build import StepKind, groups_of, step_plan
from lopt_edge.plan.schedule.knobs import Knobs
from lopt_edge.plan.schedule.passes import arrange
from lopt_edge.plan.schedule.validate import validate

RESULTS = Path(__file__).resolve().parent / "results" / "context.csv"
GRAIN = 8192
HOST_LIMIT = 32 << 30
COLUMNS = (
    "date", "kind", "machine", "torch", "model", "layers", "hidden", "dtype", "method", "settings", "card_gb", "tokens",
    "peak_device_mib", "peak_host_mib", "peak_disk_mib", "step_seconds", "tokens_per_second", "note",
)  # fmt: skip
LLAMA_8B = {"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}  # fmt: skip


def settings_of(name: str, n_layers: int, *, below: str) -> Knobs:
    """The memory settings of this name; `below` is the tier under the device."""
    resident = Knobs(("resident",) * n_layers, ("recompute",) * n_layers, saved_inputs=below, pages=below, states=below)
    streamed = replace(resident, weights=(below,) * n_layers)
    return {"resident": resident, "streamed": streamed, "smallest": replace(streamed, gradients=below)}[name]


def kind_of(method: str, facts: ModelFacts, *, num_segments: int) -> StepKind:
    """The method's kind of step."""
    config = load_config(None, {"method": method, "num_segments": num_segments}, placeholder="(none)")
    return course_of(config, facts.n_layers).kinds[0]


def predicted(facts: ModelFacts, options: argparse.Namespace, *, method: str, settings: str, tokens: int) -> dict[str, Any]:
    """The peaks by the timeline. Saved inputs go to disk where the host would take more than HOST_LIMIT."""
    below = "host" if options.device == "cuda" else "disk"
    knobs = settings_of(settings, facts.n_layers, below=below)
    kind = kind_of(method, facts, num_segments=options.num_segments)
    itemsize = 4 if options.dtype == "float32" else 2
    shape = LayerShape(facts, itemsize, options.lora_r, facts.linear_names, options.device)

    def run(knobs: Knobs) -> Any:
        plan = validate(arrange(step_plan(method, kind, n_micro_batches=1), knobs))
        return predict(plan, Sizes(shape, knobs), [MicroBatchSize(1, tokens, tokens - 1)])

    found = run(knobs)
    if found.host_bytes > HOST_LIMIT:
        found = run(replace(knobs, saved_inputs="disk"))
    return {
        "kind": "predicted",
        "peak_device_mib": found.device_bytes / 2**20,
        "peak_host_mib": found.host_bytes / 2**20,
        "peak_disk_mib": found.disk_bytes / 2**20,
        "note": found.peak_op,
    }


def measured(
    options: argparse.Namespace, *, method: str, settings: str, tokens: int, card_gb: float | None
) -> dict[str, Any]:
    """The figures of one step in a process of its own; a failed one gives its message as the note."""
    command = [sys.executable, __file__, "--child", json.dumps({
        "model": str(options.model), "method": method, "settings": settings, "tokens": tokens, "card_gb": card_gb,
        "device": options.device, "dtype": options.dtype, "lora_r": options.lora_r, "num_segments": options.num_segments,
        "page_dir": str(options.page_dir)})]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        return {"kind": "failed", "note": lines[-1][:200]}
    return {"kind": "measured", **json.loads(done.stdout.splitlines()[-1])}


def child(given: dict[str, Any]) -> None:
    """Load, run two steps, print the figures of the second."""
    import torch

    from lopt_edge.data import MicroBatch
    from lopt_edge.models.four_bit import four_bit_folder
    from lopt_edge.run.device import peak_device_bytes
    from lopt_edge.run.model.load import load_model
    from lopt_edge.run.model.lora import attach_adapters, layer_parameters
    from lopt_edge.run.step.batches import make_batch
    from lopt_edge.run.step.executor import Executor
    from lopt_edge.run.step.losses import ReconstructHead
    from lopt_edge.run.step.optim import SegmentOptimizer
    from lopt_edge.run.tiers.moves import Mover
    from lopt_edge.run.tiers.page_file import PageFile
    from lopt_edge.system.allocator import release_free_memory, settle_host_allocator

    settle_host_allocator()
    device, dtype = torch.device(given["device"]), getattr(torch, given["dtype"])
    if given["card_gb"] and device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, given["card_gb"] * 1e9 / total), device)
    source = find_model(given["model"])
    facts, method = source.facts, given["method"]
    knobs = settings_of(given["settings"], facts.n_layers, below="host" if device.type == "cuda" else "disk")
    kind = kind_of(method, facts, num_segments=given["num_segments"])
    plan = validate(arrange(step_plan(method, kind, n_micro_batches=1), knobs))
    Path(given["page_dir"]).mkdir(parents=True, exist_ok=True)
    page_file = PageFile(Path(given["page_dir"]), n_bytes=1 << 20, name="context")
    mover = Mover(device, page_file=page_file)
    folder, _ = four_bit_folder(source)
    model = load_model(folder, facts, device=device, dtype=dtype, placement=plan.placement, mover=mover)
    groups = [group for segment in kind.segments for group in groups_of(segment)]
    trained = [target for unit, target in groups if unit == "layer"]
    attach_adapters(model, trained, targets=facts.linear_names, r=given["lora_r"], alpha=2 * given["lora_r"])
    heads = {s.index: ReconstructHead(facts.hidden_size, seed=s.index).to(device) for s in kind.segments if s.has_head}
    parameters = {
        (unit, target): layer_parameters(model, target) if unit == "layer" else list(heads[target].parameters())
        for unit, target in groups
    }
    optimizer = SegmentOptimizer(parameters, mover=mover)
    executor = Executor(model, heads=heads, optimizer=optimizer, local_weight=10.0)
    release_free_memory()
    ids = torch.randint(0, facts.vocab_size, (1, given["tokens"]), generator=torch.Generator().manual_seed(0)).tolist()
    batch = make_batch(MicroBatch(ids, [[*ids[0][1:], -100]], (given["tokens"],)), device)
    seconds = 0.0
    for step in (1, 2):
        started = time.perf_counter()
        executor.run(plan, [batch], step=step, learning_rates={s.index: 1e-4 for s in kind.segments})
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
    print(
        json.dumps(
            {
                "peak_device_mib": peak_device_bytes(device) / 2**20,
                "peak_host_mib": mover.pinned.peak_bytes / 2**20,
                "peak_disk_mib": page_file.peak_bytes / 2**20,
                "step_seconds": seconds,
                "tokens_per_second": given["tokens"] / seconds,
                "machine": torch.cuda.get_device_name()
                if device.type == "cuda"
                else platform.processor() or platform.machine(),
            }
        )
    )
    mover.close()


def longest(fits: Callable[[int], bool], *, most: int) -> int:
    """The longest multiple of GRAIN that fits, by doubling and halving; 0 if not even one grain does."""
    low, high = 0, GRAIN
    while high <= most and fits(high):
        low, high = high, high * 2
    high = min(high, most + GRAIN)
    while high - low > GRAIN:
        middle = (low + high) // (2 * GRAIN) * GRAIN
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model folder (with --predict: default Llama-3.1-8B's shape)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--methods", default="e2e,lopt")
    parser.add_argument("--settings", default="resident,streamed,smallest")
    parser.add_argument("--seq-len", default="2048", help="lengths, separated by commas")
    parser.add_argument("--longest", action="store_true", help="search the longest length for each card")
    parser.add_argument("--card-gb", default="", help="card sizes in GB (10^9), e.g. 24,16,12,8")
    parser.add_argument("--most", type=int, default=1 << 20, help="longest length to try")
    parser.add_argument("--num-segments", type=int, default=2)
    parser.add_argument("--lora-r", type=int, default=16)
    parser.add_argument("--predict", action="store_true", help="from the timeline, without a GPU")
    parser.add_argument("--page-dir", type=Path, default=Path("/tmp/lopt-context-pages"))
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(json.loads(options.child))
        return
    facts = find_model(str(options.model)).facts if options.model else facts_from_config(LLAMA_8B, where="llama-3.1-8b")
    rows = []
    for card in [float(text) for text in options.card_gb.split(",") if text] or [None]:
        for method in options.methods.split(","):
            for settings in options.settings.split(","):
                rows += _rows(facts, options, method=method, settings=settings, card_gb=card)
    new = not options.csv.exists()
    with options.csv.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        if new:
            writer.writeheader()
        writer.writerows(rows)
    print(f"{len(rows)} rows appended to {options.csv}")


def _rows(
    facts: ModelFacts, options: argparse.Namespace, *, method: str, settings: str, card_gb: float | None
) -> list[dict[str, Any]]:
    def run(tokens: int) -> dict[str, Any]:
        if options.predict:
            return predicted(facts, options, method=method, settings=settings, tokens=tokens)
        return measured(options, method=method, settings=settings, tokens=tokens, card_gb=card_gb)

    def fits(tokens: int) -> bool:
        found = run(tokens)
        return found["kind"] != "failed" and (card_gb is None or found["peak_device_mib"] * 2**20 <= card_gb * 1e9)

    lengths = [int(text) for text in options.seq_len.split(",")]
    if options.longest:
        lengths = [found] if (found := longest(fits, most=options.most)) else []
    rows = []
    for tokens in lengths:
        row = {"date": date.today().isoformat(), "torch": version("torch"), "model": options.model or "llama-3.1-8b",
               "layers": facts.n_layers, "hidden": facts.hidden_size, "dtype": options.dtype, "method": method,
               "settings": settings, "card_gb": card_gb or "", "tokens": tokens, "machine": "", **run(tokens)}  # fmt: skip
        row = {key: round(value, 1) if isinstance(value, float) else value for key, value in row.items()}
        print(
            {key: row[key] for key in ("kind", "method", "settings", "card_gb", "tokens", "note") if key in row},
            {key: row.get(key) for key in ("peak_device_mib", "peak_host_mib", "peak_disk_mib", "step_seconds")},
            flush=True,
        )
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
