"""Architectures of GGUF files as families of ours: their config from the metadata, and the names of their tensors.

llama.cpp writes a model under names, keys and an order of rows of its own; a record here says how that is undone for one of
its architectures (llama.cpp, conversion from transformers, and gguf's `TensorNameMap`). Three things change what is
computed: rows of q and k that lie as pairs of a rotation, norms that are stored with 1 added, and tables of rotary factors.
Stacks of experts are cut by gguf_experts.py.

The rule: whatever a file says about its model is used or refused. A key of the architecture that is not known here, or a
tensor, could change what runs, so it is named and refused, never passed over. No torch, no transformers.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lopt_edge.errors import InputError
from lopt_edge.plan.facts.families import family_of
from lopt_edge.plan.facts.families.family import Layout
from lopt_edge.plan.facts.gguf_experts import STACKS, expert_entries
from quant.gguf.header import GgufHeader
from quant.headers import TensorEntry
from quant.untrusted import printable_name

SANDWICH = {"ffn_norm": "pre_feedforward_layernorm", "post_attention_norm": "post_attention_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm"}  # fmt: skip
FUSED = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
PARTS = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
REQUIRED = {
    "block_count": "num_hidden_layers", "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}  # fmt: skip
OPTIONAL = {"context_length": "max_position_embeddings", "attention.head_count_kv": "num_key_value_heads"}
# read by a function of their own, or saying nothing that the tensors do not say
SEEN = ("vocab_size", "rope.freq_base", "rope.dimension_count", "attention.key_length", "attention.value_length",
        "rope.scaling.type", "rope.scaling.factor", "rope.scaling.finetuned",
        "rope.scaling.original_context_length", "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow")  # fmt: skip
SINKS = "self_attn.sinks"


@dataclass(frozen=True)
class Architecture:
    """One architecture of llama.cpp. `pairs`: rows of q and k lie pair by pair of a rotation, as llama.cpp's oldest
    rotation wants them. `norm_offset` was added to every norm. `keys` and `fixed` are what it says beside the common keys,
    and what is not said. `has_experts`: it has stacks of them, which are read and not written."""

    model_type: str
    published: str
    pairs: bool = False
    norm_offset: float = 0.0
    parts: Mapping[str, str] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    has_experts: bool = False


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", pairs=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM"),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", pairs=True, fixed={"no_rope_layer_interval": 4}),
    "olmo2": Architecture("olmo2", "Olmo2ForCausalLM", parts=SANDWICH),
    "phi3": Architecture(
        "phi3", "Phi3ForCausalLM", parts=FUSED, keys={"attention.sliding_window": "sliding_window"},
    ),
    "granite": Architecture(
        "granite", "GraniteForCausalLM", pairs=True,
        keys={"attention.scale": "attention_multiplier", "embedding_scale": "embedding_multiplier",
              "residual_scale": "residual_multiplier", "logit_scale": "logits_scaling"},
    ),
    "gemma2": Architecture(
        "gemma2", "Gemma2ForCausalLM", norm_offset=1.0, parts=SANDWICH,
        keys={"attention.sliding_window": "sliding_window", "attn_logit_softcapping": "attn_logit_softcapping",
              "final_logit_softcapping": "final_logit_softcapping"},
    ),
    "gemma3": Architecture(
        "gemma3_text", "Gemma3ForCausalLM", norm_offset=1.0, parts=SANDWICH,
        keys={"attention.sliding_window": "sliding_window", "final_logit_softcapping": "final_logit_softcapping"},
        fixed={"sliding_window_pattern": 6},
    ),
    "gpt-oss": Architecture(
        "gpt_oss", "GptOssForCausalLM", has_experts=True,
        parts={"post_attention_norm": "post_attention_layernorm", "ffn_gate_inp": "mlp.router"},
        keys={"attention.sliding_window": "sliding_window", "expert_feed_forward_length": "intermediate_size",
              "expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
    ),
}  # fmt: skip
# Llama 3.1 and 3.2 stretch their rotation by a rule whose table is stored, not its numbers: those that were published.
LLAMA3_ROPES = tuple(
    {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    for factor in (8.0, 32.0)
)
FREQUENCIES = "rope_freqs.weight"


LIKE_LLAMA = {"mistral": "llama"}  # written by llama.cpp's converter as another family
# Kinds of tokenizers, and of cutting texts, that GGUF names as families are named.
SENTENCEPIECE, CUT_AS_QWEN2 = "llama", "qwen2"


def architecture_for(family: str, *, wrapper: str, sliding_window: int | None) -> tuple[str, Architecture] | None:
    """The architecture as which a model in full precision is written; None for one that cannot be."""
    wanted = LIKE_LLAMA.get(family, family)
    if wrapper or (sliding_window and wanted != family):
        return None
    return next(((name, kind) for name, kind in ARCHITECTURES.items() if kind.model_type == wanted), None)


def can_be_written(told: Mapping[str, Any]) -> bool:
    """Whether a model can be written as GGUF, by its facts as run.json has them."""
    found = architecture_for(told["model_type"], wrapper=told["wrapper"], sliding_window=told["sliding_window"])
    return found is not None and not found[1].has_experts


def architecture_of(header: GgufHeader) -> tuple[str, Architecture]:
    """The architecture that a file names. Raises InputError for one that no family of ours is."""
    name = header.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise _refusal(
            header,
            f"its architecture is {printable_name(str(name)[:60])!r}, which is not supported as GGUF",
            f"supported: {', '.join(sorted(ARCHITECTURES))}; or use the model's safetensors folder",
        )
    return name, ARCHITECTURES[name]


def config_of(header: GgufHeader) -> dict[str, Any]:
    """The model's config.json, from the metadata and the tensors' shapes. Raises InputError for what is missing or new."""
    name, kind = architecture_of(header)
    own = {key.removeprefix(f"{name}."): value for key, value in header.metadata.items() if key.startswith(f"{name}.")}
    named = {**REQUIRED, **OPTIONAL, **kind.keys}
    if unknown := sorted(own.keys() - named.keys() - {*SEEN}):
        what = f"says {name}.{unknown[0][:60]} = {str(own[unknown[0]])[:40]}, which is not known here"
        raise _refusal(header, what, "this file's model may compute otherwise than its family; use its safetensors folder")
    missing = [key for key in REQUIRED if key not in own]
    embedding = header.entries.get("token_embd.weight")
    if missing or embedding is None or len(embedding.shape) != 2:
        raise _refusal(header, f"lacks {f'{name}.{missing[0]}' if missing else 'token_embd.weight'}", "download it again")
    found: dict[str, Any] = {"architectures": [kind.published], "model_type": kind.model_type, "dtype": "float32"}
    found |= {config_key: _exact(own[key]) for key, config_key in named.items() if key in own}
    found |= {"vocab_size": embedding.shape[0], "tie_word_embeddings": "output.weight" not in header.entries}
    found |= {**_token_ids(header), **kind.fixed}
    if any(key in header.entries for key in ("blk.0.attn_q.bias", "blk.0.attn_output.bias")):
        found["attention_bias"] = True
    if "blk.0.ffn_up.bias" in header.entries:
        found["mlp_bias"] = True
    _add_head_size(found, own, header)
    _add_rotation(found, own, header, name)
    return found


def entries_of(header: GgufHeader) -> dict[str, TensorEntry]:
    """The tensors by the names that transformers gives them. Raises InputError for one that has none."""
    _, kind = architecture_of(header)
    parts, layout = {**PARTS, **kind.parts}, Layout()
    outside = {
        "token_embd.weight": layout.embedding,
        "output_norm.weight": f"{layout.norm}weight",
        "output.weight": layout.lm_head,
    }
    heads = {"q_proj": "attention.head_count", "k_proj": "attention.head_count_kv"}
    found = {}
    stacks: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in header.entries.items():
        if name == FREQUENCIES:  # in the config
            continue
        match = re.fullmatch(r"blk\.(\d{1,5})\.(\w+)\.(weight|bias)", name)
        if kind.has_experts and match and match[2] in STACKS:
            stacks.setdefault(layout.layer(int(match[1])), {})[f"{match[2]}.{match[3]}"] = entry
            continue
        if kind.has_experts and match and (match[2], match[3]) == ("attn_sinks", "weight"):
            sinks = f"{layout.layer(int(match[1]))}{SINKS}"
            found[sinks] = replace(entry, name=sinks)
            continue
        ours = (
            f"{layout.layer(int(match[1]))}{parts[match[2]]}.{match[3]}"
            if match and match[2] in parts
            else outside.get(name)
        )
        if ours is None:
            what = f"has the tensor {printable_name(name[:80])!r}, which no tensor of this architecture is known to be"
            raise _refusal(header, what, "use the model's safetensors folder")
        offset = kind.norm_offset if ours.endswith("norm.weight") else 0.0
        key = heads.get(ours.rsplit(".", 2)[1]) if kind.pairs else None
        n_heads = header.metadata.get(f"{_name_of(header)}.{key}") if key else 0
        found[ours] = replace(entry, name=ours, rotary_heads=_heads(n_heads, entry, header), offset=offset)
    for prefix, some in stacks.items():
        found |= _of_experts(some, kind, prefix, header)
    return found


def _of_experts(
    stacks: Mapping[str, TensorEntry], kind: Architecture, prefix: str, header: GgufHeader
) -> dict[str, TensorEntry]:
    """The experts' matrices of a layer. Raises InputError for stacks that do not belong together."""
    family, count = family_of(kind.model_type).experts, header.metadata.get(f"{_name_of(header)}.expert_count")
    assert family is not None
    if type(count) is not int or count < 1:
        raise _refusal(header, f"says {str(count)[:20]} experts", "")
    return expert_entries(stacks, family, prefix, count=count, refuse=lambda what: _refusal(header, what, ""))


def _name_of(header: GgufHeader) -> str:
    return str(header.metadata["general.architecture"])


def _heads(n_heads: Any, entry: TensorEntry, header: GgufHeader) -> int:
    if n_heads == 0:
        return 0
    if type(n_heads) is not int or n_heads < 0 or entry.shape[0] % (2 * n_heads):
        raise _refusal(header, f"{entry.name} has {entry.shape[0]} rows, which {str(n_heads)[:20]} heads cannot have", "")
    return n_heads


def _refusal(header: GgufHeader, what: str, fix: str) -> InputError:
    return InputError(what, where=str(header.paths[0]), fix=fix or "download it again")


def _exact(value: Any) -> Any:
    """A number as a person would write it: GGUF stores fp32, of which the shortest decimal is taken."""
    if not isinstance(value, float) or not math.isfinite(value):
        return value
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return value


def _token_ids(header: GgufHeader) -> dict[str, Any]:
    keys = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    ids = {key: header.metadata.get(f"tokenizer.ggml.{word}_token_id") for key, word in keys.items()}
    # a class' default may be no token of this vocabulary
    return {key: value if type(value) is int else None for key, value in ids.items()}


def _add_head_size(config: dict[str, Any], own: Mapping[str, Any], header: GgufHeader) -> None:
    """Put the size of a head into the config. Raises InputError where keys and values differ, or a part rotates alone."""
    key, value = own.get("attention.key_length"), own.get("attention.value_length")
    rotated = own.get("rope.dimension_count")
    hidden, n_heads = config["hidden_size"], config["num_attention_heads"]
    if type(hidden) is not int or type(n_heads) is not int or n_heads < 1:
        return  # facts_from_config says what is wrong with them
    size = key or hidden // n_heads
    if value not in (None, size) or rotated not in (None, size):
        what = f"heads of {size} whose values have {value} and of which {rotated} rotate are not supported"
        raise _refusal(header, what, "use the model's safetensors folder")
    config["head_dim"] = size


def _add_rotation(config: dict[str, Any], own: Mapping[str, Any], header: GgufHeader, name: str) -> None:
    """Put the rotary parameters into the config. Raises InputError for a stretching that is not known."""
    plain = {"rope_type": "default", "rope_theta": _exact(own.get("rope.freq_base", 10_000.0))}
    kind, factor = own.get("rope.scaling.type", "none"), _exact(own.get("rope.scaling.factor", 1.0))
    full: dict[str, Any] = plain
    if FREQUENCIES in header.entries:
        full = {**plain, "rope_type": "llama3", **_llama3(header, plain["rope_theta"], config["head_dim"])}
    elif kind == "linear":
        full = {**plain, "rope_type": "linear", "factor": factor}
    elif kind == "yarn" and name == "gpt-oss":  # its numbers beside these are those of the published model
        full = {**plain, "rope_type": "yarn", "factor": factor, "truncate": False}
        full["original_max_position_embeddings"] = own.get("rope.scaling.original_context_length", 4096)
        for key, usual in (("beta_fast", 32.0), ("beta_slow", 1.0)):
            full[key] = _exact(own.get(f"rope.scaling.yarn_{key}", usual))
    elif kind != "none":
        raise _refusal(header, f"stretches its rotation by {str(kind)[:40]!r}, which is not supported", "")
    config["rope_parameters"] = full
    if name == "gemma3":  # its layers with a window rotate by a base of their own, which llama.cpp knows without being told
        config["rope_parameters"] = {
            "full_attention": full,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        }
    if name in ("gemma2", "gemma3"):  # llama.cpp, too, scales scores by the hidden size only in the largest ones
        largest = config["num_hidden_layers"] == {"gemma2": 46, "gemma3": 62}[name]
        by_hidden = config["hidden_size"] // config["num_attention_heads"]
        config["query_pre_attn_scalar"] = by_hidden if largest else config["head_dim"]


def _llama3(header: GgufHeader, theta: float, head_dim: int) -> dict[str, Any]:
    """The published numbers whose table is the stored one. Raises InputError for another table."""
    entry = header.entries[FREQUENCIES]
    stored: tuple[float, ...] = ()
    if entry.dtype == "F32" and entry.shape == (head_dim // 2,):
        with entry.path.open("rb") as file:
            file.seek(entry.start)
            stored = struct.unpack(f"<{head_dim // 2}f", file.read(entry.n_bytes))
    for rope in LLAMA3_ROPES:
        table = frequencies(rope, theta=theta, head_dim=head_dim)
        if len(stored) == len(table) and all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(stored, table, strict=True)):
            return rope
    raise _refusal(header, f"{FREQUENCIES} is not the table of a rule that is known", "use the model's safetensors folder")


def frequencies(rope: Mapping[str, Any], *, theta: float, head_dim: int) -> list[float]:
    """The table of a rule of Llama 3's kind: by what each frequency of a head is divided."""
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    numbers = {key: float(rope[key]) for key in keys}
    return [_stretch(theta ** (2 * i / head_dim), **numbers) for i in range(head_dim // 2)]


def _stretch(
    period: float,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: float,
) -> float:
    """The number by which Llama 3's rule divides a frequency: 1 for short waves, `factor` for long ones."""
    turns = original_max_position_embeddings / (2 * math.pi * period)  # of that wave, in the original context
    share = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
    return 1.0 if share > 1 else factor if share < 0 else 1 / ((1 - share) / factor + share)
