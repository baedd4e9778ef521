"""From settings to the planner's questions: what cannot be is refused with advice, what has no effect is said, what the
user fixed stays fixed. And law 9's half on budgets: a smaller one never yields a larger predicted peak.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lopt_edge.config.settings import Config
from lopt_edge.errors import InputError, InputErrors
from lopt_edge.plan.costs.shape import LayerShape
from lopt_edge.plan.costs.sizes import MicroBatchSize
from lopt_edge.plan.facts.budget import Budget
from lopt_edge.plan.facts.model import ModelFacts, facts_from_config
from lopt_edge.plan.facts.presets import find_preset
from lopt_edge.plan.facts.profile import default_cpu_profile
from lopt_edge.plan.search.search import Search
from lopt_edge.plan.search.workload import Workload
from lopt_edge.planning.settings import (
    against_facts,
    check_memory_settings,
    deterministic_notes,
    fixed_knobs,
    memory_warnings,
    search_space,
    target_modules,
)
from tests.plan.costs.test_sizes import N_LAYERS, make_facts
from tests.plan.plans import make_course, make_knobs
from tools.tiny_models import tiny_config

FACTS = make_facts()


def make_config(**values: Any) -> Config:
    return Config(model="m", data="d", output="o", **values)


def refused(device_type: str = "cpu", **values: Any) -> list[InputError]:
    with pytest.raises((InputError, InputErrors)) as caught:
        check_memory_settings(make_config(**values), FACTS, device_type=device_type)
    error = caught.value
    return list(error.errors) if isinstance(error, InputErrors) else [error]


@pytest.mark.parametrize(
    ("values", "where", "what", "advice"),
    [
        ({"weights": "host"}, "weights", "host is refused", "use disk"),
        ({"weights": "disk,1-2=host"}, "weights", "host is refused", "use disk"),
        ({"saved_inputs": "host"}, "saved_inputs", "host is refused", "use disk"),
        ({"optimizer_states": "host"}, "optimizer_states", "host is refused", "use disk"),
        ({"gradients": "host"}, "gradients", "host is refused", "use disk"),
        ({"host_memory": "8GB"}, "host_memory", "no host tier", "--device-memory"),
        ({"pinned_memory": "1GB"}, "pinned_memory", "no host tier", "--device-memory"),
        ({"weights": "nowhere"}, "weights", "'nowhere'", "resident, host, disk"),
        ({"activations": "keep,9=page"}, "activations", "beyond 0-3", "keep, recompute, page"),
        ({"apply": "layer", "grad_accum": 1}, "apply", "needs clip 0", "--clip 0"),
        ({"apply": "layer", "clip": 0.0, "grad_accum": 4}, "apply", "needs grad_accum 1, not 4", "--grad-accum 1"),
        ({"apply": "segment", "clip_scope": "global"}, "apply", "needs clip_scope segment", "--clip-scope segment"),
    ],
)
def test_settings_that_cannot_be(values, where, what, advice):
    (error,) = refused(**values)
    assert error.where == where
    assert what in error.what
    assert advice in error.fix


def test_all_mistakes_are_told_together():
    found = refused(weights="host", gradients="host", host_memory="8GB", apply="layer", grad_accum=2)
    assert [error.where for error in found] == ["weights", "gradients", "host_memory", "apply", "apply"]


@pytest.mark.parametrize(
    ("device_type", "values"),
    [
        ("cpu", {}),
        ("cpu", {"weights": "disk,0=resident", "activations": "page", "saved_inputs": "disk", "gradients": "disk"}),
        ("cpu", {"apply": "layer", "clip": 0.0, "grad_accum": 1}),
        ("cpu", {"apply": "segment"}),
        ("cpu", {"apply": "segment", "clip": 0.0, "clip_scope": "global"}),
        ("cuda", {"weights": "host", "saved_inputs": "host", "gradients": "host", "optimizer_states": "host",
                  "host_memory": "8GB", "pinned_memory": "1GB"}),
    ],
)  # fmt: skip
def test_settings_that_can_be(device_type, values):
    check_memory_settings(make_config(**values), FACTS, device_type=device_type)


def test_the_same_bits_are_refused_where_no_kernel_gives_them_and_their_cost_is_said():
    hybrid = facts_from_config(tiny_config("qwen3_5_text").to_dict(), where="test")
    asked = make_config(deterministic=True)
    with pytest.raises(InputError, match=r"deterministic: a gated delta rule .* no deterministic kernel"):
        check_memory_settings(asked, hybrid, device_type="cuda")
    for facts, device_type in ((hybrid, "cpu"), (FACTS, "cuda")):
        check_memory_settings(asked, facts, device_type=device_type)
    assert "memory-efficient kernel" in deterministic_notes(asked, "cuda")[0]
    assert "the same bits anyway" in deterministic_notes(asked, "cpu")[0]
    assert deterministic_notes(make_config(), "cuda") == ()


def test_what_the_user_said_is_fixed_and_nothing_else():
    found = fixed_knobs(make_config(), FACTS)
    assert not set(found) & {"weights", "activations", "saved_inputs", "states", "gradients", "prefetch", "token_tile"}
    said = make_config(
        weights="disk,0-1=resident",
        activations="keep",
        saved_inputs="disk",
        optimizer_states="disk",
        gradients="device",
        prefetch=1,
        token_tile=512,
        optimizer="adamw8bit",
        apply="segment",
    )
    assert fixed_knobs(said, FACTS) == {
        "weights": ("resident", "resident", "disk", "disk"),
        "activations": ("keep",) * 4,
        "saved_inputs": "disk",
        "states": "disk",
        "gradients": "device",
        "prefetch": 1,
        "token_tile": 512,
        "optimizer": "adamw8bit",
        "apply": "segment",
    }
    for knobs in search_space(said, FACTS, "cpu"):
        assert (knobs.weights, knobs.states, knobs.prefetch) == (("resident", "resident", "disk", "disk"), "disk", 1)
        assert knobs.token_tile == 512
    assert search_space(said, FACTS, "cpu").said >= {"weights", "states", "prefetch", "optimizer"}
    assert not search_space(make_config(), FACTS, "cpu").said & {"optimizer", "apply"}


def test_target_modules():
    assert target_modules(FACTS, ["all-linear"]) == FACTS.linear_names
    assert target_modules(FACTS, ["v_proj", "q_proj"]) == ("q_proj", "v_proj"), "in the layer's order"
    with pytest.raises(InputError, match="fc1") as caught:
        target_modules(FACTS, ["fc1", "q_proj"])
    assert "q_proj" in caught.value.fix


def test_a_model_with_experts_has_adapters_on_its_attention():
    preset = find_preset("qwen3-30b-a3b")
    assert preset is not None
    facts = facts_from_config(preset.config, where="here")
    assert target_modules(facts, ["all-linear"]) == ("q_proj", "k_proj", "v_proj", "o_proj")
    with pytest.raises(InputError, match="gate_proj is not in this model") as caught:
        target_modules(facts, ["q_proj", "gate_proj"])
    assert "o_proj" in caught.value.fix
    with pytest.raises(InputError, match="layers 3 have experts") as refused:
        against_facts(make_config(method="repl", replace_layers=(3,)), facts)
    assert refused.value.where == "replace_layers"


def test_a_run_against_its_model():
    course, targets, longest = against_facts(make_config(num_segments=2), FACTS)
    assert (len(course.kinds[0].segments), targets) == (2, FACTS.linear_names)
    assert longest == min(2048, FACTS.max_positions), "a default is cut to the model's positions"
    with pytest.raises(InputErrors) as caught:
        against_facts(make_config(num_segments=9, lora_targets=("fc1",), max_seq_len=10**6), FACTS)
    assert [error.where for error in caught.value.errors] == ["num_segments", "lora_targets", "max_seq_len"]


@pytest.mark.parametrize(
    ("values", "changes", "said"),
    [
        ({}, {}, None),
        ({"prefetch": 2}, {}, "prefetch"),
        ({"prefetch": 2}, {"weights": "disk"}, None),
        ({"prefetch": 2}, {"activations": "page"}, None),
        ({"page_dir": "x"}, {}, "page_dir"),
        ({"page_dir": "x"}, {"saved_inputs": "host"}, "page_dir"),
        ({"page_dir": "x"}, {"states": "disk"}, None),
        ({"saved_inputs": "disk"}, {"saved_inputs": "disk", "activations": "keep"}, "saved_inputs"),
        ({"saved_inputs": "disk"}, {"saved_inputs": "disk"}, None),
        ({"gradients": "disk", "apply": "layer"}, {"gradients": "disk"}, "gradients"),
        ({"gradients": "disk"}, {"gradients": "disk"}, None),
        ({"token_tile": 256, "max_seq_len": 128, "batch_size": 2}, {}, "token_tile"),
        ({"token_tile": 2048, "max_seq_len": 1024}, {}, "token_tile"),
        ({"token_tile": 256, "max_seq_len": 128, "batch_size": 3}, {}, None),
        ({"token_tile": 2048, "max_seq_len": 1025}, {}, None),
    ],
)
def test_a_setting_without_effect_is_said(values, changes, said):
    found = list(memory_warnings(make_config(**values), make_knobs(N_LAYERS, **changes), FACTS))
    assert [sentence.split()[0] for sentence in found] == ([] if said is None else [said])
    assert all("has no effect" in sentence for sentence in found)


def test_pieces_of_an_mlp_that_has_none_are_said():
    """Phi-3 joins gate and up in one matrix."""
    facts = facts_from_config(tiny_config("phi3").to_dict(), where="config.json")
    found = list(memory_warnings(make_config(mlp_block=512, mlp_tile=64), make_knobs(N_LAYERS), facts))
    assert [sentence.split()[0] for sentence in found] == ["mlp_block", "mlp_tile"]


# budgets ---------------------------------------------------------------------------------------------------------------


def small_facts() -> ModelFacts:
    """Qwen2.5-0.5B's layers, four of them."""
    preset = find_preset("qwen2.5-0.5b")
    assert preset is not None
    return facts_from_config(preset.config | {"num_hidden_layers": N_LAYERS}, where="here")


@lru_cache(maxsize=8)
def search_of(method: Any, gradients: str) -> Search:
    facts = small_facts()
    course = make_course(method, n_layers=N_LAYERS, num_segments=1 if method == "e2e" else 2)
    shape = LayerShape(facts, 4, 8, facts.linear_names)
    workload = Workload(course, shape, (MicroBatchSize(1, 700, 600),) * 2, default_cpu_profile(), 0)
    config = make_config(**({} if gradients == "auto" else {"gradients": gradients}))
    return Search(workload, search_space(config, facts, "cpu"))


SHARES = st.floats(0.5, 1.1)  # of what the fastest combination takes


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(["lopt", "e2e", "frozen"]), st.sampled_from(["auto", "device"]), SHARES, SHARES)
def test_a_smaller_budget_never_yields_a_larger_predicted_peak(method, gradients, share, other):
    search = search_of(method, gradients)
    largest = search.within(Budget()).best.prediction.device_bytes
    small, large = (Budget(device_bytes=round(part * largest)) for part in sorted((share, other)))
    best_small, best_large = search.within(small).best, search.within(large).best
    if best_small is None:
        assert search.smallest.prediction.device_bytes > small.device_bytes
        return
    assert best_small.prediction.device_bytes <= small.device_bytes
    assert best_large is not None, "what fits the smaller budget fits the larger one"
    assert best_small.prediction.device_bytes <= best_large.prediction.device_bytes
    assert best_large.seconds.seconds <= 1.01 * best_small.seconds.seconds, "nor is it slower"
