"""Whole runs in miniature: a model folder with a real tokenizer, a data file, a Config. Not a test itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lopt_edge.config.load import load_config
from lopt_edge.config.settings import Config
from tools.tiny_models import make_folder

REPLIES = ["four", "blue and green", "it rains", "nine hundred and ninety nine", "no", "a quick brown fox jumps"]
CORPUS = ["What is the answer to number 12? " + reply for reply in REPLIES] * 5


def save_tokenizer(folder: Path, *, vocab_size: int = 300) -> None:
    """Save a byte-level BPE tokenizer; the ids of pad, bos and eos are those of `tools.tiny_models`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder)


def make_model(folder: Path, family: str = "llama", *, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A tiny random model with its tokenizer."""
    make_folder(folder, family, dtype=dtype, **changes)
    save_tokenizer(folder)
    return folder


def write_rows(path: Path, n_rows: int, *, first: int = 0) -> Path:
    """Write prompts and completions of uneven lengths."""
    rows = [
        {"prompt": f"What is {i}? " * (1 + i % 3), "completion": REPLIES[i % len(REPLIES)]}
        for i in range(first, first + n_rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_config(folder: Path, root: Path, *, output: str = "out", n_rows: int = 10, **changes: Any) -> Config:
    """The settings of a few quick steps: lopt, two micro-batches of two, rank 4. The 4-bit copy lies beside the model."""
    values = {
        "model": str(folder), "data": str(write_rows(root / "train.jsonl", n_rows)), "output": str(root / output),
        "cache_dir": str(folder.parent / "cache"), "batch_size": 2, "grad_accum": 2, "lora_r": 4, "lora_alpha": 8,
        "lr": 1e-2, "device": "cpu", "compute_dtype": "float32", "max_seq_len": 128, "method": "lopt",
        "packing": False,
    }  # fmt: skip
    return load_config(None, {**values, **changes})


def metrics_of(config: Config) -> tuple[list[dict], list[dict]]:
    """The lines of metrics.jsonl, as (step lines, evaluation lines)."""
    lines = [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line], [line for line in lines if "loss" not in line]


MEASURED = (
    "step_seconds",
    "process_peaks",
    *(f"peak_{tier}_bytes" for tier in ("device", "rss", "host", "pinned", "disk")),
)


def log_of(config: Config) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what is measured: what a resumed run must repeat."""
    lines = [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]
