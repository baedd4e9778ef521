"""Presets against what their makers publish: the parameters that follow from a shape are those of the model."""

from __future__ import annotations

import pytest

from lopt_edge.plan.facts.families import FAMILIES
from lopt_edge.plan.facts.model import ModelFacts, facts_from_config
from lopt_edge.plan.facts.presets import PRESETS, Preset, find_preset, near_presets

# Billions of parameters, as exact as they are published: Qwen2.5 and Qwen3 reports; the model pages of Llama, Mistral,
# Gemma, Phi, SmolLM, OLMo and Granite; Qwen3.5 without its vision tower, from GGUF files; Gemma 4's and Ministral's
# language models alone.
PUBLISHED = {
    "qwen2.5-0.5b": 0.49,
    "qwen2.5-1.5b": 1.54,
    "qwen2.5-3b": 3.09,
    "qwen2.5-7b": 7.61,
    "qwen2.5-14b": 14.7,
    "qwen2.5-32b": 32.5,
    "qwen3-0.6b": 0.6,
    "qwen3-1.7b": 1.7,
    "qwen3-4b": 4.0,
    "qwen3-8b": 8.2,
    "qwen3-14b": 14.8,
    "qwen3-32b": 32.8,
    "qwen3-30b-a3b": 30.5,
    "qwen3-235b-a22b": 235,
    "mixtral-8x7b": 46.7,
    "olmoe-1b-7b": 6.9,
    "llama-3.2-1b": 1.23,
    "llama-3.2-3b": 3.21,
    "llama-3.1-8b": 8.03,
    "llama-3.1-70b": 70.6,
    "llama-3.3-70b": 70.6,
    "mistral-7b-v0.3": 7.25,
    "gemma-2-2b": 2.61,
    "gemma-2-9b": 9.24,
    "gemma-3-1b": 1.0,
    "phi-3-mini": 3.82,
    "phi-4-mini": 3.84,
    "phi-4": 14.7,
    "smollm2-135m": 0.1345,
    "smollm3-3b": 3.08,
    "olmo-2-7b": 7.3,
    "olmo-3-7b": 7.298,
    "olmo-3-32b": 32.2,
    "granite-4.0-350m": 0.352,
    "granite-4.0-1b": 1.63,
    "granite-4.0-micro": 3.4,
    "granite-3.2-2b": 2.53,
    "granite-3.2-8b": 8.17,
    "gemma-4-e2b": 4.63,  # 5.1 with vision and audio, 2.3 without what tokens say to layers
    "gemma-4-e4b": 7.5,
    "gemma-4-31b": 30.7,
    "ministral-3-3b": 3.4,
    "ministral-3-8b": 8.4,
    "ministral-3-14b": 13.5,
    "qwen3.5-0.8b": 0.75,
    "qwen3.5-2b": 1.88,
    "qwen3.5-4b": 4.2,
    "qwen3.5-9b": 8.95,
    "qwen3.5-27b": 27,
    "qwen3.5-35b-a3b": 34.7,
    "gpt-oss-20b": 20.9,
    "gpt-oss-120b": 116.8,
}


# of them, for a token
ACTIVE = {"qwen3-30b-a3b": 3.3, "qwen3-235b-a22b": 22, "mixtral-8x7b": 12.9, "olmoe-1b-7b": 1.3,
          "qwen3.5-35b-a3b": 3.45,  # 3 without the embedding
          # OpenAI leaves the embedding out (3.6 and 5.1)
          "gpt-oss-20b": 3.61 + 0.58, "gpt-oss-120b": 5.13 + 0.58}  # fmt: skip


def facts_of(preset: Preset) -> ModelFacts:
    return facts_from_config(preset.config, where=preset.name)


def test_every_preset_has_a_published_size():
    assert set(PUBLISHED) == set(PRESETS)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)
def test_shape_gives_the_published_size(preset):
    facts, published = facts_of(preset), PUBLISHED[preset.name]
    assert facts.n_parameters / 1e9 == pytest.approx(published, rel=0.02)
    assert facts.n_active / 1e9 == pytest.approx(ACTIVE.get(preset.name, published), rel=0.02)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)
def test_facts(preset):
    facts = facts_of(preset)
    assert facts.quantised == (facts.model_type == "gpt_oss") and facts.max_positions >= 4096
    assert facts.recorded_dtype == ("float32" if preset.name == "olmo-2-7b" else "bfloat16")
    assert preset.source and preset.hub_id.count("/") == 1
    windowed = facts.model_type in ("gemma2", "gemma3_text", "gemma4_text", "phi3", "gpt_oss", "olmo3")
    windowed = windowed and preset.name != "phi-4"
    assert (facts.sliding_window is not None) == windowed


def test_windows_of_gemma():
    def n_full(name: str) -> int:
        return facts_of(PRESETS[name]).layer_types.count("full_attention")

    assert (n_full("gemma-2-2b"), n_full("gemma-3-1b")) == (13, 4)


# Families of which no published config could be looked up yet: a preset's numbers need a source.
NOT_LOOKED_UP = {
    "arcee",
    "glm4",
    "ernie4_5",
    "exaone4",
    "granitemoe",
    "hunyuan_v1_dense",
    "seed_oss",
}


def test_all_families_are_there():
    assert {preset.config["model_type"] for preset in PRESETS.values()} == set(FAMILIES) - NOT_LOOKED_UP


def test_names_are_unique():
    names = [preset.name for preset in PRESETS.values()] + [preset.hub_id.lower() for preset in PRESETS.values()]
    assert len(set(names)) == len(names)
    assert all(name == preset.name == preset.name.lower() for name, preset in PRESETS.items())


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)
def test_found_by_name_and_hub_id(preset):
    for name in (preset.name, preset.name.upper(), preset.name.replace("-", "_"), f" {preset.name.replace('-', ' ')} "):
        assert find_preset(name) is preset
    assert find_preset(preset.hub_id) is find_preset(preset.hub_id.lower()) is preset


def test_not_found():
    assert find_preset("gpt-2") is None
    assert find_preset("") is None
    assert near_presets("Qwen/Qwen2.5-7B-Instruct")[0] == "qwen2.5-7b"
    assert near_presets("llama3.1-8b")[0] == "llama-3.1-8b"
    assert near_presets("zzz") == []
