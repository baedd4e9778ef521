"""Damaged checkpoints and tokenizers for tools/fuzz_targets.py: a state whose sums are right, a tokenizer's JSON files.

A checkpoint's manifest is written anew for each damaged state, so what is tried is what stands behind the sums. A tokenizer
is loaded by transformers and encodes one sentence, as a run would.
"""

from __future__ import annotations

import hashlib
import json
import random
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fuzz_damage import damaged_json

# --- checkpoints ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _states() -> tuple[str, ...]:
    from lopt_edge.training.checkpoint.run_state import RunState

    run = RunState(
        steps=3, sequences=2, losses={"0": 0.5, "1": 6.25}, tokens=99, supervised_tokens=40, final_loss=6.5, evaluated=2,
        before={"eval_loss": 6.0}, best={"eval_loss": 5.5}, samples={"before": "x"}, seconds={"train": 1.5}, log_bytes=80,
        skip=[2], unlogged={"step": 3},
    )  # fmt: skip
    state = {
        "run": run.as_dict(), "updates": {"layer.0": 3}, "config": _config().model_dump(mode="json"),
        "settled": {"batch_size": 2, "grad_accum": 4, "num_segments": 2, "token_tile": 256}, "model": "m", "teacher": "",
        "data": {"fingerprint": "f", "examples": 8, "seed": 0, "epoch_sequences": 8}, "plans": {"": "abc"},
        "versions": {"torch": "2"}, "device": "cpu", "threads": 1, "compute_dtype": "float32",
        "python_random": [3, [0] * 5, None],
    }  # fmt: skip
    return (json.dumps(state),)


@lru_cache(maxsize=1)
def _config() -> Any:
    from lopt_edge.config.load import load_config

    given = {"model": "m", "data": "d", "output": "o", "method": "lopt", "batch_size": 4, "grad_accum": 2, "max_steps": 9}
    return load_config(None, given)


def make_checkpoint(rng: random.Random) -> tuple[str, bytes]:
    return "state.json", damaged_json(rng, _states(), most=4)


def read_checkpoint(path: Path) -> None:
    """Take a state as `resume` does, up to where model and data are compared, and hold what was taken to what is computed
    with it."""
    from lopt_edge.training.checkpoint.folder import FORMAT, MANIFEST
    from lopt_edge.training.checkpoint.resume import check_same, find_start

    raw = path.read_bytes()
    files = {path.name: {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}}
    (path.parent / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}))
    config, start, _ = find_start(_config().model_copy(update={"resume": str(path.parent)}))
    assert start is not None and config.batch_size * config.grad_accum == 8 and config.output == "o"
    assert start.state.steps >= 0 and start.state.loss_scale > 0
    json.dumps(start.state.as_dict(), allow_nan=False)
    data: Any = SimpleNamespace(fingerprint="f", examples=[0] * 8)
    check_same(start, model="m", teacher="", train=data, device_type="cpu", dtype="float32", threads=1)


# --- tokenizers -------------------------------------------------------------------------------------------------------

SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
TOKENIZER = {
    "version": "1.0", "truncation": None, "padding": None,
    "added_tokens": [{"id": number, "content": name, **SPECIAL} for number, name in enumerate(("<pad>", "<bos>", "<eos>"))],
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Replace", "pattern": {"String": " "},
                                                                          "content": "_"}]},
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "_|[a-z]+"}, "behavior": "Isolated", "invert": False},
    "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}},
                                                                {"Sequence": {"id": "A", "type_id": 0}}],
                       "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                       "special_tokens": {"<bos>": {"id": "<bos>", "ids": [1], "tokens": ["<bos>"]}}},
    "decoder": {"type": "Fuse"},
    "model": {"type": "BPE", "dropout": None, "unk_token": "<pad>", "continuing_subword_prefix": None,
              "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
              "vocab": {"<pad>": 0, "<bos>": 1, "<eos>": 2, "_": 3, "a": 4, "b": 5, "ab": 6}, "merges": [["a", "b"]]},
}  # fmt: skip
TOKENIZER_CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>",
                    "pad_token": "<pad>", "model_max_length": 64, "clean_up_tokenization_spaces": False,
                    "chat_template": "{{ messages }}", "extra_special_tokens": {}, "add_prefix_space": None,
                    "added_tokens_decoder": {"2": {"content": "<eos>", **SPECIAL}}}  # fmt: skip
FILES = {
    "tokenizer.json": json.dumps(TOKENIZER),
    "tokenizer_config.json": json.dumps(TOKENIZER_CONFIG),
    "special_tokens_map.json": json.dumps({"bos_token": "<bos>", "eos_token": {"content": "<eos>", **SPECIAL}}),
    "added_tokens.json": json.dumps({"<x>": 7}),
    "config.json": json.dumps({"model_type": "llama", "num_labels": 2, "id2label": {"0": "a"}, "vocab_size": 8}),
}


def make_tokenizer(rng: random.Random) -> tuple[str, bytes]:
    name = rng.choices(list(FILES), (60, 25, 5, 5, 5))[0]
    return name, damaged_json(rng, (FILES[name],))


def read_tokenizer(path: Path) -> None:
    """Load a folder with one damaged file, and encode and decode one sentence."""
    from lopt_edge.data.tokenizer_faults import tokenizer_faults
    from lopt_edge.models.tokenizer import load_tokenizer

    for name, text in FILES.items():
        if name != path.name and (name.startswith("tokenizer") or path.name == name):
            (path.parent / name).write_text(text)
    try:
        tokenizer = load_tokenizer(path.parent)
        with tokenizer_faults("cannot be used", where=str(path), fix=""):
            ids = tokenizer("ab a b")["input_ids"]
            assert isinstance(tokenizer.decode(ids), str)
    finally:
        for name in FILES:
            if name != path.name:
                (path.parent / name).unlink(missing_ok=True)
