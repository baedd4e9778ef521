"""Rows of every data format with every field that is known, for tools/fuzz_targets.py, and reading them to the end.

`ROWS` are valid (or were meant so); `fuzz_damage.py` spoils them. `read_rows` goes the way of `lopt-edge data check`: read,
detect, normalise, render, encode, report; the tokenizer is a real one, the template is chosen by the file's name.
"""

from __future__ import annotations

import gzip
import io
import json
import random
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fuzz_damage import damaged_bytes, damaged_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SPEC = {"type": "object", "properties": {"port": {"type": "string"}}, "required": ["port"]}
TOOLS = [{"type": "function", "function": {"name": "tide", "description": "when", "parameters": SPEC}}]
CALL = {"id": "c1", "type": "function", "function": {"name": "tide", "arguments": '{"port": "Hull"}'}}
CALLED = [
    {"role": "user", "content": "Tide?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "name": "tide", "content": "4.1 m"},
    {"role": "assistant", "content": "It is 4.1 m."},
]
OBJECT_CALL = {"function": {"name": "tide", "arguments": {"port": "Hull", "n": [1, 2.5, None, {"a": True}]}}}
PARTS = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "b"}]
SHARED: tuple[dict[str, Any], ...] = (
    {"messages": CHAT},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": PARTS}]},
    {"messages": CALLED, "tools": TOOLS, "id": 3, "source": "x"},
    {"messages": [CALLED[0], {"role": "assistant", "content": "", "tool_calls": [OBJECT_CALL]}, *CALLED[2:]],
     "tools": json.dumps(TOOLS), "parallel_tool_calls": False},
    {"messages": [CALLED[0], {"role": "assistant", "content": "", "function_call": {"name": "t", "arguments": "{}"}},
                  {"role": "function", "name": "t", "content": "4"}, CALLED[3]], "functions": [TOOLS[0]["function"]]},
    {"messages": [*CHAT[1:], {"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "weight": 0},
                  {"role": "user", "content": "e"}, {"role": "assistant", "content": "f", "weight": 1.0}]},
    {"messages": [CHAT[1], {"role": "assistant", "content": "b", "reasoning_content": "since", "train": True}]},
    {"messages": [CHAT[1], {"role": "assistant", "content": "<think>\nwhy\n</think>\n\nb", "thinking": None}]},
    {"messages": json.dumps(CHAT[1:]), "system": "s", "metadata": {"a": [1]}},
    {"messages": [{"role": "developer", "content": "x"}, *CHAT[1:]], "masked": False},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "loss": False},
                       {"from": "human", "value": "c"}, {"from": "gpt", "value": "d", "loss": True}], "system": "s"},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": '{"name": "t"}'},
                       {"from": "observation", "value": "4"}, {"from": "gpt", "value": "b"}], "tools": "[]"},
    {"instruction": "add", "input": "1 2", "output": "3"},
    {"instruction": "next?", "input": "", "output": "2", "system": "s", "history": [["one?", "1"], ["and?", "1.5"]]},
    {"prompt": "a", "completion": "b", "weight": 1},
    {"prompt": CHAT[:2], "completion": CHAT[2:], "tools": TOOLS},
    {"prompt": "Q: <|im_end|> ", "completion": "A<eos>"},
    {"text": "some text <bos><eos>", "split": "train"},
)  # fmt: skip
ROWS = tuple(json.dumps(row) for row in SHARED)
SYSTEM_LAST = (  # as Mistral's: the system message stands before the last turn of the user
    "{{ bos_token }}{% set ns = namespace(s='', last=0) %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.s = m.content %}{% elif m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{% if loop.index0 == ns.last %}{{ ns.s }}\n{% endif %}"
    "{{ m.content }}[/INST]{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
THINKING = (  # as R1's and Qwen3's: earlier thoughts are left out, the prompt ends inside a thought; calls and tools too
    "{% if tools %}<|im_start|>tools\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% set text = m.content or '' %}{% if m.role == 'assistant' %}"
    "{% if loop.last and m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n{% endif %}"
    "{{ text.split('</think>')[-1].lstrip('\n') }}{% for c in m.tool_calls or [] %}<tool_call>"
    "{{ c.function.name }}{{ c.function.arguments | tojson if c.function.arguments is mapping else c.function.arguments }}"
    "</tool_call>{% endfor %}{% else %}{{ text }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MOST_TOKENS = 512
TEMPLATES = (PLAIN, SYSTEM_LAST, THINKING)


def make_rows(rng: random.Random) -> tuple[str, bytes]:
    """Some rows, most of one form, a few of them damaged; the name says which template renders them."""
    seed = rng.choice(ROWS)
    seeds = [seed if rng.random() < 0.9 else rng.choice(ROWS) for _ in range(rng.randint(1, 3))]
    raw = b"\n".join(damaged_json(rng, (one,), most=2) if rng.random() < 0.5 else one.encode() for one in seeds)
    if rng.random() < 0.05:
        packed = gzip.compress(raw, mtime=0)
        raw = damaged_bytes(rng, packed) if rng.random() < 0.5 else packed
    return f"d-{rng.randrange(len(TEMPLATES))}.jsonl", raw


def read_rows(path: Path) -> None:
    """Take a data file as far as `data check` does, and hold the result to what training needs."""
    from rich.console import Console

    from lopt_edge.data import check_facts, check_report, load_dataset
    from lopt_edge.errors import InputError

    tokenizer = _tokenizer()
    tokenizer.chat_template = TEMPLATES[int(path.stem.rpartition("-")[2])]
    dataset = load_dataset(path, tokenizer, max_seq_len=MOST_TOKENS)
    assert dataset.examples and all(0 < len(one) <= MOST_TOKENS and one.n_supervised > 0 for one in dataset.examples)
    json.dumps(check_facts(dataset), allow_nan=False)
    shown = io.StringIO()
    Console(file=shown, width=120).print(check_report(dataset, tokenizer))
    if any(ord(letter) < 32 and letter not in "\n\t" for letter in shown.getvalue()):
        raise AssertionError("a control character in the report") from InputError("")


@lru_cache(maxsize=1)
def _tokenizer() -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    made = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
