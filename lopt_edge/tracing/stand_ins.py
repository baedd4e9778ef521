"""Stand-ins for our modules: the same inputs, results, views and saved tensors, no arithmetic, nothing allocated inside.

Each leaves a mark in the log where its module works: what that takes there is a formula (lopt_edge/plan/costs/
module_bytes.py). Whoever changes what one of our modules saves or returns changes its stand-in
(tests/laws/test_timeline.py finds out).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lopt_edge.run.model import query_tiles, sequences
from lopt_edge.tracing.log import EventLog


class OpaqueLinear(nn.Module):
    """A stand-in for a linear layer. `trains`: has LoRA parameters, so that its result needs a gradient. `holds`: saves its
    input."""

    def __init__(self, name: str, in_features: int, out_features: int, log: EventLog) -> None:
        super().__init__()
        self.name, self.in_features, self.out_features, self.log = name, in_features, out_features, log
        self.trains = self.holds = False
        self.value_needed, self.last = True, False
        self.anchor = torch.empty(0, requires_grad=True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = _Linear.apply(x, self.anchor if self.trains else None, self)  # type: ignore[no-untyped-call]  # torch's apply has no types
        return found


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor | None, layer: OpaqueLinear) -> Tensor:
        ctx.layer, ctx.input_shape, log = layer, x.shape, layer.log
        ctx.save_for_backward(*((x,) if layer.holds else ()))
        if not layer.value_needed:
            return x.new_zeros(1).expand(*x.shape[:-1], layer.out_features)
        flat = x.reshape(-1, x.shape[-1])
        with log.value(layer.last):
            log.mark(f"unpack:{layer.name}")
            y = flat.new_zeros(len(flat), layer.out_features)
            log.mark(f"lora:{layer.name}")
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layer, g = ctx.layer, grads[0].reshape(-1, grads[0].shape[-1])
        dx = None
        if ctx.needs_input_grad[0]:
            layer.log.mark(f"unpack:{layer.name}")
            dx = g.new_zeros(len(g), layer.in_features)
        saved = ctx.saved_tensors
        layer.log.mark(f"lora_backward:{layer.name}" if dx is not None else f"lora_backward_only:{layer.name}")
        del saved
        return None if dx is None else dx.view(ctx.input_shape), None, None


class OpaqueMLP(nn.Module):
    """A stand-in for the blocked MLP; `name` is how the variants call it."""

    name = "mlp"

    def __init__(self, down_proj: nn.Module, log: EventLog) -> None:
        super().__init__()
        self.down_proj: Any = down_proj
        self.log = log
        self.trains = self.holds = False
        self.anchor = torch.empty(0, requires_grad=True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = _MLP.apply(x, self.anchor if self.trains else None, self)  # type: ignore[no-untyped-call]  # torch's apply has no types
        return found


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor | None, mlp: OpaqueMLP) -> Tensor:
        ctx.log = mlp.log
        ctx.save_for_backward(x)
        if not mlp.down_proj.value_needed:
            return x.new_zeros(1).expand(x.shape)
        with mlp.log.value(mlp.down_proj.last):
            mlp.log.mark("mlp_forward")
            y = torch.zeros_like(x.reshape(-1, x.shape[-1]))
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        (x,), g = ctx.saved_tensors, grads[0].reshape(-1, grads[0].shape[-1])
        ctx.log.mark("mlp_backward" if ctx.needs_input_grad[0] else "mlp_backward_only")
        return torch.zeros_like(g).view(x.shape) if ctx.needs_input_grad[0] else None, None, None


class OpaqueExperts(nn.Module):
    """A stand-in for the experts of a layer."""

    def __init__(self, log: EventLog) -> None:
        super().__init__()
        self.log, self.value_needed = log, True

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        found: Tensor = _Experts.apply(x, index, weights, self)  # type: ignore[no-untyped-call]  # torch's apply has no types
        return found


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, weights: Tensor, experts: OpaqueExperts) -> Tensor:
        ctx.log = experts.log
        ctx.save_for_backward(x, index, weights)
        if not experts.value_needed:
            return x.new_zeros(1).expand(x.shape)
        with experts.log.value(True):
            experts.log.mark("experts_forward")
            return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, _, weights = ctx.saved_tensors
        ctx.log.mark("experts_backward")
        return torch.zeros_like(x), None, torch.zeros_like(weights), None


class OpaqueNorm(nn.Module):
    def __init__(self, log: EventLog) -> None:
        super().__init__()
        self.log = log

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = _Norm.apply(x, self.log)  # type: ignore[no-untyped-call]  # torch's apply has no types
        return found


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, log: EventLog) -> Tensor:
        ctx.save_for_backward(x)
        ctx.log = log
        rows = x.reshape(-1, x.shape[-1])
        y = torch.zeros_like(rows)
        log.mark("norm_forward", *rows.shape)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        rows, g = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, x.shape[-1])
        dx = torch.zeros_like(rows)
        ctx.log.mark("norm_backward", *g.shape)
        return dx.view(x.shape), None


class OpaqueDelta(nn.Module):
    """A stand-in for the core of a delta rule (run/model/delta_net.py)."""

    def __init__(self, log: EventLog) -> None:
        super().__init__()
        self.log = log

    def forward(self, mixed: Tensor, z: Tensor, b: Tensor, a: Tensor, _: Any = None) -> Tensor:
        found: Tensor = _Delta.apply(mixed, z, b, a, self.log)  # type: ignore[no-untyped-call]  # torch's apply has no types
        return found


class _Delta(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mixed: Tensor, z: Tensor, b: Tensor, a: Tensor, log: EventLog) -> Tensor:
        ctx.log = log
        ctx.save_for_backward(mixed, z, b, a)
        y = torch.zeros_like(z)
        log.mark("delta_forward")
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found = [torch.zeros_like(tensor) for tensor in ctx.saved_tensors]
        ctx.log.mark("delta_backward")
        return (*found, None)


class OpaqueMamba(nn.Module):
    """A stand-in for the core of a state space (run/model/mamba.py), with `width` features of a token's values."""

    def __init__(self, width: int, log: EventLog) -> None:
        super().__init__()
        self.width, self.log = width, log

    def forward(self, projected: Tensor) -> Tensor:
        found: Tensor = _Mamba.apply(projected, self)  # type: ignore[no-untyped-call]  # torch's apply has no types
        return found


class _Mamba(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor, core: OpaqueMamba) -> Tensor:
        ctx.log = core.log
        ctx.save_for_backward(projected)
        y = projected.new_zeros(*projected.shape[:2], core.width)
        core.log.mark("mamba_forward")
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found = torch.zeros_like(ctx.saved_tensors[0])
        ctx.log.mark("mamba_backward")
        return found, None


def put_attention(log: EventLog, *, tiled: bool) -> str:
    """Register an attention, and return the name under which transformers finds it until the next call.

    `tiled`: in tiles of queries; else torch's kernel, with a mark where sequences of a row go through it one by one.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **rest: Any
    ) -> Any:
        if attention_mask is not None or value.shape[-1] != query.shape[-1]:
            assert not tiled
            return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **rest)
        kernel: Any = _Attention if tiled else _Kernel
        return kernel.apply(query, key, value, log), None

    AttentionInterface.register("trace_bytes", attend)
    AttentionMaskInterface.register("trace_bytes", query_tiles.make_mask if tiled else sdpa_mask)
    return "trace_bytes"


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, log: EventLog) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.log = log
        out_BTHE = query.new_zeros(*query.transpose(1, 2).shape)
        log.mark("attention_forward")
        return out_BTHE

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        dq, dk, dv = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        ctx.log.mark("attention_backward")
        return dq, dk, dv, None


class _Kernel(torch.autograd.Function):
    """A stand-in for attention by torch's kernel for the CPU, and for that of sequences in a row (sequences.py)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, log: EventLog) -> Tensor:
        out: Tensor
        out, sums = sequences.KERNEL(query, key, value, 0.0, True)
        sums = sums if any(ctx.needs_input_grad) else None
        ctx.save_for_backward(query, key, value, out, sums)
        ctx.log = log
        log.mark("attention_forward")
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        found = sequences.KERNEL_BACKWARD(grads[0].transpose(1, 2), *saved, 0.0, True)
        ctx.log.mark("attention_backward")
        return (*found, None)


class OpaqueVocabulary:
    """A stand-in for the vocabulary: zeros instead of rows; two chunks."""

    def __init__(self, n_rows: int, hidden: int, dtype: torch.dtype, log: EventLog) -> None:
        self.log, self.chunk = log, torch.zeros(n_rows, hidden, dtype=dtype)

    def rows(self, ids_N: Tensor, *, host_ids_N: Tensor | None = None) -> Tensor:
        self.log.mark("gather", len(ids_N))
        return self.chunk.new_zeros(len(ids_N), self.chunk.shape[1])

    def chunks(self, n_rows: int) -> Iterator[tuple[int, Tensor]]:
        yield 0, self.chunk
        yield len(self.chunk), self.chunk
