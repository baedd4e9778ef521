"""A small workbench for law tests: a model with adapters that matter, batches with padding, an executor, gradients.

B is drawn at random (a fresh adapter's B is zero, which would hide every error in dA and dx).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lopt_edge.data import MicroBatch
from lopt_edge.models import find_model
from lopt_edge.plan.methods import step_plan
from lopt_edge.plan.ops import Plan
from lopt_edge.plan.placement import weight_placement
from lopt_edge.plan.segments import make_segments
from lopt_edge.plan.validate import validate
from lopt_edge.run.batches import Batch, make_batch
from lopt_edge.run.executor import Executor
from lopt_edge.run.load import Model, load_model
from lopt_edge.run.lora import attach_adapters, layer_parameters
from lopt_edge.run.losses import ReconstructHead
from lopt_edge.run.optim import SegmentOptimizer

LOCAL_WEIGHT = 10.0


@dataclass
class Bench:
    model: Model
    plan: Plan
    heads: dict[int, ReconstructHead]
    executor: Executor

    def names(self) -> dict[str, torch.nn.Parameter]:
        """Every trained parameter by a readable name."""
        found = {}
        for segment in self.plan.segments:
            if segment.loss == "none":
                continue
            for layer in segment.layers:
                found |= {f"layer {layer} {i}": p for i, p in enumerate(layer_parameters(self.model, layer))}
        for index, head in self.heads.items():
            found |= {f"head {index} {name}": p for name, p in head.named_parameters()}
        return found

    def gradients(self, batches: list[Batch], *, step: int = 1) -> dict[str, Tensor]:
        """Gradients of one step as the executor makes them (the plan without its STEPs)."""
        ops = tuple(op for op in self.plan.ops if op.kind != "STEP")
        plan = Plan(self.plan.method, self.plan.n_layers, len(batches), self.plan.segments, self.plan.placement, ops)
        self.result = self.executor.run(plan, batches, step=step, learning_rates={})
        return self.take_gradients()

    def take_gradients(self) -> dict[str, Tensor]:
        taken = {}
        for name, parameter in self.names().items():
            assert parameter.grad is not None, name
            taken[name], parameter.grad = parameter.grad.clone(), None
        return taken


def make_bench(
    folder: Path,
    *,
    method: str = "lopt",
    num_segments: int = 2,
    n_micro_batches: int = 1,
    dtype: torch.dtype = torch.float32,
    clip: float = 1.0,
    clip_scope: str = "segment",
    dropout: float = 0.0,
    targets: tuple[str, ...] | None = None,
    device: str = "cpu",
) -> Bench:
    facts = find_model(str(folder)).facts
    model = load_model(folder, facts, device=torch.device(device), dtype=dtype)
    segments = make_segments(method, n_layers=facts.n_layers, num_segments=num_segments)
    trained = [layer for s in segments if s.loss != "none" for layer in s.layers]
    attach_adapters(model, trained, targets=targets or facts.linear_names, r=4, alpha=8, dropout=dropout, seed=3)
    generator = torch.Generator().manual_seed(5)
    for layer in trained:
        for b in layer_parameters(model, layer)[1::2]:
            b.data.copy_(torch.empty(b.shape).normal_(0, 0.1, generator=generator))
    heads = {
        s.index: ReconstructHead(facts.hidden_size, seed=7 + s.index).to(device)
        for s in segments
        if s.loss == "reconstruct"
    }
    parameters = {
        s.index: [p for layer in s.layers for p in layer_parameters(model, layer)]
        + (list(heads[s.index].parameters()) if s.index in heads else [])
        for s in segments
        if s.loss != "none"
    }
    optimizer = SegmentOptimizer(parameters, clip=clip, clip_scope=clip_scope)
    plan = step_plan(method, segments, n_micro_batches=n_micro_batches, placement=weight_placement(facts, device))
    validate(plan, clip_scope=clip_scope)
    return Bench(model, plan, heads, Executor(model, heads=heads, optimizer=optimizer, local_weight=LOCAL_WEIGHT))


def random_batch(
    lengths: tuple[int, ...], *, seed: int = 0, vocab: int = 320, prompt: int = 3, device: str = "cpu"
) -> Batch:
    """Right-padded random sequences; the first `prompt` tokens are unsupervised."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, vocab, (length,), generator=generator).tolist() for length in lengths]
    longest = max(lengths)
    targets = [[-100 if t + 1 < prompt else row[t + 1] for t in range(len(row) - 1)] + [-100] for row in rows]
    return make_batch(
        MicroBatch(
            input_ids=[row + [0] * (longest - len(row)) for row in rows],
            targets=[row + [-100] * (longest - len(row)) for row in targets],
            lengths=lengths,
        ),
        torch.device(device),
    )
