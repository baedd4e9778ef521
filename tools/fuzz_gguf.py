"""GGUF files for the fuzzer (fuzz_targets.py): a small Llama with its metadata, damaged in values, types or bytes."""

from __future__ import annotations

import random
import struct
from pathlib import Path

from fuzz_damage import damaged_bytes

TEXTS = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2"}
NUMBERS = {"block_count": 1, "embedding_length": 32, "feed_forward_length": 64, "attention.head_count": 2,
           "attention.head_count_kv": 1, "context_length": 64, "rope.dimension_count": 16}  # fmt: skip
TENSORS = {"token_embd.weight": (32, 8), "output_norm.weight": (32,), "blk.0.attn_norm.weight": (32,),
           "blk.0.attn_q.weight": (32, 32), "blk.0.attn_k.weight": (32, 16), "blk.0.ffn_up.weight": (32, 64)}  # fmt: skip
ODD = (0, 1, 7, 33, 2**31, 2**32 - 1, 2**63, 2**64 - 1)


def make_gguf(rng: random.Random) -> tuple[str, bytes]:
    def damaged(value: int, most: int) -> int:
        return rng.choice(ODD) % most if rng.random() < 0.004 else value

    def text(value: str) -> bytes:
        data = value.encode()
        return struct.pack("<Q", damaged(len(data), 2**64)) + data

    pairs = [text(key) + struct.pack("<I", damaged(8, 14)) + text(value) for key, value in TEXTS.items()]
    pairs += [
        text(f"llama.{key}") + struct.pack("<II", damaged(4, 14), damaged(value, 2**32)) for key, value in NUMBERS.items()
    ]
    pairs.append(text("llama.attention.layer_norm_rms_epsilon") + struct.pack("<If", 6, rng.choice((1e-5, float("nan")))))
    words = b"".join(text(word) for word in ("a", "b", "ab"))
    pairs.append(text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, damaged(8, 14), damaged(3, 2**64)) + words)
    if rng.random() < 0.1:
        pairs.append(rng.choice(pairs))
    infos, offset = [], 0
    for name, sides in TENSORS.items():
        kind, n_elements = (0, 4) if len(sides) == 1 else rng.choice(((0, 4), (1, 2), (8, 34 / 32), (2, 18 / 32), (99, 1)))
        shape = [damaged(side, 2**64) for side in sides]
        head = text(name) + struct.pack(f"<I{len(shape)}Q", damaged(len(shape), 2**32), *shape)
        infos.append(head + struct.pack("<IQ", kind, damaged(offset, 2**64)))
        offset += -(-int(sides[0] * (sides[1] if len(sides) > 1 else 1) * n_elements) // 32) * 32
    counts = struct.pack("<IQQ", damaged(3, 5), damaged(len(infos), 2**64), damaged(len(pairs), 2**64))
    header = b"GGUF" + counts + b"".join(pairs) + b"".join(infos)
    raw = header + bytes(-len(header) % 32) + bytes(max(0, offset - rng.choice((0, 0, 0, 1, 500))))
    return "model.gguf", damaged_bytes(rng, raw) if rng.random() < 0.3 else raw


def read_gguf(path: Path) -> None:
    from lopt_edge.plan.facts.gguf_architectures import config_of, entries_of
    from lopt_edge.plan.facts.model import facts_from_config
    from quant.gguf.header import read_gguf_header

    header = read_gguf_header(path)
    for entry in header.entries.values():
        assert 0 <= entry.start <= entry.start + entry.n_bytes <= path.stat().st_size
    facts = facts_from_config(config_of(header), where=str(path))
    assert facts.n_layers > 0 and entries_of(header)
