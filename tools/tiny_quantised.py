"""Writes a transformers folder in the quantised forms of other programs, for tests. Not a test itself.

It follows each format's definition element by element, in loops over bits that share no code with ours. Codes, scales and
zero points are random, so the model in such a folder is another one than its source: `write_quantised` returns its matrices
as the format defines them, (code - zero) * scale in the dtype of the scale.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 32
GPTQ = {"quant_method": "gptq", "group_size": GROUP, "desc_act": False}
FORMS: dict[str, dict[str, Any]] = {
    "gptq-2": GPTQ | {"bits": 2, "sym": False},
    "gptq-3": GPTQ | {"bits": 3, "sym": False, "checkpoint_format": "gptq_v2"},
    "gptq-4": GPTQ | {"bits": 4, "sym": True},
    "gptq-4-order": GPTQ | {"bits": 4, "sym": False, "desc_act": True},
    "gptq-4-row": GPTQ | {"bits": 4, "sym": False, "group_size": -1, "checkpoint_format": "gptq"},
    "gptq-8": GPTQ | {"bits": 8, "sym": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True},
    "awq-gemv": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemv", "zero_point": True},
    "packed-4": {"quant_method": "compressed-tensors", "format": "pack-quantized", "bits": 4, "zero": False},
    "packed-4-zero": {"quant_method": "compressed-tensors", "format": "pack-quantized", "bits": 4, "zero": True},
    "packed-8": {"quant_method": "compressed-tensors", "format": "pack-quantized", "bits": 8, "zero": False},
    "int8": {"quant_method": "compressed-tensors", "format": "int-quantized", "bits": 8, "zero": False},
    "float8": {"quant_method": "compressed-tensors", "format": "float-quantized", "bits": 8, "zero": False},
    "fp8": {"quant_method": "fp8", "weight_block_size": [32, 64], "activation_scheme": "dynamic"},
}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"]}
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # OCP Microscaling Formats v1.0; the highest of four bits is the sign


def write_quantised(source: Path, target: Path, form: str, *, seed: int = 0) -> dict[str, Tensor]:
    """Write the model of a folder with the linear layers of its decoder layers quantised (in "mxfp4": its experts); their
    matrices, in fp32."""
    if form == "mxfp4":
        return write_mxfp4(source, target, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    spec = dict(FORMS[form])
    tensors, values = load_file(target / "model.safetensors"), {}
    inside = [one for one in tensors if ".layers." in one and tensors[one].ndim == 2]
    for name in [one for one in inside if not one.endswith(".mlp.gate.weight")]:  # a router is left out, as published
        matrix = name.removesuffix(".weight")
        parts, values[name] = _WRITERS[spec["quant_method"]](tensors.pop(name), spec, generator)
        tensors |= {f"{matrix}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    if spec["quant_method"] == "compressed-tensors":
        weights = {"num_bits": spec.pop("bits"), "type": "int", "symmetric": not spec.pop("zero"), "strategy": "group"}
        spec["config_groups"] = {"group_0": {"targets": ["Linear"], "weights": weights}}
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": spec}))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return values


def write_mxfp4(source: Path, target: Path, *, seed: int = 0) -> dict[str, Tensor]:
    """Write a model with stacks of experts with those in MXFP4; the stacks' values as the format defines them, in fp32."""
    generator = torch.Generator().manual_seed(seed)
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    tensors, values = load_file(target / "model.safetensors"), {}
    for name in [one for one in tensors if ".experts." in one and tensors[one].ndim == 3]:
        n_experts, n_in, n_out = tensors.pop(name).shape
        codes = torch.randint(0, 16, (n_experts, n_out, n_in // 32, 32), generator=generator)
        scales = torch.randint(118, 124, (n_experts, n_out, n_in // 32), generator=generator)
        tensors[f"{name}_blocks"] = (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8)
        tensors[f"{name}_scales"] = scales.to(torch.uint8)
        signed = torch.tensor([*E2M1, *(-value for value in E2M1)])[codes] * 2.0 ** (scales.unsqueeze(-1) - 127)
        values[name] = signed.view(n_experts, n_out, n_in).transpose(1, 2).contiguous()
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": MXFP4}))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return values


def _random(shape: tuple[int, int], spec: dict[str, Any], generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, int]:
    """Codes (O, I), scales in [0.5, 1.5) of what keeps a row near norm 1, zero points (O, G), and the group's size."""
    n_out, n_in = shape
    group = n_in if spec.get("group_size", GROUP) == -1 else GROUP
    top = 1 << spec["bits"]
    codes = torch.randint(0, top, (n_out, n_in), generator=generator)
    scales = (torch.rand(n_out, n_in // group, generator=generator) + 0.5) * n_in**-0.5 / (top / 3.5)
    zeros = (
        torch.randint(1, top, (n_out, n_in // group), generator=generator) if spec["bits"] < 8 else 120 + 0 * codes[:, :1]
    )
    zeros = zeros.expand(n_out, n_in // group).clone()
    if spec.get("sym") or spec.get("zero") is False:
        zeros.fill_(top // 2)
    return codes, scales, zeros, group


def _values(codes: Tensor, scales: Tensor, zeros: Tensor, group: int, index: Tensor | None = None) -> Tensor:
    """(code - zero) * scale; `index`: the group of each column, if not one after the other."""
    index = torch.arange(codes.shape[1]) // group if index is None else index
    return ((codes - zeros[:, index]).to(scales.dtype) * scales[:, index]).float()


def _words(codes: Tensor, n_bits: int) -> Tensor:
    """Codes (rows, n) as int32 words (rows, n * bits / 32), bit after bit from the lowest on."""
    n_words = codes.shape[1] * n_bits // 32
    words = torch.zeros(len(codes), n_words, dtype=torch.int64)
    for column in range(codes.shape[1]):
        for bit in range(n_bits):
            place = column * n_bits + bit
            words[:, place // 32] |= (codes[:, column] >> bit & 1) << (place % 32)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _gptq(weight: Tensor, spec: dict[str, Any], generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    codes, scales, zeros, group = _random(tuple(weight.shape), spec, generator)
    scales = scales.half()
    index = torch.arange(weight.shape[1]) // group
    if spec["desc_act"]:
        index = index[torch.randperm(len(index), generator=generator)]
    stored = zeros - int(spec.get("checkpoint_format", "gptq") == "gptq")
    parts = {
        "qweight": _words(codes, spec["bits"]).T,
        "qzeros": _words(stored.T.contiguous(), spec["bits"]),
        "scales": scales.T,
        "g_idx": index.int(),
    }
    return parts, _values(codes, scales, zeros, group, index)


def _awq(weight: Tensor, spec: dict[str, Any], generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    codes, scales, zeros, group = _random(tuple(weight.shape), spec, generator)
    scales = scales.half()
    if spec["version"] == "gemv":
        n_groups = scales.shape[1]
        padded = math.ceil(math.ceil(n_groups / 8) / 4) * 4  # words, in fours for groups of 32
        wide = torch.zeros(len(codes), 8 * padded, dtype=torch.int64)
        wide[:, :n_groups] = zeros
        wide_scales = torch.zeros(len(codes), 8 * padded, dtype=torch.float16)
        wide_scales[:, :n_groups] = scales
        parts = {"qweight": _words(codes, 4), "qzeros": _words(wide, 4), "scales": wide_scales}
        return parts, _values(codes, scales, zeros, group)

    def packed(by_output: Tensor) -> Tensor:
        mixed = by_output.clone()
        for place, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            mixed[:, place::8] = by_output[:, output::8]
        return _words(mixed, 4)

    parts = {"qweight": packed(codes.T.contiguous()), "qzeros": packed(zeros.T.contiguous()), "scales": scales.T}
    return parts, _values(codes, scales, zeros, group)


def _compressed(weight: Tensor, spec: dict[str, Any], generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    codes, scales, zeros, group = _random(tuple(weight.shape), spec, generator)
    scales, half = scales.bfloat16(), 1 << (spec["bits"] - 1)
    if spec["format"] == "pack-quantized":
        shape = torch.tensor(weight.shape)
        parts = {"weight_packed": _words(codes, spec["bits"]), "weight_scale": scales, "weight_shape": shape}
        if spec["zero"]:
            parts["weight_zero_point"] = _words(zeros.T.contiguous(), spec["bits"]).T
        return parts, _values(codes, scales, zeros, group)
    scales = scales[:, :1].contiguous()
    if spec["format"] == "int-quantized":
        return {"weight": (codes - half).to(torch.int8), "weight_scale": scales}, _values(
            codes, scales, zeros[:, :1], weight.shape[1]
        )
    floats = weight.to(torch.float8_e4m3fn)
    return {"weight": floats, "weight_scale": scales * 50}, (floats.bfloat16() * (scales * 50)).float()


def _fp8(weight: Tensor, spec: dict[str, Any], generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    rows, columns = spec["weight_block_size"]
    floats = weight.to(torch.float8_e4m3fn)
    scales = torch.rand(-(-weight.shape[0] // rows), weight.shape[1] // columns, generator=generator) + 0.5
    wide = scales.repeat_interleave(rows, 0)[: len(weight)].repeat_interleave(columns, 1)
    return {"weight": floats, "weight_scale_inv": scales}, floats.float() * wide


_WRITERS = {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed, "fp8": _fp8}
