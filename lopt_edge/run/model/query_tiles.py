"""Causal attention with soft-capped scores (Gemma 2) or with sinks (gpt-oss) in tiles of queries, whose graph keeps query,
key and value alone.

A sink is a number for each head that stands among a query's scores in the softmax, and gives no value: what it takes is
missing from the output. transformers has no fused kernel on the CPU for either: its eager attention makes all heads x
tokens x tokens of scores, and its graph keeps several such tensors and keys repeated for every head. Here the heads that
share keys go through a tile of queries at a time, and once more in the backward. A tile reads keys up to its last query, in
a sliding layer from its first query's window on; what it leaves out has weight 0. Its scores take the device's
`score_bytes` at most (plan/facts).

The rule: a tile runs transformers' operations in their order, the backward autograd's. If one tile holds all queries,
values and gradients are bitwise eager's on the CPU, in fp32 and bfloat16. With several they are equal up to rounding (in
fp32 3e-7 relative): products of other shapes, and gradients of keys and values that are summed over tiles in fp32. Where
no two heads share keys or all do, eager lays keys of several sequences out anew, and products of a few tokens may round
otherwise; no Gemma 2 is made like that. With sinks eager subtracts the largest score before its softmax, and autograd goes
back through that maximum, whose gradient is zero but for rounding; we leave it out (fp32 1e-6 relative).

No mask exists unless there is padding; a mask that is given is added as eager does, over all keys. Several sequences in one
row (packing) go through it one after the other, as each would alone. No dropout: layers run in evaluation mode.

Measured (one core of an EPYC with AVX-512, Gemma 2 2B's heads, 2,048 tokens, forward and backward): fp32 1.0 s of CPU,
eager 2.1; bfloat16 0.8, eager 1.4. Tiles of 2 to 8 MiB take about that, of 1 or 16 MiB up to two thirds more: what does not
fit a core's caches loses, and so do products of few rows. On CUDA the size is a guess. One product over the heads that
share keys in the gradients of keys and values gained a few per cent and was no longer bitwise.

Shapes: B sequences, H heads, G heads that share keys, T queries, S keys, E features of a head; n queries and m keys of a
tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lopt_edge.plan.costs.tiles import QueryTile, query_tiles
from lopt_edge.run.model.sequences import Sequences

NAME = "lopt_edge_query_tiles"


class Scores(NamedTuple):
    """The way in which a layer makes scores. `cap` None: no soft cap. `window` None: all earlier tokens are seen."""

    scaling: float
    cap: float | None
    window: int | None


def register() -> None:
    """Make NAME an attention implementation that a transformers config may ask for, with the masks that it needs."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, make_mask)


def make_mask(
    *,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **rest: Any,
) -> Tensor | None:
    """The mask that transformers asks for; None where a tile knows itself which keys its queries see.

    It knows that where there is no padding and the last query is at the last key.
    """
    from transformers.masking_utils import eager_mask

    aligned = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    if aligned and allow_is_causal_skip and attention_mask is None:
        return None
    rest["allow_is_bidirectional_skip"] = False  # None means causal here
    return eager_mask(
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        **rest,
    )


def attend(
    module: nn.Module,
    query_BHTE: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    sequences: Sequences | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention in tiles of queries, with transformers' signature; the result is (B, T, H, E) and no weights.

    query (B, H, T, E); key and value (B, H / G, S, E). `sequences`: what lies in the one row. `s_aux` (H): the sinks, which
    are frozen. Raises NotImplementedError for a dropout.
    """
    if dropout:
        raise NotImplementedError("attention in tiles of queries has no dropout")
    scores = Scores(scaling or query_BHTE.shape[-1] ** -0.5, softcap, sliding_window)
    lengths = sequences or Sequences((query_BHTE.shape[2],))
    given = (query_BHTE, key, value, attention_mask, s_aux)
    out_BTHE: Tensor = _QueryTiles.apply(*given, scores, lengths)  # type: ignore[no-untyped-call]  # torch's apply has no types
    return out_BTHE, None


class _QueryTiles(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        sinks: Tensor | None,
        scores: Scores,
        sequences: Sequences,
    ) -> Tensor:
        ctx.scores, ctx.sequences, beside = scores, sequences, (mask, sinks)
        ctx.save_for_backward(query, key, value, *beside)
        n_sequences, n_heads, n_queries, _ = query.shape
        out_BTHE = query.new_empty(n_sequences, n_queries, n_heads, value.shape[-1])
        for rows, keys in _rows(sequences, key):
            out = out_BTHE[:, rows]
            for group, b, heads in _groups(query[:, :, rows], key[:, :, keys], value[:, :, keys], beside, scores):
                for tile in group.tiles:
                    out[b, tile.queries, heads] = _Part(group, tile).output_GnE().transpose(0, 1)
        return out_BTHE

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *beside = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        for rows, keys in _rows(ctx.sequences, key):
            g_BTHE = grads[0][:, rows]
            for group, b, heads in _groups(query[:, :, rows], key[:, :, keys], value[:, :, keys], beside, ctx.scores):
                head = heads.start // group.size
                found = dq[b, heads, rows], dk[b, head, keys], dv[b, head, keys]
                _group_gradients(group, g_BTHE[b, :, heads].transpose(0, 1), *found)
        return dq, dk, dv, None, None, None, None


def _rows(sequences: Sequences, key: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield where the queries and the keys of each sequence lie; with a cache there are more keys than queries."""
    alone = len(sequences.lengths) == 1
    return ((rows, slice(0, key.shape[2]) if alone else rows) for rows in sequences)


@dataclass(frozen=True)
class _Group:
    """The heads of one sequence that share keys, and what attention needs of them."""

    query_GTE: Tensor
    key_SE: Tensor
    value_SE: Tensor
    mask_TS: Tensor | None
    sinks_G: Tensor | None
    scores: Scores

    @property
    def size(self) -> int:
        return len(self.query_GTE)

    @property
    def tiles(self) -> list[QueryTile]:
        n_queries, n_keys = self.query_GTE.shape[1], len(self.key_SE)
        tiles = query_tiles(
            n_queries, n_keys, group=self.size, window=self.scores.window, device_type=self.key_SE.device.type
        )
        return tiles if self.mask_TS is None else [tile._replace(keys=slice(0, n_keys)) for tile in tiles]


def _groups(
    query: Tensor, key: Tensor, value: Tensor, beside: Sequence[Tensor | None], scores: Scores
) -> Iterator[tuple[_Group, int, slice]]:
    """Yield each group with the index of its sequence and the slice of its heads; `beside` are the mask and the sinks."""
    size, (mask, sinks) = query.shape[1] // key.shape[1], beside
    for b in range(query.shape[0]):
        mask_TS = None if mask is None else mask.expand(len(query), -1, -1, -1)[b, 0]
        for head in range(key.shape[1]):
            heads = slice(head * size, (head + 1) * size)
            own = None if sinks is None else sinks[heads]
            yield _Group(query[b, heads], key[b, head], value[b, head], mask_TS, own, scores), b, heads


def _group_gradients(group: _Group, g_GTE: Tensor, dq_GTE: Tensor, dk_SE: Tensor, dv_SE: Tensor) -> None:
    """Fill the gradients dq, dk and dv of a group. Sums over tiles are in fp32."""
    sum_ES = torch.zeros(dk_SE.t().shape, dtype=torch.float32, device=dk_SE.device)
    sum_SE = torch.zeros(dv_SE.shape, dtype=torch.float32, device=dv_SE.device)
    for tile in group.tiles:
        part = _Part(group, tile)
        dq_GTE[:, tile.queries] = part.gradients_GnE(g_GTE[:, tile.queries], sum_ES[:, tile.keys], sum_SE[tile.keys])
    dk_SE.copy_(sum_ES.t())
    dv_SE.copy_(sum_SE)


class _Part:
    """One tile of a group, with the arithmetic of its forward and backward."""

    def __init__(self, group: _Group, tile: QueryTile) -> None:
        self.q_GnE, self.scores = group.query_GTE[:, tile.queries], group.scores
        self.k_GmE, self.v_GmE = (x[tile.keys].expand(group.size, -1, -1) for x in (group.key_SE, group.value_SE))
        self.mask_nm = None if group.mask_TS is None else group.mask_TS[tile.queries, tile.keys]
        self.own_key = tile.queries.start + len(group.key_SE) - group.query_GTE.shape[1] - tile.keys.start
        self.factor = 1.0 if group.scores.cap is None else group.scores.cap
        self.sinks_G = group.sinks_G

    def output_GnE(self) -> Tensor:
        """The tile's output, softmax of its scores times the values."""
        if self.sinks_G is not None:
            return torch.bmm(self._with_sinks()[:, :, :-1], self.v_GmE)
        weights_Gnm = self._weights(self._tanh().mul_(self.factor)).to(self.q_GnE.dtype)
        return torch.bmm(weights_Gnm, self.v_GmE)

    def _tanh(self) -> Tensor:
        """The scores (G, n, m) before they are multiplied by the cap; without a cap the scores themselves."""
        raw_Gnm = torch.bmm(self.q_GnE, self.k_GmE.transpose(1, 2)).mul_(self.scores.scaling)
        return raw_Gnm if self.scores.cap is None else raw_Gnm.div_(self.scores.cap).tanh_()

    def _weights(self, scores_Gnm: Tensor) -> Tensor:
        """The softmax of scores, in fp32. The scores are changed in place."""
        return torch.softmax(self._masked(scores_Gnm).float(), dim=-1)

    def _masked(self, scores_Gnm: Tensor) -> Tensor:
        """The scores without what a query does not see, changed in place."""
        if self.mask_nm is not None:
            scores_Gnm += self.mask_nm
        else:
            scores_Gnm.masked_fill_(self._hidden_nm(), torch.finfo(scores_Gnm.dtype).min)
        return scores_Gnm

    def _with_sinks(self) -> Tensor:
        """The softmax (G, n, m + 1) of scores and, last, the sinks, in the compute dtype."""
        assert self.sinks_G is not None
        scores_Gnm = self._masked(self._tanh().mul_(self.factor))
        sinks_Gn1 = self.sinks_G.view(-1, 1, 1).expand(-1, scores_Gnm.shape[1], 1)
        all_Gnm = torch.cat([scores_Gnm, sinks_Gn1], dim=-1)
        del scores_Gnm
        return torch.softmax(all_Gnm.sub_(all_Gnm.amax(dim=-1, keepdim=True)), dim=-1)

    def _hidden_nm(self) -> Tensor:
        """A mask (n, m), true where a key is later than the query, or before its window.

        `own_key` is the column of the first query's key.
        """
        n, m = self.q_GnE.shape[1], self.k_GmE.shape[1]
        seen_nm = torch.ones(n, m, dtype=torch.bool, device=self.q_GnE.device).tril_(self.own_key)
        if self.scores.window is not None:
            seen_nm.triu_(self.own_key - self.scores.window + 1)
        return seen_nm.logical_not_()

    def gradients_GnE(self, g_GnE: Tensor, sum_Em: Tensor, sum_mE: Tensor) -> Tensor:
        """The queries' gradient; those of keys (transposed) and values are added to the sums."""
        if self.sinks_G is not None:
            return self._gradients_with_sinks(g_GnE, sum_Em, sum_mE)
        tanh_Gnm = self._tanh()
        weights_Gnm = self._weights(tanh_Gnm * self.factor)
        _add_products(sum_mE, weights_Gnm.to(g_GnE.dtype).transpose(1, 2), g_GnE)
        d_Gnm = torch.bmm(g_GnE, self.v_GmE.transpose(1, 2)).float()
        d_Gnm = torch.ops.aten._softmax_backward_data(d_Gnm, weights_Gnm, -1, torch.float32).to(g_GnE.dtype)
        del weights_Gnm
        if self.scores.cap is not None:
            d_Gnm = torch.ops.aten.tanh_backward(d_Gnm.mul_(self.factor), tanh_Gnm).div_(self.scores.cap)
        del tanh_Gnm
        return self._to_the_scores(d_Gnm, sum_Em)

    def _gradients_with_sinks(self, g_GnE: Tensor, sum_Em: Tensor, sum_mE: Tensor) -> Tensor:
        """As `gradients_GnE`: nothing comes to a sink's weight, which gives no value."""
        weights_Gnm = self._with_sinks()
        _add_products(sum_mE, weights_Gnm[:, :, :-1].transpose(1, 2), g_GnE)
        d_Gnm = nn.functional.pad(torch.bmm(g_GnE, self.v_GmE.transpose(1, 2)), (0, 1))
        d_Gnm = torch.ops.aten._softmax_backward_data(d_Gnm, weights_Gnm, -1, d_Gnm.dtype)
        del weights_Gnm
        return self._to_the_scores(d_Gnm[:, :, :-1], sum_Em)

    def _to_the_scores(self, d_Gnm: Tensor, sum_Em: Tensor) -> Tensor:
        """The queries' gradient from that of the scores; that of the keys is added to the sum."""
        d_Gnm.mul_(self.scores.scaling)
        _add_products(sum_Em, self.q_GnE.transpose(1, 2), d_Gnm)
        return torch.bmm(d_Gnm, self.k_GmE)


def _add_products(total: Tensor, left_G: Tensor, right_G: Tensor) -> None:
    """Add the products of all heads to `total`, head by head: eager sums a repeated key's gradients in that order."""
    for head in range(len(left_G)):
        total += torch.bmm(left_G[head : head + 1], right_G[head : head + 1])[0]
