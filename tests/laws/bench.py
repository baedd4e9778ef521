"""A small workbench for law tests: a model with adapters that matter, batches with padding, an executor, gradients.

B is drawn at random (a fresh adapter's B is zero, which would hide every error in dA and dx).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from lopt_edge.adapters.merge import merged_tensors
from lopt_edge.data import MicroBatch
from lopt_edge.models.folder import find_model
from lopt_edge.objectives import OBJECTIVES
from lopt_edge.plan.facts.device_kinds import TORCH
from lopt_edge.plan.facts.model import ModelFacts
from lopt_edge.plan.schedule.build import step_plan
from lopt_edge.plan.schedule.knobs import TOKEN_TILES, Knobs, default_knobs, mlp_pieces
from lopt_edge.plan.schedule.ops import Plan
from lopt_edge.plan.schedule.passes import arrange
from lopt_edge.plan.schedule.processes import Part, cut_for_process, own_knobs
from lopt_edge.plan.schedule.ranks import for_ranks
from lopt_edge.plan.schedule.validate import validate
from lopt_edge.run.model.averages import Averages
from lopt_edge.run.model.load import Model, load_model
from lopt_edge.run.model.lora import attach_adapters, layer_parameters
from lopt_edge.run.model.replaced import fit_layers, group_parameters, loading_placement, mixtures
from lopt_edge.run.step.batches import Batch, Choices, make_batch
from lopt_edge.run.step.evaluation import held_out_loss
from lopt_edge.run.step.executor import Executor
from lopt_edge.run.step.losses import ReconstructHead
from lopt_edge.run.step.optim import SegmentOptimizer
from lopt_edge.run.tiers.moves import Delay, Mover
from lopt_edge.run.tiers.page_file import PageFile
from quant.headers import SINGLE_NAME
from tests.plan.plans import make_course

LOCAL_WEIGHT, BASELINE = 10.0, 0.7


def transformers_model(folder: Path) -> nn.Module:
    """transformers' model of a 4-bit folder, in training mode: in evaluation mode bitsandbytes repacks the weights for
    another kernel on some CPUs.

    It packs no experts: a model that has some gets all matrices as they unpack, and runs one expert after the other.
    """
    facts = find_model(str(folder)).facts
    kernel = "eager" if facts.family.attention == "query tiles" else "sdpa"
    kind = AutoModelForImageTextToText if facts.wrapper else AutoModelForCausalLM
    if facts.family.experts is None:
        return kind.from_pretrained(folder, attn_implementation=kernel).train()
    plain = folder.with_name(f"{folder.name}-unpacked")
    if not plain.exists():
        ours = load_model(folder, facts, device=torch.device("cpu"), dtype=torch.float32)
        dtype = getattr(torch, facts.recorded_dtype)
        plain.mkdir()
        save_file({name: tensor.to(dtype) for name, tensor in merged_tensors(ours, folder)}, plain / SINGLE_NAME,
                  metadata={"format": "pt"})  # fmt: skip
        config = json.loads((folder / "config.json").read_text())
        del config["quantization_config"]
        (plain / "config.json").write_text(json.dumps(config))
    options = {"attn_implementation": kernel, "experts_implementation": "eager"}
    return by_rows(kind.from_pretrained(plain, **options).train(), facts)


def by_rows(model: nn.Module, facts: ModelFacts) -> nn.Module:
    """The model with its stacks of experts in memory as ours unpack them, a matrix row by row, where the family has them
    column by column: the same numbers, and then the same kernel for products of a few tokens."""
    for name, parameter in model.named_parameters():
        if (
            facts.family.experts is not None
            and facts.family.experts.transposed
            and ".experts." in name
            and parameter.ndim == 3
        ):
            parameter.data = parameter.data.transpose(1, 2).contiguous().transpose(1, 2)
    return model


@dataclass
class Bench:
    model: Model
    plan: Plan  # of the kind of step that is looked at
    plans: dict[str, Plan]
    heads: dict[int, ReconstructHead]
    executor: Executor

    def names(self) -> dict[str, torch.nn.Parameter]:
        """Every parameter that gets a gradient by a readable name."""
        found = {}
        for segment in self.plan.own_segments:
            for layer in segment.trained:
                found |= {f"layer {layer} {i}": p for i, p in enumerate(group_parameters(self.model, layer))}
            if segment.has_head:
                head = self.heads[segment.index]
                found |= {f"head {segment.index} {name}": p for name, p in head.named_parameters()}
        return found

    def of_kind(self, name: str) -> Bench:
        """The same model and optimizer, with the plan of another kind of step."""
        return replace(self, plan=self.plans[name])

    def gradients(self, batches: list[Batch], *, step: int = 1, align_weight: float = 0.0) -> dict[str, Tensor]:
        """Gradients of one step as the executor makes them (the plan without what its gradients change)."""
        ops = tuple(op for op in self.plan.ops if op.kind not in ("STEP", "AVERAGE") and op.item != "states")
        plan = replace(self.plan, n_micro_batches=len(batches), ops=ops)
        self.result = self.executor.run(plan, batches, step=step, learning_rates={}, align_weight=align_weight)
        return self.take_gradients()

    def evaluate(
        self, batches: list[Batch], *, token_tile: int = TOKEN_TILES[0], between: Callable[[], None] = lambda: None
    ) -> float:
        link = self.executor.link
        return held_out_loss(self.model, batches, token_tile=token_tile, between=between, link=link)

    def take_gradients(self) -> dict[str, Tensor]:
        taken = {}
        for name, parameter in self.names().items():
            assert parameter.grad is not None, name
            taken[name] = parameter.grad.clone()
        self.executor.optimizer.drop_gradients()
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
    rank: int = 4,
    targets: tuple[str, ...] | None = None,
    device: str = "cpu",
    knobs: Knobs | None = None,
    page_dir: Path | None = None,
    delay: Delay | None = None,
    part: Part | None = None,
    ranks: int = 1,
    kernels: str = TORCH,
    **options: Any,
) -> Bench:
    """`options` are the method's own. Without `knobs` everything lies on the device; with them, in `page_dir` and wherever
    they say. `part`: what one process of a pipeline has of all that. `ranks`: so many share a step."""
    facts = find_model(str(folder)).facts
    knobs = knobs or default_knobs(facts, device)
    page_file = None if page_dir is None else PageFile(page_dir, n_bytes=1 << 16, name="law")
    mover = Mover(torch.device(device), page_file=page_file, delay=delay)
    course = make_course(method, n_layers=facts.n_layers, num_segments=num_segments, **options)
    steps = {kind.name: step_plan(method, kind, n_micro_batches=n_micro_batches) for kind in course.kinds}
    if part is not None:
        knobs, steps = own_knobs(knobs, part), {name: cut_for_process(step, part) for name, step in steps.items()}
    if ranks > 1:
        usual = {kind.name: step_plan(method, kind, n_micro_batches=1) for kind in course.kinds}
        steps = {name: for_ranks(step, usual[name], ranks=ranks) for name, step in steps.items()}
    plans = {name: arrange(step, knobs) for name, step in steps.items()}
    for plan in plans.values():
        validate(plan, clip_scope=clip_scope if clip else "none")
    plan = next(iter(plans.values()))
    placement = loading_placement(knobs, course.replaced)
    pieces = mlp_pieces(knobs, device)
    model = load_model(
        folder,
        facts,
        device=torch.device(device),
        dtype=dtype,
        placement=placement,
        mover=mover,
        pieces=pieces,
        kernels=kernels,
    )
    fit_layers(model, course.replaced)
    for layer in course.replaced:  # weights drawn at random explain nothing of each other: what is fitted is next to 0
        for index, (_, mixture) in enumerate(mixtures(model, layer)):
            mixture.mix.data.copy_(torch.tensor([0.9 - 0.1 * index, 0.3 * (-1) ** index]))
    trained = [layer for layer in course.adapted if layer in model.here]
    attach_adapters(model, trained, targets=targets or facts.linear_names, r=rank, alpha=8, dropout=dropout, seed=3)
    generator = torch.Generator().manual_seed(5)
    wanted = targets or facts.linear_names
    for layer in course.adapted:  # those of other processes are drawn, too
        widths = [linear.out_features for linear in facts.layer(layer).linears if linear.short_name in wanted]
        drawn = [torch.empty(rank, width).normal_(0, 0.1, generator=generator) for width in widths]
        for values, b in zip(drawn, layer_parameters(model, layer)[1::2] if layer in trained else (), strict=False):
            b.data.copy_(values)
    groups = [group for group in course.groups if part is None or part.owns(group)]
    heads = {
        index: ReconstructHead(facts.hidden_size, seed=7 + index).to(device) for unit, index in groups if unit == "aux"
    }
    parameters = {
        (unit, target): group_parameters(model, target) if unit == "layer" else list(heads[target].parameters())
        for unit, target in groups
    }
    optimizer = SegmentOptimizer(parameters, mover=mover, clip=clip, clip_scope=clip_scope, optimizer=knobs.optimizer)
    averages = Averages(model, course.averaged, momentum=options.get("ema_momentum", 0.99)) if course.averaged else None
    executor = Executor(
        model,
        heads=heads,
        optimizer=optimizer,
        local_weight=LOCAL_WEIGHT,
        averages=averages,
        cascade_weight=options.get("cascade_weight", 0.999),
    )
    return Bench(model, plan, plans, heads, executor)


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


def as_choices(batch: Batch, objective: str, *, seed: int = 0) -> Batch:
    """The batch as pairs, or with labels that differ; references are drawn near what a random model gives."""
    starts = torch.tensor([place.start for place in batch.places])
    owner = torch.searchsorted(starts, batch.supervised_N.cpu(), right=True) - 1
    n_targets = tuple(torch.bincount(owner, minlength=len(starts)).tolist())
    drawn = torch.randn(len(n_targets), generator=torch.Generator().manual_seed(seed)).tolist()
    reference = tuple(-5.8 * n + 3 * one for n, one in zip(n_targets, drawn, strict=True))
    preferred = tuple(place % 2 == 0 for place in range(len(n_targets)))
    return replace(batch, choices=Choices(preferred, n_targets, OBJECTIVES[objective].together, reference, BASELINE))


def in_a_row(batches: list[Batch]) -> Batch:
    """Batches of one sequence each in one row."""
    ids = [row for batch in batches for row in batch.ids_BT[0].tolist()]
    targets = [-100] * len(ids)
    start = 0
    for batch in batches:
        for at, target in zip(batch.supervised_N.tolist(), batch.targets_N.tolist(), strict=True):
            targets[start + at] = target
        start += batch.n_tokens
    lengths = tuple(batch.n_tokens for batch in batches)
    found = make_batch(MicroBatch([ids], [targets], lengths, packed=True), torch.device("cpu"))
    return replace(found, examples=tuple(range(len(batches))))
