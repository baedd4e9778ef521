"""Sizes by arithmetic: those that a step on the CPU does not show (law 6 compares the others with tracked tensors).

Lower tiers, CUDA's resident lm_head, rings, odd sizes of moments in 8 bits, batches; each against the real thing where
there is one here, else against numbers written out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lopt_edge.plan.costs.shape import LayerShape
from lopt_edge.plan.costs.sizes import DISK_GRAIN, MicroBatchSize, Sizes, on_disk
from lopt_edge.plan.facts.model import ModelFacts, facts_from_config
from lopt_edge.plan.schedule.segments import Segment
from lopt_edge.run.step.losses import ReconstructHead
from lopt_edge.run.step.moments import make_moments
from tests.laws.bench import random_batch
from tests.plan.plans import make_knobs, make_segments
from tools.tiny_models import tiny_config

N_LAYERS = 4
TWO = make_segments("lopt", n_layers=N_LAYERS, num_segments=2)
FROZEN = make_segments("frozen", n_layers=N_LAYERS, num_segments=2)


def make_facts(family: str = "llama", **changes: Any) -> ModelFacts:
    return facts_from_config(tiny_config(family, num_hidden_layers=N_LAYERS, **changes).to_dict(), where="here")


def make_sizes(*, facts: ModelFacts | None = None, shape: dict[str, Any] | None = None, **changes: Any) -> Sizes:
    """`changes` are the knobs'."""
    facts = facts or make_facts()
    values = {"itemsize": 4, "rank": 4, "targets": facts.linear_names, **(shape or {})}
    return Sizes(LayerShape(facts, **values), make_knobs(N_LAYERS, **changes))


def steady(sizes: Sizes, segments: tuple[Segment, ...] = TWO, *, move: bool = False) -> dict[str, int]:
    return sizes.steady(segments, gradients_move=move)


# weights and vocabulary ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "prefetch", "n_held"),
    [("resident", 1, 4), ("disk", 0, 1), ("disk", 1, 2), ("disk", 5, 4),
     (("resident", "disk", "disk", "resident"), 0, 3), (("resident", "resident", "resident", "disk"), 2, 4)],
)  # fmt: skip
def test_streamed_layers_share_the_buffers_of_a_ring(weights, prefetch, n_held):
    sizes = make_sizes(weights=weights, prefetch=prefetch)
    assert steady(sizes)["weights"] == n_held * sizes.bytes_of_layers[0] + sizes.small_bytes


def test_the_lm_head_whole_or_in_chunks():
    facts = make_facts(vocab_size=9000)
    on_cpu = make_sizes(facts=facts)
    assert on_cpu.vocabulary_buffer_bytes == 1024 * 64 * (2 + 4), "a chunk as stored, and one in the compute dtype"
    assert replace(on_cpu, vocabulary_itemsize=4).vocabulary_buffer_bytes == 1024 * 64 * 4
    cuda = {"device_type": "cuda", "itemsize": 2}
    assert make_sizes(facts=facts, shape=cuda).vocabulary_buffer_bytes == 8192 * 64 * 2, "what was stored lies on the host"
    assert make_sizes(facts=facts, shape=cuda, head="resident").vocabulary_buffer_bytes == 9000 * 64 * 2
    few = make_sizes(facts=make_facts(vocab_size=100), shape={"itemsize": 2})
    assert few.vocabulary_buffer_bytes == 100 * 64 * 2


def test_weights_are_unpacked_into_one_buffer():
    wide = make_facts(hidden_size=64, intermediate_size=2048, num_attention_heads=4, head_dim=32)
    blocked = make_sizes(facts=wide)
    assert blocked.unpack_buffer_bytes(TWO) == 3 * 1024 * 64 * 4, "a block of three matrices"
    dropped = make_sizes(facts=wide, shape={"dropout": True})
    assert dropped.unpack_buffer_bytes(TWO) == 2048 * 64 * 4, "with dropout the MLP is plain: whole matrices"
    assert dropped.unpack_buffer_bytes(FROZEN) == 3 * 1024 * 64 * 4, "but in blocks where nothing trains"
    assert replace(dropped, evaluates=True).unpack_buffer_bytes(TWO) == 3 * 1024 * 64 * 4, "and in evaluation"
    attention_only = make_sizes(facts=wide, shape={"dropout": True, "targets": ("q_proj",)})
    assert attention_only.unpack_buffer_bytes(TWO) == 3 * 1024 * 64 * 4
    narrow = make_facts(hidden_size=64, intermediate_size=64, num_attention_heads=8, head_dim=64)
    assert make_sizes(facts=narrow).unpack_buffer_bytes(TWO) == 512 * 64 * 4, "q_proj is the largest"


# groups ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("hidden", [32, 64, 100])
def test_states_of_a_group_are_the_moments_of_the_optimizer(hidden, optimizer):
    head = ReconstructHead(hidden, seed=0)
    sizes = make_sizes(facts=make_facts(hidden_size=hidden), shape={"rank": 3}, optimizer=optimizer)
    n_elements = sum(parameter.numel() for parameter in head.parameters())
    assert sizes.group_elements(("aux", 0)) == n_elements
    assert sizes.group_bytes(("aux", 0)) == 4 * n_elements
    for group in (("aux", 0), ("layer", 1)):
        stored = make_moments(optimizer, torch.device("cpu")).zeros(sizes.group_elements(group))
        assert sizes.states_bytes(group) == stored.nbytes


def test_a_layers_group_is_its_lora_matrices():
    sizes = make_sizes(shape={"rank": 8, "targets": ("q_proj", "down_proj")})
    facts = sizes.shape.facts
    assert sizes.group_elements(("layer", 0)) == 8 * (64 + facts.n_heads * facts.head_dim) + 8 * (128 + 64)
    assert make_sizes(shape={"targets": ()}).group_elements(("layer", 0)) == 0


def test_what_is_paged_or_frozen_is_not_held():
    held = steady(make_sizes())
    assert held["gradients"] == held["adapters"] + held["aux heads"]
    assert "gradients" not in steady(make_sizes(gradients="disk"), move=True)
    assert "optimizer" not in steady(make_sizes(states="disk"))
    frozen = steady(make_sizes(), FROZEN)
    assert frozen["aux heads"] == 0
    assert 2 * frozen["adapters"] == held["adapters"]
    assert frozen["optimizer"] == 2 * frozen["adapters"]


# tiers below -----------------------------------------------------------------------------------------------------------


def test_bytes_below_the_device():
    plain = make_sizes()
    states, values = (
        sum(f(("layer", i)) for i in range(N_LAYERS)) + f(("aux", 0)) for f in (plain.states_bytes, plain.group_bytes)
    )
    assert plain.persistent_below(TWO) == {"host": 0, "disk": 0}
    weights = ("host", "disk", "host", "resident")
    assert make_sizes(weights=weights).persistent_below(TWO) == {"host": 2 * plain.bytes_of_layers[0], "disk": 0}
    on_host = make_sizes(states="host").persistent_below(TWO)
    assert on_host == {"host": states + values, "disk": 0}, "the values before the update go with them"
    paged = make_sizes(states="disk")
    below = paged.persistent_below(TWO)
    assert below["host"] == 0
    assert states + values <= below["disk"] <= states + values + 2 * 5 * DISK_GRAIN
    mixed = make_sizes(states="host", saved_inputs="disk").persistent_below(TWO)
    assert mixed["host"] == states
    assert mixed["disk"] == make_sizes(states="host", saved_inputs="disk").journal_bytes(TWO) >= values


@given(st.lists(st.integers(1, 20_000), min_size=1, max_size=30))
def test_pieces_on_disk_take_no_more_than_is_said(pieces):
    taken = sum(-(-n_bytes // DISK_GRAIN) * DISK_GRAIN for n_bytes in pieces)
    assert taken <= on_disk(sum(pieces), len(pieces))
    assert on_disk(pieces[0]) == -(-pieces[0] // DISK_GRAIN) * DISK_GRAIN


# micro-batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(7,), (9, 9), (12, 5, 1)])
def test_a_batch_is_its_tensors(lengths):
    batch = random_batch(lengths)
    held = [batch.ids_BT, batch.supervised_N, batch.targets_N, *([] if batch.real_N is None else [batch.real_N])]
    size = replace(batch.size, n_real=batch.n_tokens)
    sizes = make_sizes()
    assert sizes.batch_bytes(size) == sum(tensor.nbytes for tensor in held)
    assert sizes.batch_bytes(batch.size) >= sizes.batch_bytes(size), "where the padding is not known, there is none"
    assert sizes.hidden_bytes(size) == len(lengths) * max(lengths) * 64 * 4


def test_more_tokens_take_more_of_everything():
    sizes, segment = make_sizes(), TWO[0]
    small, large = (MicroBatchSize(2, n, n) for n in (100, 101))

    def taken(batch: MicroBatchSize) -> list[int]:
        return [
            sizes.batch_bytes(batch),
            sizes.hidden_bytes(batch),
            sizes.layer_context_bytes(batch),
            sizes.embed_within(batch),
            sizes.forward_within(batch, 0, segment),
            sizes.graph(batch, 0, segment).rest,
            sizes.loss_within(batch, task=True),
            sizes.loss_within(batch, task=False),
        ]

    assert all(less < more for less, more in zip(taken(small), taken(large), strict=True))
