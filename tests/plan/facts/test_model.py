"""Model facts against transformers itself: its own config classes and its own layers, built on the meta device.

What a config leaves out, transformers fills in per family; facts must fill in the same, or refuse. So every optional key is
dropped, and set to null, in turn.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from lopt_edge.errors import InputError
from lopt_edge.models.folder import find_model
from lopt_edge.plan.facts.families import FAMILIES, WRAPPERS, family_of
from lopt_edge.plan.facts.layers import DELTA_KEYS, LinearFacts
from lopt_edge.plan.facts.model import ModelFacts, facts_from_config
from tests.pairs import pairs
from tools.tiny_models import FAMILIES as TINY
from tools.tiny_models import GEMMA4_E, make_folder, tiny_config

OPTIONAL = ["num_key_value_heads", "head_dim", "tie_word_embeddings", "attention_bias", "mlp_bias", "sliding_window",
            "use_sliding_window", "max_window_layers", "layer_types", "sliding_window_pattern"]  # fmt: skip
# Families whose layers ask config.layer_types, written down for themselves: the records' word for it is what is tested.
BY_LAYER = ("qwen2", "qwen3", "qwen3_5_text", "qwen3_5_moe_text", "gemma2", "gemma3_text", "gemma4_text", "smollm3",
            "olmo3", "exaone4", "gpt_oss")  # fmt: skip


def build(values: dict[str, Any]) -> tuple[Any, torch.nn.Module]:
    """transformers' config and model of a parsed config.json, without weights."""
    values = dict(values)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        return config, AutoModelForCausalLM.from_config(config)


def layer_types(config: Any) -> tuple[str, ...]:
    if config.model_type in BY_LAYER:
        return tuple(config.layer_types)
    windowed = (
        config.model_type in ("mistral", "ministral3", "phi3", "qwen3_moe", "mixtral") and config.sliding_window is not None
    )
    return ("sliding_attention" if windowed else "full_attention",) * config.num_hidden_layers


def linears(model: torch.nn.Module, layer: int) -> set[LinearFacts]:
    found = model.model.layers[layer].named_modules()
    return {
        LinearFacts(name, module.in_features, module.out_features, bias=module.bias is not None)
        for name, module in found
        if isinstance(module, torch.nn.Linear)
    }


def check(values: dict[str, Any]) -> ModelFacts:
    """Facts agree with transformers in everything that they say."""
    facts = facts_from_config(values, where="config.json")
    config, model = build(values)
    assert facts.n_layers == len(model.model.layers) == config.num_hidden_layers
    for layer in range(facts.n_layers):
        assert set(facts.layer(layer).linears) == linears(model, layer), layer
    assert facts.layer_types == layer_types(config)
    if "sliding_attention" in facts.layer_types:
        assert facts.sliding_window == config.sliding_window
    assert (facts.vocab_size, facts.hidden_size) == tuple(model.model.embed_tokens.weight.shape)
    assert facts.tied == (model.lm_head.weight is model.model.embed_tokens.weight)
    assert facts.n_heads == config.num_attention_heads
    for layer, kind in enumerate(facts.layer_types):
        if kind in facts.attention_types:
            attention, ours = model.model.layers[layer].self_attn, facts.layer(layer)
            assert facts.head_dim_of(kind) == ours.head_dim == attention.head_dim
            assert ours.n_kv_heads * attention.num_key_value_groups == ours.n_heads == facts.n_heads
    assert facts.intermediate_size == config.intermediate_size
    assert facts.rotary_dim in (0, 2 * len(getattr(model.model.rotary_emb, "inv_freq", ())))
    return facts


def test_the_table_and_the_test_models_name_the_same_families():
    assert set(FAMILIES) == set(TINY)


@pytest.mark.parametrize("family", FAMILIES)
def test_facts_of_a_saved_folder(tmp_path, family):
    folder = make_folder(tmp_path / "model", family, dtype=torch.bfloat16)
    found = find_model(str(folder))
    facts = check(tiny_config(family).to_dict() | {"model_type": family})
    assert found.facts.kinds == facts.kinds
    assert found.facts.layer_types == facts.layer_types
    assert found.facts.architecture == AutoConfig.from_pretrained(folder).architectures[0]
    assert (found.facts.recorded_dtype, found.facts.quantised, found.facts.max_positions) == ("bfloat16", False, 256)
    assert found.path == Path(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_names_are_the_linear_layers(family):
    """What is stored in 4 bits is exactly the linear layers' matrices, by name."""
    config, model = build(tiny_config(family).to_dict() | {"model_type": family})
    expected = {
        f"model.layers.{layer}.{linear.name}.weight"
        for layer in range(config.num_hidden_layers)
        for linear in linears(model, layer)
    }
    facts = facts_from_config(config.to_dict() | {"model_type": family}, where="config.json")
    assert {name for name in model.state_dict() if facts.packs(name)} == expected


@pytest.mark.parametrize(("family", "key", "null"), pairs(FAMILIES, OPTIONAL, [False, True]))
def test_what_a_config_leaves_out_is_filled_in_as_transformers_does(family, key, null):
    values = tiny_config(family).to_dict() | {"model_type": family}
    values.pop(key, None)
    if null:
        values[key] = None
    if family == "gemma3_text" and key == "sliding_window_pattern":
        values.pop("layer_types")
    try:
        config, _ = build(values)
    except Exception:
        return  # transformers itself refuses it
    try:
        facts_from_config(values, where="config.json")
    except InputError:
        # its default of 32 key heads does not fit our four; windows without a size would fail in its forward
        kinds = {*(getattr(config, "layer_types", None) or ())}
        not_ours = kinds - {*family_of(family).layer_types}  # mamba
        assert key == "num_key_value_heads" or not_ours or ("sliding_attention" in kinds and not config.sliding_window)
        return
    check(values)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"head_dim": None, "num_key_value_heads": 1, "tie_word_embeddings": True}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"attention_bias": True, "mlp_bias": True}),  # keys that this family's layers never ask
        ("mistral", {"layer_types": ["full_attention"] * 4}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 1}),
        ("qwen2", {"attention_bias": False}),
        ("qwen3", {"attention_bias": True}),
        ("qwen3", {"use_sliding_window": False}),
        ("gemma2", {"attention_bias": True, "tie_word_embeddings": False}),
        ("gemma3_text", {"sliding_window_pattern": 3, "num_hidden_layers": 7}),
        ("phi3", {"sliding_window": 16}),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 16}),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 16, "no_rope_layers": [0, 1, 1, 0]}),
        ("olmo2", {"attention_bias": True, "mlp_bias": True}),
        ("granite", {"attention_bias": True, "mlp_bias": True}),
        ("arcee", {"attention_bias": True, "mlp_bias": True}),
        ("glm4", {"attention_bias": False}),
        ("glm4", {"partial_rotary_factor": 0.3, "head_dim": 18}),
        ("qwen3_5_text", {"partial_rotary_factor": 0.5}),
        ("gemma4_text", {"attention_bias": True, "attention_k_eq_v": False}),
        ("gemma4_text", {"num_global_key_value_heads": None, "num_attention_heads": 8}),
        ("gemma4_text", GEMMA4_E),
        ("gemma4_text", GEMMA4_E | {"num_kv_shared_layers": 0, "attention_bias": True}),
        ("gemma4_text", {"use_bidirectional_attention": "vision", "layer_types": ["full_attention"] * 4}),
        ("qwen3_5_text", {"attention_bias": True, "linear_num_value_heads": 2, "linear_conv_kernel_dim": 2}),
        ("qwen3_5_text", {"num_hidden_layers": 8, "layer_types": ["full_attention", "linear_attention"] * 4}),
    ],
)
@pytest.mark.parametrize("derive_layer_types", [False, True])
def test_variants(family, changes, derive_layer_types):
    values = tiny_config(family, **changes).to_dict() | changes | {"model_type": family}
    if derive_layer_types and "layer_types" not in changes:
        values.pop("layer_types", None)
        values.pop("per_layer_config", None)  # which was made for other types of layers
    check(values)


HUB = {  # what stands in config.json on the hub, without what does not shape the model
    "Llama-3.2-1B": {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 2,
                     "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
                     "tie_word_embeddings": True, "torch_dtype": "bfloat16", "max_position_embeddings": 131072},
    "Mistral-7B-v0.1": {"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "sliding_window": 4096,
                        "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
                        "tie_word_embeddings": False},
    "Mistral-7B-v0.3": {"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "sliding_window": None,
                        "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32768},
    "Qwen2.5-0.5B": {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 2,
                     "num_attention_heads": 14, "num_key_value_heads": 2, "sliding_window": 32768, "vocab_size": 151936,
                     "use_sliding_window": False, "max_window_layers": 1, "tie_word_embeddings": True},
    "Qwen3-8B": {"model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 2,
                 "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "sliding_window": None,
                 "use_sliding_window": False, "max_window_layers": 36, "vocab_size": 151936, "attention_bias": False},
    "gemma-2-2b": {"model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 3,
                   "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096,
                   "vocab_size": 256000},
    "gemma-3-1b": {"model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 8,
                   "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512,
                   "sliding_window_pattern": 6, "vocab_size": 262144},
    "Phi-3-mini-4k": {"model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 2,
                      "num_attention_heads": 32, "num_key_value_heads": 32, "sliding_window": 2047, "vocab_size": 32064,
                      "pad_token_id": 32000},
    "SmolLM3-3B": {"model_type": "smollm3", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 4,
                   "num_attention_heads": 16, "num_key_value_heads": 4, "use_sliding_window": False,
                   "sliding_window": None, "no_rope_layer_interval": 4, "vocab_size": 128256},
    "OLMo-2-7B": {"model_type": "olmo2", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 2,
                  "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 100352,
                  "tie_word_embeddings": False},
    "Qwen3.5-9B": {"model_type": "qwen3_5_text", "num_hidden_layers": 8},  # whose values are transformers' defaults
    "gemma-4-31b": {"model_type": "gemma4_text", "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 12,
                    "num_attention_heads": 32, "num_key_value_heads": 16, "attention_k_eq_v": True,
                    "num_global_key_value_heads": 4, "hidden_size_per_layer_input": 0, "sliding_window": 1024},
    "granite-3.1-2b": {"model_type": "granite", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 2,
                       "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 49155,
                       "tie_word_embeddings": True},
}  # fmt: skip


@pytest.mark.parametrize("name", HUB)
def test_configs_of_the_hub(name):
    check(HUB[name])


LLAMA, GEMMA4 = HUB["Llama-3.2-1B"], HUB["gemma-4-31b"]
GRANITE4 = LLAMA | {"model_type": "granitemoehybrid", "num_local_experts": 0, "position_embedding_type": "rope",
                    "layer_types": ["attention"] * 2, "shared_intermediate_size": 8192}  # fmt: skip
GLM4 = LLAMA | {"model_type": "glm4", "rope_parameters": None}


def test_all_missing_numbers_are_told_together():
    values = {key: value for key, value in LLAMA.items() if key not in ("hidden_size", "vocab_size")}
    with pytest.raises(InputError) as caught:
        facts_from_config(values | {"num_hidden_layers": "two"}, where="m/config.json")
    text = str(caught.value)
    for part in ("3 problems", "m/config.json", "'hidden_size'", "'vocab_size'", "num_hidden_layers", "'two'"):
        assert part in text


@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    ],
)
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "8", [], {}, 2**31])
def test_numbers_must_be_positive_integers(key, value):
    with pytest.raises(InputError, match=f"{key} must be a positive integer"):
        facts_from_config(LLAMA | {key: value}, where="config.json")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([], "not a JSON object"),
        (None, "not a JSON object"),
        ({}, "not supported"),
        (GEMMA4 | {"num_kv_shared_layers": 4}, "num_kv_shared_layers without hidden_size_per_layer_input"),
        (GEMMA4 | {"num_kv_shared_layers": 12}, "num_kv_shared_layers must be an integer from 0 to 11"),
        (GEMMA4 | {"num_kv_shared_layers": 8}, "leaves a type of layer without keys of its own"),
        (GEMMA4 | {"hidden_size_per_layer_input": 256}, "beside values that are keys"),
        (GEMMA4 | {"hidden_size_per_layer_input": "x"}, "hidden_size_per_layer_input must be a positive integer"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [1, "2"]}, "mlp_only_layers must be a list of layers"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": 3}, "mlp_only_layers must be a list of layers"),
        (GEMMA4 | {"enable_moe_block": True}, "a mixture of experts"),
        (GEMMA4 | {"use_bidirectional_attention": "all"}, "bidirectional"),
        (GEMMA4 | {"per_layer_config": {"1": {"intermediate_size": 64}}}, "per_layer_config sets 'intermediate_size'"),
        (GEMMA4 | {"per_layer_config": {"1": {"head_dim": "64"}}}, "head_dim of a layer must be a positive integer"),
        (GEMMA4 | {"per_layer_config": [1]}, "per_layer_config"),
        (GEMMA4 | {"global_head_dim": 0}, "head_dim of a layer must be a positive integer"),
        ({"model_type": "qwen3_5_text", "linear_num_value_heads": 24}, "linear_num_value_heads is not a multiple"),
        (GRANITE4 | {"num_local_experts": 62}, "experts beside an MLP"),
        (GRANITE4 | {"position_embedding_type": None}, "position_embedding_type 'None' is not supported, only 'rope'"),
        (GRANITE4 | {"layer_types": ["attention", "mamba"]}, "layer_types must name full_attention"),
        (GRANITE4 | {"shared_intermediate_size": "x"}, "shared_intermediate_size must be a positive integer"),
        (GLM4 | {"partial_rotary_factor": 1.5}, "partial_rotary_factor must be a number up to 1"),
        (GLM4 | {"rope_parameters": {"partial_rotary_factor": "half"}}, "partial_rotary_factor must be a number"),
        ({"model_type": "qwen3_5_text", "linear_key_head_dim": 0}, "linear_key_head_dim must be a positive integer"),
        (LLAMA | {"model_type": "gpt2"}, "'gpt2' is not supported"),
        (LLAMA | {"model_type": ["llama"]}, "not supported"),
        (
            LLAMA | {"model_type": "gpt2"},
            "gemma3_text.*models: gemma3, gemma4, mistral3, qwen2_5_vl, qwen2_vl, qwen3_5, qwen3_5_moe, qwen3_vl",
        ),  # the whole list is shown
        (LLAMA | {"model_type": "gemma3"}, "text_config is not an object"),
        (LLAMA | {"num_hidden_layers": 20_000}, "out of reason"),
        (LLAMA | {"num_key_value_heads": 5}, "multiple"),
        (LLAMA | {"quantization_config": {"quant_method": "hqq", "bits": 4}}, "'hqq'.*GPTQ, AWQ"),
        (LLAMA | {"quantization_config": {"quant_method": "awq"}}, "'awq'"),
        (LLAMA | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "bitsandbytes"),
        (LLAMA | {"quantization_config": {}}, "quantised with"),
        (HUB["gemma-3-1b"] | {"use_bidirectional_attention": True}, "bidirectional"),
    ],
)
def test_what_is_refused_is_named(values, says):
    with pytest.raises(InputError, match=f"(?s){says}") as caught:
        facts_from_config(values, where="m/config.json")
    assert "m/config.json" in str(caught.value)


def test_a_4_bit_folder_is_recognised():
    quantisation = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    assert facts_from_config(LLAMA | {"quantization_config": quantisation}, where="").quantised
    assert not facts_from_config(LLAMA | {"quantization_config": None}, where="").quantised


KEYS = [*LLAMA, *OPTIONAL, *DELTA_KEYS, *GEMMA4, "per_layer_config", "hidden_size_per_layer_input", "mlp_only_layers",
        "vocab_size_per_layer_input", "num_kv_shared_layers", "use_double_wide_mlp", "global_head_dim",
        "full_attention_interval", "architectures", "dtype", "quantization_config", "no_rope_layers",
        "no_rope_layer_interval"]  # fmt: skip
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
VALUES = SCALARS | st.lists(SCALARS, max_size=4) | st.dictionaries(st.text(max_size=4), SCALARS, max_size=2)


@settings(deadline=None, max_examples=100)
@given(name=st.sampled_from(sorted(HUB)), changes=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4))
def test_any_values_give_facts_or_an_input_error(name, changes):
    try:
        facts = facts_from_config(HUB[name] | changes, where="config.json")
    except InputError:
        return
    assert len(facts.layer_types) == facts.n_layers
    assert set(facts.layer_types) <= set(facts.family.layer_types)
    assert facts.sliding_window is None or type(facts.sliding_window) is int
    assert "sliding_attention" not in facts.layer_types or facts.sliding_window
    assert facts.max_positions is None or type(facts.max_positions) is int


# --- a text model inside a multimodal one -----------------------------------------------------------------------------

WRAPPED = {  # as published, without what does not shape the text model; Gemma leaves most to transformers' defaults
    "gemma-3-4b": ("gemma3", {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
                              "num_hidden_layers": 34, "sliding_window": 1024}),
    "mistral-small-3.1": ("mistral3", {"hidden_size": 5120, "intermediate_size": 32768, "model_type": "mistral",
                                       "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8,
                                       "head_dim": 128, "vocab_size": 131072, "sliding_window": None,
                                       "max_position_embeddings": 131072}),
    "qwen3-vl-4b": ("qwen3_vl", {"hidden_size": 2560, "intermediate_size": 9728, "model_type": "qwen3_vl_text",
                                 "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
                                 "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 262144,
                                 "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20],
                                                  "rope_type": "default"}}),
    "qwen3.5-4b": ("qwen3_5", {"hidden_size": 2560, "intermediate_size": 9216, "model_type": "qwen3_5_text",
                               "max_position_embeddings": 262144}),
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPED)
def test_the_facts_of_a_wrapped_model_are_those_of_its_text(name):
    wrapper, text = WRAPPED[name]
    facts = facts_from_config({"model_type": wrapper, "text_config": text, "torch_dtype": "bfloat16"}, where="here")
    config = AutoConfig.for_model(wrapper, text_config=text).get_text_config()
    numbers = ("vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings")
    ours = (facts.vocab_size, facts.n_heads, facts.n_kv_heads, facts.head_dim, facts.max_positions)
    assert ours == tuple(getattr(config, number) for number in numbers)
    assert (facts.wrapper, facts.recorded_dtype) == (wrapper, "bfloat16")
    assert facts.tied == AutoConfig.for_model(wrapper, text_config=text).tie_word_embeddings
    family = WRAPPERS[wrapper].text if text["model_type"] in WRAPPERS[wrapper].inner else text["model_type"]
    alone = facts_from_config({**text, "torch_dtype": "bfloat16", "model_type": family}, where="here")
    same = {"architecture": "", "wrapper": "", "layout": facts.layout, "tied": facts.tied}
    assert replace(facts, **same) == replace(alone, **same)
    assert facts.outside is not None and alone.outside is None


def test_a_flat_config_of_the_hub_is_read_as_transformers_reads_it():
    """Qwen2.5-VL-3B's config.json on the hub: the text model's values stand beside the vision model's."""
    flat = {"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"], "hidden_size": 2048,
            "intermediate_size": 11008, "max_position_embeddings": 128000, "max_window_layers": 70,
            "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 2, "sliding_window": 32768,
            "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 151936,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "rope_theta": 1000000.0,
            "vision_config": {"hidden_size": 1280, "out_hidden_size": 2048}}  # fmt: skip
    facts = facts_from_config(flat, where="here")
    config = AutoConfig.for_model(**flat).get_text_config()
    assert (facts.model_type, facts.wrapper, facts.tied, facts.sliding_window) == ("qwen2", "qwen2_5_vl", True, None)
    assert (facts.n_layers, facts.n_kv_heads) == (config.num_hidden_layers, config.num_key_value_heads)
    assert facts.layer_types == tuple(config.layer_types) and facts.recorded_dtype == "bfloat16"
    found = facts.of_checkpoint(
        {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "visual.merger.ln_q.weight"}
    )
    assert found.layout.layer(1) == "model.layers.1." and found.layout.decoder == "model.language_model" and found.tied
    assert "model.visual" in found.modules_beside({"visual.merger.ln_q.weight", "model.embed_tokens.weight"})


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
@pytest.mark.parametrize("head", [None, "lm_head.weight", "language_model.lm_head.weight"])
def test_a_checkpoint_says_where_the_text_model_lies(prefix, head):
    wrapper, text = WRAPPED["mistral-small-3.1"]
    facts = facts_from_config({"model_type": wrapper, "text_config": text}, where="here")
    names = {f"{prefix}embed_tokens.weight", "vision_tower.layers.0.q_proj.weight", "multi_modal_projector.linear_1.weight"}
    found = facts.of_checkpoint(names | ({head} if head else set()))
    assert found.layout.layer(3) == f"{prefix}layers.3." and found.layout.decoder == "model.language_model"
    assert found.tied == (head is None)
    assert found.layout.head(tied=found.tied) == (head or f"{prefix}embed_tokens.weight")
    assert found.packs(f"{prefix}layers.0.mlp.up_proj.weight") and not found.packs("vision_tower.layers.0.q_proj.weight")
    assert {"vision_tower", "model.vision_tower", "multi_modal_projector", "lm_head"} <= {*found.modules_beside(names)}
