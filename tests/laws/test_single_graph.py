"""Law 1: the gradients of the sequential plan equal those of LoPT's loss in one autograd graph, bitwise in fp32.

The reference is written from the definition: run all layers in one graph, detach at each boundary, sum
lambda x mean(local losses) + task loss, call backward once. It composes the same layer, norm and head modules.
"""

from __future__ import annotations

import pytest
import torch

from lopt_edge.run.step.batches import window_totals
from lopt_edge.run.step.losses import task_loss
from tests.laws.bench import LOCAL_WEIGHT, Bench, make_bench, random_batch

BATCHES = [random_batch((11, 7), seed=1), random_batch((9, 9), seed=2)]


def reference_loss(bench: Bench, batches: list) -> torch.Tensor:
    model, segments = bench.model, bench.plan.segments
    totals = window_totals(batches)
    n_local = sum(s.loss == "reconstruct" for s in segments)
    total = torch.zeros(())
    for micro_batch, batch in enumerate(batches):
        model.clock.micro_batch = micro_batch
        hidden = model.embed(batch.ids_BT)
        frame = model.layer_context(hidden)
        for segment in segments:
            block_input = hidden.detach()
            hidden = block_input
            for layer in segment.layers:
                hidden = model.run_layer(layer, hidden, frame)
            flat = hidden.flatten(0, 1)
            if segment.loss == "reconstruct":
                rows = torch.arange(len(flat)) if batch.real_N is None else batch.real_N
                local = bench.heads[segment.index](flat[rows], block_input.flatten(0, 1)[rows])
                local = local * (1.0 / (totals.tokens * flat.shape[1]))
                total = total + local * (LOCAL_WEIGHT / n_local)
            if segment.loss == "task":
                task = task_loss(model, flat[batch.supervised_N], batch.targets_N)
                total = total + task * (1.0 / totals.supervised)
    return total


@pytest.mark.parametrize("num_segments", [1, 2, 3, 4])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_sequential_equals_single_graph_bitwise(four_bit, family, num_segments):
    bench = make_bench(four_bit(family), num_segments=num_segments)
    for batch in BATCHES:
        ours = bench.gradients([batch])
        reference_loss(bench, [batch]).backward()
        theirs = bench.take_gradients()
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name].abs().max() > 0, f"{name} is zero: the test would prove nothing"
            assert torch.equal(ours[name], theirs[name]), name


def test_two_micro_batches_equal_single_graph_closely(four_bit):
    # one graph adds the micro-batches' contributions in another order: equal up to fp32 rounding of one addition
    bench = make_bench(four_bit(), num_segments=2, n_micro_batches=2)
    ours = bench.gradients(BATCHES)
    reference_loss(bench, BATCHES).backward()
    for name, theirs in bench.take_gradients().items():
        torch.testing.assert_close(ours[name], theirs, rtol=1e-5, atol=1e-7)


def test_dropout_masks_are_drawn_again(four_bit):
    """With LoRA dropout, recomputed layers see the masks of the forward: gradients stay those of one graph."""
    bench = make_bench(four_bit(), num_segments=2, dropout=0.3)
    ours = bench.gradients([BATCHES[0]], step=5)
    other_step = bench.gradients([BATCHES[0]], step=6)
    bench.model.clock.step, bench.model.clock.active = 5, True
    reference_loss(bench, [BATCHES[0]]).backward()
    bench.model.clock.active = False
    theirs = bench.take_gradients()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    assert any(not torch.equal(ours[name], other_step[name]) for name in ours)


@pytest.mark.parametrize("clip_scope", ["segment", "global"])
def test_one_update_equals_torch_clip_and_adamw(four_bit, clip_scope):
    """The STEP ops: clipping by torch's own function, then torch's AdamW on the single-graph gradients."""
    bench = make_bench(four_bit(), num_segments=2, clip=0.05, clip_scope=clip_scope)
    start = {name: p.detach().clone() for name, p in bench.names().items()}
    bench.executor.run(bench.plan, [BATCHES[0]], step=1, learning_rates={0: 1e-3, 1: 2e-3})
    ours = {name: p.detach().clone() for name, p in bench.names().items()}
    for name, parameter in bench.names().items():
        parameter.data.copy_(start[name])
    reference_loss(bench, [BATCHES[0]]).backward()
    groups: dict[int, list[torch.nn.Parameter]] = {0: [], 1: []}
    for group in bench.executor.optimizer.groups.values():
        groups[group.segment] += group.parameters
    assert sum(map(len, groups.values())) == len(start)
    for members in [[*groups[0], *groups[1]]] if clip_scope == "global" else groups.values():
        assert torch.nn.utils.clip_grad_norm_(members, 0.05) > 0.05
    adamw = torch.optim.AdamW([{"params": groups[0], "lr": 1e-3}, {"params": groups[1], "lr": 2e-3}], weight_decay=0.0)
    adamw.step()
    for name, parameter in bench.names().items():
        assert not torch.equal(ours[name], start[name])
        torch.testing.assert_close(ours[name], parameter.detach(), rtol=1e-4, atol=1e-7)


def test_loss_scale_changes_nothing_and_gives_way_on_overflow(four_bit):
    """A power of two as loss scale: the same update, bitwise; one that overflows is lowered and the step run again."""
    updated = []
    for scale in (1.0, 2.0**10, 2.0**130):
        bench = make_bench(four_bit(), num_segments=2)
        bench.executor.loss_scale = scale
        bench.executor.run(bench.plan, [BATCHES[0]], step=1, learning_rates={0: 1e-3, 1: 2e-3})
        assert bench.executor.loss_scale < 2.0**128
        updated.append({name: p.detach().clone() for name, p in bench.names().items()})
    for name, value in updated[0].items():
        assert torch.equal(value, updated[1][name]), name
        assert torch.equal(value, updated[2][name]), name
