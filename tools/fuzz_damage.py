"""How tools/fuzz_targets.py spoils a valid input: in its structure, or in its bytes. Random by the generator alone."""

from __future__ import annotations

import json
import random
from copy import deepcopy
from typing import Any

VALUES = (None, True, False, 0, -1, 1, 2, 3, 7, 8, 16, 63, 64, 255, 256, 4096, 2**31 - 1, 2**31, 2**53, 2**63 - 1,
          2**63, 2**64, -(2**63), 10**30, 10**400, 0.5, -0.0, 1e308, 5e-324, float("nan"), float("inf"), "", "a", " ",
          "\n", "\x00", "\ud800", "\U0001f600", "é", "x" * 300, "../a.safetensors", "/etc/passwd", "..", "U8", "F32",
          "BF16", "I64", "BOOL", "user", "assistant", "system", "tool", "human", "gpt", "observation", "function_call",
          "developer", "{}", '{"name": "t", "arguments": "{"}', "[]", "<|im_end|>", "</think>", "\x1b[2J", "\u202e",
          "float32", "bfloat16", "nf4", "fp4", [], {}, [[]],
          {"": {}}, [None], [1, 2], ["a"])  # fmt: skip
KEYS = ("messages", "conversations", "role", "content", "from", "value", "prompt", "completion", "instruction",
        "input", "output", "text", "type", "dtype", "shape", "data_offsets", "__metadata__", "weight_map",
        "blocksize", "quant_type", "", "tool_calls", "nested_offset", "nested_blocksize", "tools", "functions", "function",
        "function_call", "arguments", "name", "tool_call_id", "reasoning_content", "thinking", "weight", "loss", "train",
        "masked", "history", "system", "id", "source", "num_labels", "steps", "batch_size", "normalizer",
        "vocab")  # fmt: skip
TOKENS = (b"\x00", b"\xff", b"\xef\xbb\xbf", b"\n", b"\r\n", b"\r", b"\t", b" ", b'"', b"'", b"\\", b"\\ud800", b",",
          b":", b";", b"[", b"]", b"{", b"}", b"[" * 70, b"{" * 20, b"1e999", b"-", b"0x", b"9" * 30, b"9" * 5000,
          b"NaN", b"null", b"true", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x80\xa8", b"#", b"%", b"&a ", b"*a",
          b"!!int ", b"<<: ", b"? ", b"- ", b"|\n")  # fmt: skip


def damaged_bytes(rng: random.Random, content: bytes, *, tokens: tuple[bytes, ...] = TOKENS, times: int = 3) -> bytes:
    """The content with one to `times` strokes at random places."""
    raw = bytearray(content)
    for _ in range(rng.randint(1, times)):
        at = rng.randrange(len(raw) + 1)
        end = min(len(raw), at + rng.choice((1, 1, 2, 4, 9, 40)))
        match rng.randrange(7):
            case 0 if raw:
                raw[min(at, len(raw) - 1)] ^= 1 << rng.randrange(8)
            case 1:
                del raw[at:end]
            case 2:
                raw[at:at] = raw[at:end] * rng.choice((1, 1, 2, 20))
            case 3:
                raw[at:end] = rng.choice(tokens)
            case 4:
                raw[at:at] = rng.choice(tokens)
            case 5:
                raw[at:end] = rng.randbytes(end - at)
            case _:
                if rng.random() < 0.2:
                    del raw[at:]
    return bytes(raw)


def _value(rng: random.Random) -> Any:
    return deepcopy(rng.choice(VALUES))  # what is put in may be damaged next


def damaged_value(rng: random.Random, value: Any) -> Any:
    """A JSON value with one change at a random depth."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        match rng.randrange(8):
            case 0:
                del value[key]
            case 1:
                value[rng.choice(KEYS)] = value.pop(key)
            case 2:
                value[rng.choice(KEYS)] = _value(rng)
            case 3:
                other = rng.choice(list(value))
                value[key], value[other] = value[other], value[key]
            case _:
                value[key] = damaged_value(rng, value[key])
        return value
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        match rng.randrange(6):
            case 0:
                del value[at]
            case 1:
                value.insert(at, value[at])
            case 2:
                value.append(_value(rng))
            case _:
                value[at] = damaged_value(rng, value[at])
        return value
    if isinstance(value, int) and rng.random() < 0.4:
        return value + rng.choice((-1, 1, 2, 8, -value - 1, value))
    if rng.random() < 0.04:
        for _ in range(rng.choice((1, 5, 62, 63, 64, 65, 300))):
            value = [value] if rng.random() < 0.5 else {"a": value}
        return value
    return _value(rng)


def damaged_json(rng: random.Random, seeds: tuple[str, ...], *, most: int = 3) -> bytes:
    """A valid JSON text, damaged as a value, as bytes, as both, or not at all."""
    value = json.loads(rng.choice(seeds))
    for _ in range(rng.randint(0, most)):
        value = damaged_value(rng, value)
    raw = json.dumps(value, ensure_ascii=rng.random() < 0.9).encode("utf-8", "surrogatepass")
    return damaged_bytes(rng, raw) if rng.random() < 0.25 else raw


def damaged_lines(rng: random.Random, text: str, *, tokens: tuple[bytes, ...]) -> bytes:
    """The text with whole lines dropped, doubled and moved, words swapped, then perhaps bytes."""
    lines = text.split("\n")
    for _ in range(rng.randint(0, 3)):
        at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
        match rng.randrange(4):
            case 0 if len(lines) > 1:
                del lines[at]
            case 1:
                lines.insert(at, lines[other])
            case 2:
                words = lines[at].split(" ")
                words[rng.randrange(len(words))] = rng.choice(lines[other].split(" "))
                lines[at] = " ".join(words)
            case _:
                lines[at] = lines[at] + rng.choice((" ", "", "\r", " x")) + rng.choice(tokens).decode("utf-8", "replace")
    raw = "\n".join(lines).encode("utf-8", "surrogatepass")
    return damaged_bytes(rng, raw, tokens=tokens) if rng.random() < 0.4 else raw
