"""Whole tiny models on a device, for `lopt-edge doctor --prove`: gradients of every family, tiers, our own kernels.

- Each family: a step on a tiny random model of it, with LoRA on every linear layer; the gradients are held against those of
  transformers' own model with the same 4-bit weights, in float64 on the CPU. Its kinds of layers are all there.
- Each tier: the same step with weights, saved inputs, activations and gradients on the host and on disk, held against the
  step with all on the device.
- Our own kernels, where a run would take them: the same step with them.

Numbers of the tiny models are rounded to bfloat16 first, so that both sides start from the same. In half precision only
families without experts are tried: a router's rounding may send a token elsewhere, which is no error of a device.

It needs no test suite and no network. Whole runs, from the command line, are prove_runs.py's.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lopt_edge.adapters.merge import merged_tensors
from lopt_edge.data import MicroBatch
from lopt_edge.models.folder import find_model
from lopt_edge.models.four_bit import quantise_model
from lopt_edge.models.tiny import VOCABULARY, random_model, smaller
from lopt_edge.plan.facts.device_kinds import TORCH, TRITON
from lopt_edge.plan.facts.families import FAMILIES, PLAIN
from lopt_edge.plan.facts.presets import known_config
from lopt_edge.plan.schedule.build import step_plan
from lopt_edge.plan.schedule.effects import Kind
from lopt_edge.plan.schedule.knobs import Knobs, default_knobs, mlp_pieces, placement_of
from lopt_edge.plan.schedule.ops import GroupName
from lopt_edge.plan.schedule.passes import arrange
from lopt_edge.plan.schedule.segments import Segment
from lopt_edge.run.device import DTYPES
from lopt_edge.run.devices.interface import Device
from lopt_edge.run.kernels.checks import relative
from lopt_edge.run.kernels.choice import why_not
from lopt_edge.run.model.load import load_model
from lopt_edge.run.model.lora import attach_adapters, layer_parameters
from lopt_edge.run.step.batches import make_batch
from lopt_edge.run.step.executor import Executor
from lopt_edge.run.step.optim import SegmentOptimizer
from lopt_edge.run.tiers.moves import Mover
from lopt_edge.run.tiers.page_file import PageFile
from lopt_edge.tracing.proof import lora_gradients
from quant.headers import SINGLE_NAME

BOUNDS = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}  # of a whole model's gradients, relative to their norm
N_LAYERS, LENGTH, RANK = 4, 40, 4
CONFIG_NAME, METADATA = "config.json", {"format": "pt"}
Work = Callable[[], float]


def model_proofs(own: Device) -> Iterator[tuple[str, float, Work]]:
    """Yield (name, bound, what gives the error) of each proof on a device."""
    half = str(own.auto_dtype()[0]).removeprefix("torch.")
    for family in sorted(FAMILIES):
        for name in ("float32",) if FAMILIES[family].experts is not None else dict.fromkeys(("float32", half)):
            yield f"gradients of a tiny {family}, {name}", BOUNDS[name], partial(_family, own, family, DTYPES[name])
    exact = 0.0 if own.kind.computes_on_cores else BOUNDS[half]  # a GPU's sums may come in another order
    for tier in ("host", "disk") if own.kind.host_is_below else ("disk",):
        for activations in ("page", "recompute"):
            yield (
                f"a step with all on the {tier}, activations {activations}",
                exact,
                partial(_tiers, own, tier, activations),
            )
    if why_not(own.device) is None:
        yield f"a step with our own kernels, {half}", BOUNDS[half], partial(_own_kernels, own)


def tiny_config(family: str) -> Any:
    """transformers' config of a tiny model of a family: as its record says, else of a known model or with transformers' own
    defaults, made smaller."""
    from transformers import AutoConfig

    shown = FAMILIES[family].shown
    if "hidden_size" in shown:
        return AutoConfig.for_model(family, **shown)
    values = known_config(family) | {**shown}
    return smaller(AutoConfig.for_model(family, **values), n_layers=N_LAYERS)


def _packed(root: Path, family: str) -> Path:
    """The 4-bit folder of a tiny model of a family."""
    made = random_model(tiny_config(family))
    for parameter in made.parameters():
        parameter.data = parameter.data.bfloat16().float()
    made.save_pretrained(root / "source")
    quantise_model(find_model(str(root / "source")), root / "packed")
    return root / "packed"


def _reference(packed: Path) -> nn.Module:
    """transformers' own model with the numbers of a 4-bit folder, in float64 on the CPU. Experts run one after the other:
    its product of all at once knows no float64."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    ours = load_model(packed, find_model(str(packed)).facts, device=torch.device("cpu"), dtype=torch.float32)
    plain, classes = packed.with_name("plain"), AutoModelForCausalLM  # type: Path, Any
    plain.mkdir()
    save_file(
        {name: tensor.float() for name, tensor in merged_tensors(ours, packed)}, plain / SINGLE_NAME, metadata=METADATA
    )
    config = json.loads((packed / CONFIG_NAME).read_text(encoding="utf-8"))
    del config["quantization_config"]
    (plain / CONFIG_NAME).write_text(json.dumps(config), encoding="utf-8")
    how = {"dtype": torch.float64, "attn_implementation": "eager", "experts_implementation": "eager"}
    made: nn.Module = classes.from_pretrained(plain, **how).eval()
    return made


def _family(own: Device, family: str, dtype: torch.dtype) -> float:
    with tempfile.TemporaryDirectory(prefix="lopt-edge-prove-") as folder:
        packed = _packed(Path(folder), family)
        mover = Mover(own.device)
        try:
            ours = load_model(packed, find_model(str(packed)).facts, device=own.device, dtype=dtype, mover=mover)
            found = list(lora_gradients(ours, _reference(packed)))
        finally:
            mover.close()
    if any((mine is None) != (exact is None) for _, mine, exact in found):
        raise ValueError("only one of the two has a gradient")
    return max(relative(mine, exact) for _, mine, exact in found if mine is not None and exact is not None)


def _tiers(own: Device, tier: str, activations: str) -> float:
    def placed(knobs: Knobs) -> Knobs:
        everywhere: Any = tier
        return replace(
            knobs,
            weights=(everywhere,) * N_LAYERS,
            activations=(activations,) * N_LAYERS,
            saved_inputs=everywhere,
            pages=everywhere,
            gradients=everywhere,
            head="disk",
        )

    return _compared(own, placed)


def _own_kernels(own: Device) -> float:
    return _compared(own, lambda knobs: knobs, kernels=TRITON)


def _compared(own: Device, placed: Callable[[Knobs], Knobs], *, kernels: str = TORCH) -> float:
    """The largest error of a step's gradients against the step with all on the device and torch's kernels."""
    with tempfile.TemporaryDirectory(prefix="lopt-edge-prove-") as folder, own.made_deterministic():
        packed = _packed(Path(folder), PLAIN)
        usual = default_knobs(find_model(str(packed)).facts, own.kind.name)
        expected = _step(own, packed, usual, kernels=TORCH)
        found = _step(own, packed, placed(usual), kernels=kernels)
    return max(relative(mine, theirs.cpu().double()) for mine, theirs in zip(found, expected, strict=True))


def _step(own: Device, packed: Path, knobs: Knobs, *, kernels: str) -> list[Tensor]:
    """The gradients of one step of two micro-batches on a tiny Llama."""
    facts, pieces = find_model(str(packed)).facts, mlp_pieces(knobs, own.kind.name)
    mover = Mover(own.device, page_file=PageFile(packed.parent, n_bytes=1 << 16, name="prove"))
    placement = placement_of(knobs)
    try:
        model = load_model(
            packed, facts, device=own.device, dtype=own.auto_dtype()[0], placement=placement, mover=mover, pieces=pieces,
            kernels=kernels,
        )  # fmt: skip
        attach_adapters(model, range(N_LAYERS), targets=facts.linear_names, r=RANK, alpha=2 * RANK, seed=3)
        generator = torch.Generator().manual_seed(5)
        groups: dict[GroupName, list[nn.Parameter]] = {}
        for layer in range(N_LAYERS):
            groups["layer", layer] = layer_parameters(model, layer)
            for b in groups["layer", layer][1::2]:
                b.data.copy_(torch.empty(b.shape).normal_(0, 0.1, generator=generator))
        optimizer = SegmentOptimizer(groups, mover=mover, clip=0.0, clip_scope="segment", optimizer="adamw")
        plan = arrange(step_plan("e2e", (Segment(0, 0, N_LAYERS - 1, "task"),), n_micro_batches=2), knobs)
        plan = replace(plan, ops=tuple(op for op in plan.ops if op.kind is not Kind.STEP and op.item != "states"))
        drawn = torch.randint(3, VOCABULARY - 1, (2, 2, LENGTH), generator=generator).tolist()
        batches = [
            make_batch(MicroBatch(rows, [[*row[1:], -100] for row in rows], (LENGTH,) * 2), own.device) for rows in drawn
        ]
        Executor(model, heads={}, optimizer=optimizer, local_weight=1.0).run(plan, batches, step=1, learning_rates={})
        return [_gradient(one) for group in groups.values() for one in group]
    finally:
        mover.close()


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        raise ValueError("a parameter has no gradient")
    return parameter.grad.cpu().clone()
