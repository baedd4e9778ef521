"""One real NF4 + LoRA layer, forward and backward, against a float64 reference: does 4-bit arithmetic work here?

The reference decodes the 4-bit codes from the format's definition, so it shares no kernel with what it checks. Used by
`lopt-edge doctor` on every device and dtype that a run may use. A check never raises: what it met is in its `fault`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

from quant.nf4 import PackedWeight

TOKENS, WIDTH_IN, WIDTH_OUT, RANK, SCALE = 64, 256, 384, 8, 2.0  # the checked layer
# Largest accepted error, |found - exact| / |exact|: a few roundings of the dtype. Seen on a CPU: 3e-7 and 2.4e-3.
BOUNDS = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}
PACKING_BOUND = 0.12  # what NF4 in blocks of 64 loses of a normal matrix: 0.09 seen


@dataclass(frozen=True)
class Check:
    """The relative errors of one layer on a device in a dtype; `weight` is what packing lost. `fault`: it raised."""

    device: str
    dtype: str
    errors: dict[str, float]
    bounds: dict[str, float]
    fault: str | None = None

    @property
    def passed(self) -> bool:
        """Whether it raised nothing and every error is within its bound."""
        return self.fault is None and all(self.errors[name] <= bound for name, bound in self.bounds.items())  # NaN fails


def one_line(error: Exception) -> str:
    """An error's type and text on one line, cut at 200 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def check_layers() -> tuple[Check, ...]:
    """A check for every device and dtype that a run on this machine may use."""
    from lopt_edge.run.device import accelerators
    from lopt_edge.run.devices.host import Host

    checks = []
    for one in (*Host.found(), *accelerators()):
        with one.made_current():
            checks += [check_layer(str(one.device), dtype=name) for name in one.dtype_names()]
    return tuple(checks)


def check_layer(device: str, *, dtype: str) -> Check:
    """The check of a LoRA layer on a packed matrix, forward and backward; nothing that it raises goes further."""
    bounds = {"weight": PACKING_BOUND, **dict.fromkeys(("y", "dx", "dA", "dB"), BOUNDS[dtype])}
    try:
        return Check(device, dtype, _layer_errors(device, dtype), bounds)
    except Exception as error:  # a broken kernel library may raise anything
        return Check(device, dtype, {}, bounds, fault=one_line(error))


def _layer_errors(device_name: str, dtype_name: str) -> dict[str, float]:
    """Relative errors of packing and of y, dx, dA and dB, on fixed random numbers."""
    import torch
    from torch import nn

    from lopt_edge.run.kernels.checks import relative
    from quant.linear import PackedLinear, UnpackBuffer
    from quant.nf4 import pack

    device, dtype = torch.device(device_name), getattr(torch, dtype_name)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).float()  # both sides start from the same numbers

    weight, bias = draw(WIDTH_OUT, WIDTH_IN), draw(WIDTH_OUT)
    x, g, a, b = draw(TOKENS, WIDTH_IN), draw(TOKENS, WIDTH_OUT), draw(WIDTH_IN, RANK), draw(RANK, WIDTH_OUT)
    layer = PackedLinear(WIDTH_IN, WIDTH_OUT, buffer=UnpackBuffer())
    layer.weight, layer.bias = pack(weight.to(device)), bias.to(device, dtype)
    layer.attach(nn.Parameter(a.clone().to(device)), nn.Parameter(b.clone().to(device)), scale=SCALE)
    leaf = x.clone().to(device, dtype).requires_grad_()
    y = layer(leaf)
    torch.autograd.backward(y, g.to(device, dtype))
    unpacked = exact_weight(layer.weight)
    exact = _exact_layer(unpacked, *(tensor.double() for tensor in (bias, x, g, a, b)))
    assert layer.lora_a is not None and layer.lora_b is not None
    gradients = {"dx": leaf.grad, "dA": layer.lora_a.grad, "dB": layer.lora_b.grad}
    found = {"y": y, **{name: tensor for name, tensor in gradients.items() if tensor is not None}}
    errors = {name: relative(found[name], tensor) for name, tensor in exact.items()}
    return {"weight": relative(unpacked, weight.double()), **errors}


def exact_weight(packed: PackedWeight) -> Tensor:
    """The packed matrix (out, in) in float64 on the CPU, by the format's definition."""
    import torch

    codes = packed.codes.cpu().long()
    halves = torch.stack((codes >> 4, codes & 15), dim=1).flatten()
    scales = packed.absmax.cpu().double()
    if packed.nested_absmax is not None and packed.nested_map is not None and packed.offset is not None:
        blocks = packed.nested_absmax.cpu().double().repeat_interleave(packed.nested_block_elements)[: len(scales)]
        scales = packed.nested_map.cpu().double()[packed.absmax.cpu().long()] * blocks + packed.offset.cpu().double()
    values = packed.code_map.cpu().double()[halves].view(-1, packed.block_elements)
    return (values * scales.unsqueeze(1)).view(packed.shape)


def _exact_layer(weight: Tensor, bias: Tensor, x: Tensor, g: Tensor, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """y = x W^T + bias + s (x A) B and its gradients by autograd; all float64."""
    import torch

    x, a, b = (tensor.requires_grad_() for tensor in (x, a, b))
    y = x @ weight.T + bias + SCALE * (x @ a) @ b
    dx, da, db = torch.autograd.grad(y, (x, a, b), g)
    return {"y": y.detach(), "dx": dx, "dA": da, "dB": db}
