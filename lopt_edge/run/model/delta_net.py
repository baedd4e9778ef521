"""A gated delta rule in the place of attention (Gated DeltaNet, arXiv 2412.06464; Qwen3.5), whose graph keeps its inputs.

transformers' own form works on all chunks of a sequence at once and lets autograd keep some twenty fp32 tensors of all
heads: at 2,048 tokens of Qwen3.5-9B over 600 MiB a layer. Here the same arithmetic runs one chunk of tokens after the
other, with the convolution before it and the gated norm behind it, and the state of each head goes from chunk to chunk.
Saved is what the four input projections gave (chunks.py).

The rule: the values are those of transformers' module (tests/run/model/test_delta_net.py), gradients those of autograd
through it; what lives inside is a chunk's worth, however long the sequence. Its parameters are frozen and get no gradient.
Of several sequences in one row (packing) each begins with an empty state and sees no token before its own. With a cache
(generation) transformers' module itself runs. Fast kernels (flash-linear-attention) are not used.

Shapes: B sequences, T tokens, C features of queries, keys and values together, W of all value heads, J value heads, H key
heads, K and V a head's key and value features.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lopt_edge.run.model.chunks import in_chunks
from lopt_edge.run.model.sequences import Sequences
from quant.sizes import DELTA_CHUNK as CHUNK


class Chunk(NamedTuple):
    """The inputs of one chunk; `mixed_BSC` has the earlier tokens that the convolution sees as well, and `real_S1` is 0 for
    tokens behind the sequence's end."""

    mixed_BSC: Tensor
    z: Tensor
    b: Tensor
    a: Tensor
    real_S1: Tensor


class DeltaNet(nn.Module):
    """transformers' module of a gated delta rule with its core run chunk by chunk. Its linear layers keep their names."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.__dict__["whole"] = net  # not registered: its parts are, under the names that they had
        for name in ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"):
            self.add_module(name, net.get_submodule(name))
        self.core = DeltaCore(net)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        cache_params: Any = None,
        attention_mask: Any = None,
        sequences: Sequences | None = None,
        **_: Any,
    ) -> Tensor:
        """The output (B, T, D) for hidden states (B, T, D). `attention_mask` is for a cache's use: without one padding lies
        at the right end, which no real token sees. `sequences`: what lies in the one row."""
        if cache_params is not None:
            whole: nn.Module = self.__dict__["whole"]
            return cast(Tensor, whole(hidden_states, cache_params=cache_params, attention_mask=attention_mask))
        projected = (self.get_submodule(f"in_proj_{name}")(hidden_states) for name in ("qkv", "z", "b", "a"))
        return cast(Tensor, self.get_submodule("out_proj")(self.core(*projected, sequences)))


class DeltaCore(nn.Module):
    """Convolution, delta rule and gated norm: what lies between the input projections and the output projection."""

    def __init__(self, net: nn.Module) -> None:
        from transformers.activations import ACT2FN

        super().__init__()
        self.conv1d, self.norm = net.get_submodule("conv1d"), net.get_submodule("norm")
        self.A_log, self.dt_bias = net.get_parameter("A_log"), net.get_parameter("dt_bias")
        sizes: Any = net
        self.n_key_heads, self.n_value_heads = int(sizes.num_k_heads), int(sizes.num_v_heads)
        self.key_dim, self.value_dim = int(sizes.head_k_dim), int(sizes.head_v_dim)
        self.n_before = int(sizes.conv_kernel_size) - 1  # earlier tokens that the convolution sees
        self.activation = ACT2FN[sizes.activation]

    def forward(
        self, mixed_BTC: Tensor, z_BTW: Tensor, b_BTJ: Tensor, a_BTJ: Tensor, sequences: Sequences | None = None
    ) -> Tensor:
        """The values (B, T, W) of the rule, normed and gated by z; b are the rates of writing, a those of forgetting."""
        return in_chunks(self, (mixed_BTC, z_BTW, b_BTJ, a_BTJ), sequences or Sequences((z_BTW.shape[1],)))

    @property
    def width(self) -> int:
        """The features of a token's values."""
        return self.n_value_heads * self.value_dim

    def first_state(self, n_sequences: int, device: torch.device) -> Tensor:
        """The state (B, J, K, V) before the first token, fp32."""
        shape = (n_sequences, self.n_value_heads, self.key_dim, self.value_dim)
        return torch.zeros(shape, dtype=torch.float32, device=device)

    def chunk(self, parts: tuple[Tensor, ...], state_BJKV: Tensor) -> tuple[Tensor, Tensor]:
        """The values (B, CHUNK, W) of one chunk, and the state after it; `parts` are a `Chunk`'s."""
        inputs = Chunk(*parts)
        q, k, v = self._heads(inputs.mixed_BSC)
        beta = (inputs.b.sigmoid() * inputs.real_S1).transpose(1, 2).float().contiguous()
        decay = -self.A_log.float().exp() * functional.softplus(inputs.a.float() + self.dt_bias)
        decay = (decay * inputs.real_S1).transpose(1, 2).contiguous()
        core, state = _rule(q, k, v, beta, decay, state_BJKV)
        core = core.transpose(1, 2).to(inputs.z.dtype, memory_format=torch.contiguous_format)
        y = self.norm(core.reshape(-1, self.value_dim), inputs.z.reshape(-1, self.value_dim))
        return y.view(inputs.z.shape), state

    def _heads(self, mixed_BSC: Tensor) -> tuple[Tensor, ...]:
        """Queries and keys (B, J, CHUNK, K) of length 1 (queries scaled), and values (B, J, CHUNK, V), fp32."""
        weight = self.conv1d.get_parameter("weight")
        mixed = self.activation(functional.conv1d(mixed_BSC.transpose(1, 2), weight, groups=len(weight))).transpose(1, 2)
        n_key = self.n_key_heads * self.key_dim
        parts = mixed.split([n_key, n_key, self.n_value_heads * self.value_dim], dim=-1)
        heads = [part.reshape(*part.shape[:2], -1, dim) for part, dim in zip(parts, self._dims, strict=True)]
        group = self.n_value_heads // self.n_key_heads
        heads[:2] = [each.repeat_interleave(group, dim=2) if group > 1 else each for each in heads[:2]]
        q, k, v = (each.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format) for each in heads)
        return _unit(q) * self.key_dim**-0.5, _unit(k), v

    @property
    def _dims(self) -> tuple[int, int, int]:
        return self.key_dim, self.key_dim, self.value_dim


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + 1e-6)


def _rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The delta rule over one chunk: its values (B, J, CHUNK, V), and the state after it.

    Within the chunk the updates of the state are one triangular system (the UT transform, arXiv 2406.06484); the operations
    and their order are those of transformers' torch_chunk_gated_delta_rule.
    """
    written_v, written_k = v * beta.unsqueeze(-1), k * beta.unsqueeze(-1)
    decay = decay.cumsum(dim=2)  # of the logarithms, from the chunk's beginning
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).triu(1)
    between = (decay.unsqueeze(3) - decay.unsqueeze(2)).masked_fill(later, float("-inf")).exp()
    keys = k.transpose(-1, -2)
    system, scores = (written_k @ keys) * between, (q @ keys) * between
    solve = torch.linalg.solve_triangular
    values = solve(system, written_v, upper=False, unitriangular=True)
    reads = solve(system, written_k * decay.exp().unsqueeze(-1), upper=False, unitriangular=True)
    q = q * decay.exp().unsqueeze(-1)
    k = k * (decay[..., -1:] - decay).exp().unsqueeze(-1)
    new = values - reads @ state
    core = q @ state + scores @ new
    return core, state * decay[..., -1].exp()[..., None, None] + k.transpose(-1, -2) @ new
