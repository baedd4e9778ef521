"""What a GGUF file that we write says: metadata and names of tensors, the other way round than gguf_architectures.py
reads.

Of a model that came as a GGUF file all metadata is taken from there, word for word. Of a model folder it is made: the
keys of the architecture from the facts and config.json, the vocabulary from tokenizer.json. The rule: what cannot be said
in a GGUF file as llama.cpp understands it (a stretching of the rotation, a way to cut texts) is refused with the reason;
such a model goes by `--merged` and llama.cpp's own converter. `gguf` (an extra) is imported by who calls this.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lopt_edge.errors import InputError
from lopt_edge.models.folder import ModelFolder
from lopt_edge.models.gguf import gguf_in
from lopt_edge.models.gguf_tokenizer import CUTS, GPT2
from lopt_edge.plan.facts.families.family import Layout
from lopt_edge.plan.facts.gguf_architectures import (
    ARCHITECTURES,
    OPTIONAL,
    PARTS,
    REQUIRED,
    Architecture,
    architecture_for,
    architecture_of,
    frequencies,
)
from quant.headers import FolderError, read_json

CONVERTER = "use --merged and llama.cpp's convert_hf_to_gguf.py"


@dataclass(frozen=True)
class Target:
    """How one model is written: the architecture's name and record, and the metadata, as (type, element type, value)."""

    name: str
    architecture: Architecture
    metadata: dict[str, tuple[str, str | None, Any]]
    n_heads: int
    n_kv_heads: int

    def tensor(self, name: str, layout: Layout) -> str:
        """The name in a GGUF file of the tensor that transformers gives this name."""
        parts = {ours: theirs for theirs, ours in {**PARTS, **self.architecture.parts}.items()}
        outside = {layout.embedding: "token_embd.weight", f"{layout.norm}weight": "output_norm.weight"}
        outside[layout.lm_head] = "output.weight"
        found = re.fullmatch(rf"{re.escape(layout.layers)}(\d+)\.(.+)\.(weight|bias)", name)
        if found and found[2] in parts:
            return f"blk.{found[1]}.{parts[found[2]]}.{found[3]}"
        if name not in outside:
            raise InputError(f"{name} has no name in a GGUF file", where="export", fix=CONVERTER)
        return outside[name]

    def heads(self, name: str) -> int:
        """The number of heads whose rows lie in pairs in that tensor; 0 for any other."""
        if not self.architecture.pairs:
            return 0
        short = name.rsplit(".", 2)[-2]
        return {"q_proj": self.n_heads, "k_proj": self.n_kv_heads}.get(short, 0)

    def offset(self, name: str) -> float:
        """What is added to that tensor."""
        return self.architecture.norm_offset if name.endswith("norm.weight") else 0.0


def target_of(source: ModelFolder, *, whole: bool = True) -> Target:
    """How a model is written as GGUF; not `whole`: an adapter for it, of which the names say all. Raises InputError."""
    facts, header = source.facts, gguf_in(source.path)
    if header is not None:
        name, kind = architecture_of(header)
        _check_experts(kind, whole=whole)
        return Target(name, kind, _copied(header.paths[0]), facts.n_heads, facts.n_kv_heads)
    if facts.wrapper:
        raise InputError("a multimodal model cannot be written as GGUF", where="export", fix=CONVERTER)
    found = architecture_for(facts.family.name, wrapper=facts.wrapper, sliding_window=facts.sliding_window)
    if found is None:
        what = f"a model of the family {facts.family.name} cannot be written as GGUF here"
        raise InputError(what, where="export", fix=f"{CONVERTER}; written are {', '.join(ARCHITECTURES)}")
    name, kind = found
    _check_experts(kind, whole=whole)
    if not whole:
        return Target(name, kind, {}, facts.n_heads, facts.n_kv_heads)
    try:
        config = read_json(source.path / "config.json")
        metadata = _keys(source, config, name, kind) | _vocabulary(source.path)
    except FolderError as error:
        raise InputError(str(error), where="model") from None
    return Target(name, kind, metadata, facts.n_heads, facts.n_kv_heads)


def _check_experts(kind: Architecture, *, whole: bool) -> None:
    if whole and kind.has_experts:
        fix = f"export --gguf-adapter writes the adapter alone; of the whole model {CONVERTER}"
        raise InputError(f"the experts of {kind.published} are not written as GGUF here", where="export", fix=fix)


def table_of(source: ModelFolder) -> list[float]:
    """Llama 3's table of rotary factors, which is stored as a tensor; empty for any other rotation."""
    config = read_json(source.path / "config.json")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type") != "llama3":
        return []
    theta = float(rope.get("rope_theta", config.get("rope_theta", 10_000.0)))
    return frequencies(rope, theta=theta, head_dim=source.facts.head_dim)


def _copied(path: Path) -> dict[str, tuple[str, str | None, Any]]:
    """All metadata of a file but what is said of its shards."""
    from gguf import GGUFReader

    found = {}
    for key, field in GGUFReader(path).fields.items():
        if not key.startswith(("GGUF.", "split.")):
            sub = field.types[-1].name if len(field.types) > 1 else None
            found[key] = (field.types[0].name, sub, field.contents())
    return found


def _keys(
    source: ModelFolder, config: Mapping[str, Any], name: str, kind: Architecture
) -> dict[str, tuple[str, str | None, Any]]:
    facts = source.facts
    known = {**facts.family.defaults, **{key: value for key, value in config.items() if value is not None}}
    rope = known.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    scaling = known.get("rope_scaling") or rope
    stretched = scaling.get("rope_type", scaling.get("type", "default"))
    if stretched not in ("default", "linear", "llama3"):
        what = f"a rotation stretched by {str(stretched)[:40]!r} is not written as GGUF here"
        raise InputError(what, where="export", fix=CONVERTER)
    found: dict[str, tuple[str, str | None, Any]] = {
        "general.architecture": ("STRING", None, name),
        "general.type": ("STRING", None, "model"),
        "general.name": ("STRING", None, Path(source.name).name),
        f"{name}.rope.freq_base": ("FLOAT32", None, float(rope.get("rope_theta", known.get("rope_theta", 10_000.0)))),
        f"{name}.rope.dimension_count": ("UINT32", None, facts.head_dim),
        f"{name}.attention.key_length": ("UINT32", None, facts.head_dim),
        f"{name}.attention.value_length": ("UINT32", None, facts.head_dim),
        f"{name}.vocab_size": ("UINT32", None, facts.vocab_size),
    }
    if stretched == "linear":
        found[f"{name}.rope.scaling.type"] = ("STRING", None, "linear")
        found[f"{name}.rope.scaling.factor"] = ("FLOAT32", None, float(scaling["factor"]))
    known |= {"num_key_value_heads": facts.n_kv_heads}
    for key, ours in {**REQUIRED, **OPTIONAL, **kind.keys}.items():
        if (value := known.get(ours)) is not None:
            is_real = isinstance(value, float) or ours == "rms_norm_eps"
            found[f"{name}.{key}"] = ("FLOAT32", None, float(value)) if is_real else ("UINT32", None, value)
    return found


def _vocabulary(folder: Path) -> dict[str, tuple[str, str | None, Any]]:
    """The vocabulary of a byte-level BPE tokenizer, padded to nothing: llama.cpp takes the embedding's rows beyond it."""
    values = read_json(folder / "tokenizer.json")
    config = read_json(folder / "tokenizer_config.json")
    model = values.get("model", {})
    pre = _way_to_cut(values)
    if model.get("type") != "BPE" or model.get("byte_fallback") or pre is None:
        what = "its tokenizer is no byte-level BPE whose way to cut texts llama.cpp has a name for that is known here"
        raise InputError(what, where=str(folder / "tokenizer.json"), fix=CONVERTER)
    ids, kinds = dict(model["vocab"]), dict[str, int]()
    for token in values.get("added_tokens", []):
        ids[token["content"]] = token["id"]
        kinds[token["content"]] = 3 if token.get("special") else 4
    tokens = sorted(ids, key=lambda token: ids[token])
    if [ids[token] for token in tokens] != [*range(len(tokens))]:
        raise InputError("its tokens' numbers have gaps", where=str(folder / "tokenizer.json"), fix=CONVERTER)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    found: dict[str, tuple[str, str | None, Any]] = {
        "tokenizer.ggml.model": ("STRING", None, "gpt2"),
        "tokenizer.ggml.pre": ("STRING", None, pre),
        "tokenizer.ggml.tokens": ("ARRAY", "STRING", tokens),
        "tokenizer.ggml.token_type": ("ARRAY", "INT32", [kinds.get(token, 1) for token in tokens]),
        "tokenizer.ggml.merges": ("ARRAY", "STRING", merges),
    }
    for role, word in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"), ("unk_token", "unknown")):
        token = config.get(role)
        token = token.get("content") if isinstance(token, dict) else token
        if token in ids:
            found[f"tokenizer.ggml.{word}_token_id"] = ("UINT32", None, ids[token])
    begins = json.dumps(values.get("post_processor") or {})
    bos = config.get("bos_token")
    found["tokenizer.ggml.add_bos_token"] = ("BOOL", None, isinstance(bos, str) and f'"{bos}"' in begins)
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        found["tokenizer.chat_template"] = ("STRING", None, template)
    elif isinstance(config.get("chat_template"), str):
        found["tokenizer.chat_template"] = ("STRING", None, config["chat_template"])
    return found


def _way_to_cut(values: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for what a tokenizer.json does to a text before its merges; None where none is known."""
    pre = values.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    cuts = []
    for step in steps:
        if step.get("type") == "Split":
            cuts.append((step.get("pattern") or {}).get("Regex"))
        elif step.get("type") == "Digits" and step.get("individual_digits"):
            cuts.append(r"\p{N}")
        elif step.get("type") == "ByteLevel" and not step.get("add_prefix_space"):
            cuts += [GPT2] if step.get("use_regex", True) else []
        else:
            return None
    shape = {"ignore_merges": bool(values["model"].get("ignore_merges")), "normalizer": values.get("normalizer")}
    for name, (known, own) in CUTS.items():
        wanted = {"ignore_merges": bool(own.get("ignore_merges")), "normalizer": own.get("normalizer")}
        if tuple(cuts) == known and shape == wanted:
            return name
    return None
