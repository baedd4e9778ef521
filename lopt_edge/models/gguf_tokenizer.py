"""The tokenizer of a GGUF file: tokenizer.json and its companions, written from the metadata into the model's folder.

Byte-level BPE (`tokenizer.ggml.model` gpt2) is put together here: vocabulary, merges, control tokens, and the way to cut
texts that `tokenizer.ggml.pre` names (llama.cpp, `llm_tokenizer_bpe`). transformers' reader leaves that name unread
(SmolLM2's digits came out cut as GPT-2's), so it is used for SentencePiece vocabularies (`llama`) alone, whose merges it
derives from the scores. The rule: a way to cut that is not known here is refused with the way out, `--tokenizer DIR`; no
text is ever cut by a guess.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lopt_edge.errors import InputError
from lopt_edge.models.gguf import gguf_in
from lopt_edge.plan.facts.gguf_architectures import CUT_AS_QWEN2, SENTENCEPIECE
from lopt_edge.system.files import write_json, write_text
from quant.gguf.header import GgufHeader, LongArray, read_arrays
from quant.headers import FolderError
from quant.untrusted import printable_name

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_MODERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BY_CASE = (  # o200k_base, which GPT-4o and gpt-oss have: words are cut where upper case begins anew
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# `pre` -> the expressions that cut a text one after the other, and what else is its own
CUTS: Mapping[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "olmo"), ((GPT2,), {})),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), ((r"\p{N}", GPT2), {})),
    **dict.fromkeys(("dbrx", "smaug-bpe"), ((_MODERN % "{1,3}",), {})),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), ((_MODERN % "{1,3}",), {"ignore_merges": True, "bos": True})),
    **dict.fromkeys((CUT_AS_QWEN2, "deepseek-r1-qwen"), ((_MODERN % "",), {"normalizer": {"type": "NFC"}})),
    "gpt-4o": ((_BY_CASE,), {}),
}
UNKNOWN, CONTROL, USER = 2, 3, 4  # token types
TOKENS, KINDS, MERGES = (f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges"))
ROLES = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
FIX = "name a folder with this model's tokenizer files: --tokenizer DIR"


def make_tokenizer(folder: Path) -> None:
    """Write the tokenizer's files into a folder that stands for a GGUF file, unless they are there. Raises InputError."""
    header = gguf_in(folder)
    if header is None or (folder / "tokenizer.json").exists():
        return
    kind = header.metadata.get("tokenizer.ggml.model")
    try:
        if kind == "gpt2":
            values, tokens = _byte_level(header)
            write_json(folder / "tokenizer_config.json", _config(header, tokens))
            template = header.metadata.get("tokenizer.chat_template")
            if isinstance(template, str):
                write_text(folder / "chat_template.jinja", template)
            write_json(folder / "tokenizer.json", values)  # last: where it is, the others are
        elif kind == SENTENCEPIECE:
            _by_transformers(header, folder)
        else:
            raise _refusal(
                header, f"has a tokenizer of the kind {printable_name(str(kind)[:40])!r}, which is not known here"
            )
    except FolderError as error:
        raise InputError(str(error), where="model", fix=FIX) from None
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", where=str(folder)) from None


def _refusal(header: GgufHeader, what: str) -> InputError:
    return InputError(what, where=str(header.paths[0]), fix=FIX)


def _byte_level(header: GgufHeader) -> tuple[dict[str, Any], list[str]]:
    """What tokenizer.json says, and the tokens."""
    pre = header.metadata.get("tokenizer.ggml.pre")
    if not isinstance(pre, str) or pre not in CUTS:
        raise _refusal(header, f"cuts texts in the way {printable_name(str(pre)[:40])!r}, which is not known here")
    cuts, own = CUTS[pre]
    missing = [key for key in (TOKENS, KINDS, MERGES) if not isinstance(header.metadata.get(key), LongArray | list)]
    if missing:
        raise _refusal(header, f"lacks {missing[0]}")
    arrays = read_arrays(header.paths[0], (TOKENS, KINDS, MERGES))
    tokens, kinds = arrays[TOKENS], arrays[KINDS]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens) or len(kinds) != len(tokens):
        raise _refusal(header, "has a token twice, or not a type for each")
    merges = [merge.split(" ") for merge in arrays[MERGES]]
    if any(len(pair) != 2 or not {pair[0], pair[1], "".join(pair)} <= vocabulary.keys() for pair in merges):
        raise _refusal(header, "has a merge of tokens that are not there")
    added = [
        {"id": index, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": kind != USER}
        for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind in (UNKNOWN, CONTROL, USER)
    ]  # fmt: skip
    splits = [{"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated", "invert": False} for cut in cuts]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": "",
             "fuse_unk": False, "byte_fallback": False, "ignore_merges": bool(own.get("ignore_merges")),
             "vocab": vocabulary, "merges": merges}  # fmt: skip
    values = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": own.get("normalizer"),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "post_processor": _ends(header, tokens, begins=bool(own.get("bos"))) or byte_level,
        "decoder": {**byte_level, "add_prefix_space": True, "use_regex": True}, "model": model,
    }  # fmt: skip
    return values, tokens


def _role(header: GgufHeader, word: str, tokens: list[str]) -> tuple[str, int] | None:
    index = header.metadata.get(f"tokenizer.ggml.{word}_token_id")
    return (tokens[index], index) if type(index) is int and 0 <= index < len(tokens) else None


def _ends(header: GgufHeader, tokens: list[str], *, begins: bool) -> dict[str, Any] | None:
    """The post-processor that puts the begin or end token around a text, where the file wants one."""
    wanted = {
        "bos": header.metadata.get("tokenizer.ggml.add_bos_token", begins),
        "eos": header.metadata.get("tokenizer.ggml.add_eos_token", False),
    }
    found = {word: _role(header, word, tokens) for word, on in wanted.items() if on}
    present = {word: role for word, role in found.items() if role is not None}
    if not present:
        return None

    def around(sequence: str, number: int) -> list[dict[str, Any]]:
        before, after = (
            [{"SpecialToken": {"id": present[word][0], "type_id": number}}] if word in present else []
            for word in ("bos", "eos")
        )
        return [*before, {"Sequence": {"id": sequence, "type_id": number}}, *after]

    special = {token: {"id": token, "ids": [index], "tokens": [token]} for token, index in present.values()}
    pair = [*around("A", 0), *around("B", 1)]
    return {"type": "TemplateProcessing", "single": around("A", 0), "pair": pair, "special_tokens": special}


def _config(header: GgufHeader, tokens: list[str]) -> dict[str, Any]:
    roles = {key: _role(header, word, tokens) for key, word in ROLES.items()}
    context = header.metadata.get(f"{header.metadata['general.architecture']}.context_length")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **({"model_max_length": context} if type(context) is int else {}),
        **{key: role[0] for key, role in roles.items() if role is not None},
    }


def _by_transformers(header: GgufHeader, folder: Path) -> None:
    from importlib.util import find_spec

    from transformers import AutoTokenizer

    if find_spec("gguf") is None:
        raise _refusal(
            header, "has a SentencePiece vocabulary, which the package 'gguf' reads: pip install 'lopt-edge[gguf]'"
        )
    path = header.paths[0]
    try:
        AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name).save_pretrained(str(folder))
    except Exception as error:  # transformers raises errors of any kind for values that it cannot use
        raise _refusal(header, f"transformers cannot read its tokenizer ({str(error)[:200]})") from None
