"""A selective state space in the place of attention or beside it (Mamba 2, arXiv 2405.21060; Granite 4, Falcon H1, Bamba).

transformers' own form in plain torch works on all chunks of a sequence at once, so that bytes grow in steps and autograd
keeps some twenty tensors of all heads. Here the same function of transformers runs on one chunk of tokens after the other,
with the convolution before it and the gated norm behind it (chunks.py); saved is what the input projection gave.

The rule: values are those of transformers' module up to the rounding of other chunks (tracing/proof.py tries each family
before it trains). With a cache (generation) transformers' module itself runs. A fast kernel (mamba-ssm) is not taken
where it is installed: the plan knows the form in plain torch.

Shapes: B sequences, T tokens, S tokens of a chunk, P features of the input projection, C those of the convolution, H heads,
E a head's features, G groups of heads, N features of the state.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lopt_edge.run.model.chunks import in_chunks
from lopt_edge.run.model.sequences import Sequences
from quant.sizes import DELTA_CHUNK as CHUNK


class MambaNet(nn.Module):
    """transformers' module of a selective state space with its core run chunk by chunk. Its linear layers keep
    their names."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.__dict__["whole"] = net  # not registered: its parts are, under the names that they had
        for name in ("in_proj", "out_proj"):
            self.add_module(name, net.get_submodule(name))
        self.factor: Any = getattr(net, "ssm_in_multiplier", None)
        self.core = MambaCore(net)

    def forward(self, hidden_states: Tensor, *, cache_params: Any = None, attention_mask: Any = None, **_: Any) -> Tensor:
        """The output (B, T, D) for hidden states (B, T, D). `attention_mask` is for a cache's use: without one padding lies
        at the right end, which no real token sees."""
        if cache_params is not None:
            whole: nn.Module = self.__dict__["whole"]
            return cast(Tensor, whole(hidden_states, cache_params=cache_params, attention_mask=attention_mask))
        x = hidden_states if self.factor is None else hidden_states * self.factor
        return cast(Tensor, self.get_submodule("out_proj")(self.core(self.get_submodule("in_proj")(x))))


class MambaCore(nn.Module):
    """Convolution, state space and gated norm: what lies between the input projection and the output projection."""

    def __init__(self, net: nn.Module) -> None:
        from transformers.activations import ACT2FN

        super().__init__()
        sizes: Any = net
        self.conv1d, self.A_log = net.get_submodule("conv1d"), net.get_parameter("A_log")
        self.D, self.dt_bias = net.get_parameter("D"), net.get_parameter("dt_bias")
        self.norm = net.get_submodule("norm") if getattr(net, "mamba_rms_norm", True) else None
        self.n_heads, self.head_dim = int(sizes.num_heads), int(sizes.head_dim)
        self.n_groups, self.n_state = int(sizes.n_groups), int(sizes.ssm_state_size)
        self.n_conv, self.width = int(sizes.conv_dim), int(sizes.intermediate_size)
        self.n_before = int(sizes.conv_kernel_size) - 1
        self.limits: tuple[float, float] = tuple(sizes.time_step_limit)
        self.activation = ACT2FN[sizes.activation]
        self.scan: Any = inspect.unwrap(vars(sys.modules[type(net).__module__])["mamba2_chunk_scan"])
        factors = getattr(net, "mup_vector", None)
        self.register_buffer("factors", factors, persistent=False)

    def forward(self, projected_BTP: Tensor) -> Tensor:
        """The values (B, T, W), normed and gated, of what the input projection gave."""
        return in_chunks(self, (projected_BTP,), Sequences((projected_BTP.shape[1],)))

    def first_state(self, n_sequences: int, device: torch.device) -> Tensor:
        """The state (B, H, E, N) before the first token, fp32."""
        shape = (n_sequences, self.n_heads, self.head_dim, self.n_state)
        return torch.zeros(shape, dtype=torch.float32, device=device)

    def chunk(self, parts: tuple[Tensor, ...], state_BHEN: Tensor) -> tuple[Tensor, Tensor]:
        """The values (B, CHUNK, W) of one chunk, and the state after it."""
        projected = parts[0]  # what lies behind the end is seen by no real token
        if isinstance(self.factors, Tensor):
            projected = projected * self.factors
        mixed, before = projected[..., self.width : self.width + self.n_conv], self.n_before
        gate, dt = projected[:, before:, : self.width], projected[:, before:, -self.n_heads :]
        n_each = self.n_groups * self.n_state
        x, b, c = torch.split(self._mixed(mixed), [self.width, n_each, n_each], dim=-1)
        y, after = self.scan(
            x.reshape(*x.shape[:2], self.n_heads, self.head_dim),
            dt,
            -torch.exp(self.A_log.float()),
            b.reshape(*b.shape[:2], self.n_groups, self.n_state),
            c.reshape(*c.shape[:2], self.n_groups, self.n_state),
            chunk_size=CHUNK,
            D=self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            initial_states=state_BHEN,
            return_final_states=True,
            dt_limit=self.limits,
        )
        y = y.reshape(*y.shape[:2], -1)
        y = y * functional.silu(gate) if self.norm is None else self.norm(y, gate)
        return y.to(projected.dtype), after.clone()  # it was a view of two states

    def _mixed(self, mixed_BSC: Tensor) -> Tensor:
        """What the convolution gives for the tokens of the chunk."""
        weight, bias = self.conv1d.get_parameter("weight"), self.conv1d._parameters["bias"]
        mixed = functional.conv1d(mixed_BSC.transpose(1, 2).to(weight.dtype), weight, bias, groups=len(weight))
        return cast(Tensor, self.activation(mixed).to(mixed_BSC.dtype).transpose(1, 2))
