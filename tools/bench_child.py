"""The measured process of bench_peers.py: it loads one method, runs its steps, and returns what it took.

The rule: every method sees the same token ids, the same LoRA shape and the same clipping, so that first losses must agree.
Imports of libraries are inside the functions: what a process never uses it never imports, so none is charged with another
method's. What is built is built as its users build it: ours as `finetune` does, the baseline as a careful user writes it.

What it does not do: no processes, no rows, no CSV (bench_peers.py).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import psutil

CLIP = 1.0
SEED = 1234
Row = dict[str, Any]
Step = Callable[[int, list[list[int]]], float]  # (step number from 1, token ids by sequence) -> loss


def run_child(options: argparse.Namespace) -> Row:
    """Load one method, run its steps, and return what this process took."""
    import torch

    from lopt_edge.run.device import peak_device_bytes
    from lopt_edge.run.watch.clock import PhaseClock
    from lopt_edge.system.memory import peak_rss_bytes

    torch.set_num_threads(options.threads)
    device, clock = torch.device(options.device), PhaseClock()
    if device.type == "cuda" and options.memory_fraction:
        torch.cuda.set_per_process_memory_fraction(options.memory_fraction)
    if options.child == "quantise":
        return run_quantise(options, clock)
    step = (load_peers if options.child == "peers" else load_ours)(options, clock)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    measured = {
        **loading(clock),
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        "load_peak_device_bytes": peak_device_bytes(device),
    }
    vocabulary = json.loads((options.model / "config.json").read_text())["vocab_size"]
    seconds, losses = [], []
    for number in range(1, options.steps + 1):
        ids = token_ids(number, batch_size=options.batch_size, seq_len=options.seq_len, vocabulary=vocabulary)
        started = time.perf_counter()
        losses.append(step(number, ids))
        wait()
        seconds.append(time.perf_counter() - started)
    peaks = {"peak_rss_bytes": peak_rss_bytes(), "peak_device_bytes": peak_device_bytes(device)}
    return {**measured, **peaks, "seconds": seconds, "losses": losses}


def loading(clock: Any) -> Row:
    """The seconds and the peak of this process up to now, once the model is loaded."""
    from lopt_edge.system.memory import peak_rss_bytes

    alive, load_seconds = time.time() - psutil.Process().create_time(), clock.seconds["load"]
    return {"import_seconds": alive - load_seconds, "load_seconds": load_seconds, "load_peak_rss_bytes": peak_rss_bytes()}


def run_quantise(options: argparse.Namespace, clock: Any) -> Row:
    """Make our 4-bit copy in the cache; its seconds count as loading. Empty if it is there already."""
    from lopt_edge.models.folder import check_weights, find_model, tensor_entries
    from lopt_edge.models.four_bit import four_bit_folder, four_bit_path

    model, cache_dir = find_model(str(options.model)), str(options.cache_dir)
    check_weights(model, tensor_entries(model.path, model.facts))
    if not (four_bit_path(model, cache_dir=cache_dir) / "config.json").exists():
        import bitsandbytes  # noqa: F401  its import takes seconds, and is no part of quantising

    with clock.phase("load"):
        _, was_there = four_bit_folder(model, cache_dir=cache_dir)
    measured = loading(clock)
    return {} if was_there else {**measured, "peak_rss_bytes": measured["load_peak_rss_bytes"]}


def token_ids(step: int, *, batch_size: int, seq_len: int, vocabulary: int) -> list[list[int]]:
    """The ids of a step, one list a sequence: the same for every method."""
    import torch

    generator = torch.Generator().manual_seed(SEED + step)
    ids = torch.randint(vocabulary, (batch_size * seq_len,), generator=generator).tolist()
    return [ids[start : start + seq_len] for start in range(0, len(ids), seq_len)]


def our_config(options: argparse.Namespace) -> Any:
    """The settings of our run (a Config); its files are named but never read or written."""
    from lopt_edge.config.settings import Config

    return Config(
        model=str(options.model),
        data="(random ids)",
        output="(none)",
        method=options.child,
        grad_accum=1,
        max_seq_len=options.seq_len,
        lr=options.lr,
        clip=CLIP,
        lora_r=options.lora_r,
        lora_alpha=2 * options.lora_r,
        device=options.device,
        compute_dtype=options.dtype,
    )


def load_ours(options: argparse.Namespace, clock: Any) -> Step:
    """The step of our model and executor, which are built as `finetune` builds them."""
    import bitsandbytes  # noqa: F401  imported here so that loading is not charged with it
    import transformers  # noqa: F401

    from lopt_edge.data import IGNORED, MicroBatch
    from lopt_edge.models.folder import find_model
    from lopt_edge.models.four_bit import four_bit_folder
    from lopt_edge.plan.facts.budget import Budget
    from lopt_edge.plan.methods import course_of
    from lopt_edge.plan.schedule.build import step_plan
    from lopt_edge.plan.schedule.knobs import default_knobs
    from lopt_edge.plan.schedule.passes import arrange
    from lopt_edge.plan.schedule.validate import validate
    from lopt_edge.planning.settings import target_modules
    from lopt_edge.run.device import choose_device, choose_dtype
    from lopt_edge.run.model.load import load_model
    from lopt_edge.run.step.batches import make_batch
    from lopt_edge.system.allocator import settle_host_allocator
    from lopt_edge.training.prepare.build import build_executor
    from lopt_edge.training.prepare.inputs import Inputs

    config = our_config(options)
    settle_host_allocator()  # as finetune does
    with clock.phase("load"):
        source = find_model(config.model)
        folder, _ = four_bit_folder(source, cache_dir=str(options.cache_dir))
        device, _ = choose_device(config.device)
        dtype, _ = choose_dtype(config.compute_dtype, device)
        course = course_of(config, source.facts.n_layers)
        knobs = default_knobs(source.facts, device.type)
        knobs = replace(knobs, activations=(options.activations,) * source.facts.n_layers)
        whole: Any = SimpleNamespace(part=None)  # one process
        unread: Any = None  # there is no tokenizer and no data set: the batches are made below
        inputs = Inputs(
            config=config,
            source=source,
            tokenizer=unread,
            template=None,
            train=unread,
            held_out=None,
            retention=None,
            course=course,
            targets=target_modules(source.facts, config.lora_targets),
            device=device,
            dtype=dtype,
            knobs=knobs,
            budget=Budget(),
            ground=unread,
            workload=whole,
            run_plan=unread,
            reasons=(),
        )
        model = load_model(folder, source.facts, device=device, dtype=dtype)
        executor, _ = build_executor(inputs, model)
    plan = validate(arrange(step_plan(config.method, course.kinds[0], n_micro_batches=1), knobs))
    rates = {segment.index: options.lr for segment in plan.segments}

    def step(number: int, ids: list[list[int]]) -> float:
        targets = [[*row[1:], IGNORED] for row in ids]
        batch = make_batch(MicroBatch(ids, targets, tuple(map(len, ids))), device)
        return executor.run(plan, [batch], step=number, learning_rates=rates).loss

    return step


def load_peers(options: argparse.Namespace, clock: Any) -> Step:
    """The step of QLoRA as its users write it, without lopt-edge."""
    import accelerate  # noqa: F401
    import bitsandbytes  # noqa: F401
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    device = torch.device("cuda", torch.cuda.current_device()) if options.device == "cuda" else torch.device("cpu")
    dtype = getattr(torch, options.dtype)
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    quantised = json.loads((options.model / "config.json").read_text()).get("quantization_config")  # then it wins
    lora = LoraConfig(
        r=options.lora_r,
        lora_alpha=2 * options.lora_r,
        lora_dropout=0.0,
        bias="none",
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with clock.phase("load"):
        model = AutoModelForCausalLM.from_pretrained(
            options.model,
            dtype=dtype,
            attn_implementation="sdpa",
            device_map={"": device},
            **({} if quantised else {"quantization_config": four_bit}),
        )
        model.config.use_cache = False
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model = get_peft_model(model, lora)  # adapters are fp32
        model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=options.lr, weight_decay=0.0, fused=True)

    def step(number: int, ids: list[list[int]]) -> float:
        ids_BT = torch.tensor(ids, device=device)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=ids_BT, labels=ids_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step
