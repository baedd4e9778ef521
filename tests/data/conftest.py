"""Small real tokenizers and the chat templates of the model families, for the tests of `lopt_edge.data`.

The tokenizers are trained here, in milliseconds, with the `tokenizers` library: byte-level BPE as in Qwen and Llama 3
(also with `trim_offsets`, which leaves blanks out of the reported offsets) and Metaspace BPE as in Llama 2 (`legacy` is
its older form, as in Phi-3). The templates are shortened from the published ones but keep what makes each of them hard.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIALS = ["<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SPECIALS += ["<|user|>", "<|assistant|>", "<|end|>", "<pad>"]
CORPUS = [
    "What is two and two? It is four. Yes, no, maybe.\n\nUser: hello there\nAssistant: hello, how are you?\n",
    "The quick brown fox jumps over the lazy dog.\n\n    def add(left, right):\n        return left + right\n",
] * 20

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{{ '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + strftime_now('%d %b %Y') + '<|eot_id|>' }}"
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# Qwen3: an empty thought is written for the turn after the last user message and left out of the earlier ones.
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Phi-3: eos comes after the whole conversation, so a shorter conversation is not a prefix of a longer one.
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# Mistral: no generation prompt at all; the system message moves into the last user message.
MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}"
    "{% set us = rest | selectattr('role', 'equalto', 'user') | list %}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}"
    "[INST] {{ s if m == us[-1] else '' }}{{ m.content }}[/INST]{% else %} {{ m.content | trim }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
# A generation prompt that the full rendering never contains, and that opens no thought either.
BROKEN = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\nSure. {% endif %}")
# Mistral v0.3: the system message stands in the last user message, and only while no reply follows it.
MISTRAL_LAST = (
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}"
    "{% if loop.last and s is defined %}[INST] {{ s + '\n\n' + m.content }}[/INST]"
    "{% else %}[INST] {{ m.content }}[/INST]{% endif %}{% else %} {{ m.content | trim }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
# R1's distillations: thoughts are never rendered, and the prompt opens one.
R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}{% else %}<|assistant|>"
    "{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
# QwQ: the last thought is rendered, earlier ones are not, and the prompt opens one.
QWQ = (
    "{% for m in messages %}{% set c = m.content %}{% if m.role == 'assistant' and not loop.last %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>{{ m.role }}\n{{ c }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# Qwen3 with thoughts in a field or between tags: kept after the last user message, left out before it.
QWEN3_THINKING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% set c = m.content %}{% set r = '' %}{% if m.role == 'assistant' %}"
    "{% if m.reasoning_content is string %}{% set r = m.reasoning_content %}{% elif '</think>' in c %}"
    "{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}"
    "{% endif %}{% endif %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "<think>\n{{ r }}\n</think>\n\n{% endif %}{{ c }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Qwen 2.5: tools in the system message, calls as JSON between tags, results in a user turn.
QWEN_TOOLS = (
    "{% if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}\n{% endif %}"
    "{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}{% for m in messages %}"
    "{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
    "{% elif m.role == 'system' and tools %}{% else %}<|im_start|>{{ m.role }}\n{% if m.content %}"
    "{{ m.content }}{% endif %}"
    '{% for call in m.tool_calls or [] %}<tool_call>\n{{ \'{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{ call.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# DeepSeek V3: the arguments are text, and a call is one only where there is no content.
DEEPSEEK_TOOLS = (
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}"
    "{% elif m.role == 'tool' %}<|end|>{{ m.content }}"
    "{% elif m.content is none %}<|assistant|>{% for call in m.tool_calls %}{{ call.function.name + '\n```json\n' }}"
    "{{ call.function.arguments + '\n```' }}{% endfor %}{{ eos_token }}{% else %}<|assistant|>{{ m.content + eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Llama 3.1: a tool's result is written as JSON.
LLAMA_TOOLS = (
    "{% for m in messages %}{% if m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>\n\n"
    "{{ m.content | tojson }}"
    "{% else %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{% if m.tool_calls %}"
    '{% set call = m.tool_calls[0].function %}{{ \'{"name": "\' + call.name + \'", "parameters": \' }}'
    "{{ call.arguments | tojson }}}{% else %}{{ m.content | trim }}{% endif %}{% endif %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# A template that knows three roles and leaves out the others.
THREE_ROLES = CHATML.replace("messages %}<", "messages if m.role in ['system', 'user', 'assistant'] %}<")
NO_END = (
    "{% for m in messages %}### {{ m.role }}\n{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant\n{% endif %}"
)

TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "qwen3": QWEN3,
    "phi3": PHI3,
    "mistral": MISTRAL,
    "mistral-last": MISTRAL_LAST,
    "r1": R1,
    "qwq": QWQ,
    "qwen3-thinking": QWEN3_THINKING,
    "qwen-tools": QWEN_TOOLS,
    "deepseek-tools": DEEPSEEK_TOOLS,
    "llama-tools": LLAMA_TOOLS,
    "three-roles": THREE_ROLES,
    "broken": BROKEN,
    "no-end": NO_END,
    "none": None,
}


def _byte_level(*, trim_offsets: bool, add_bos: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=450, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    steps: list[Any] = [processors.ByteLevel(trim_offsets=trim_offsets)]
    if add_bos:
        steps.append(processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)]))
    tokenizer.post_processor = processors.Sequence(steps)
    return tokenizer


def _metaspace(*, legacy: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[*SPECIALS, "<unk>", *bytes_], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    if legacy:  # a blank is put before every stretch of text between special tokens, and nothing splits words
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """make_tokenizer(template name, kind) -> a fresh tokenizer."""
    backends = {
        "plain": _byte_level(trim_offsets=False, add_bos=False),
        "bos": _byte_level(trim_offsets=True, add_bos=True),
        "metaspace": _metaspace(),
        "legacy": _metaspace(legacy=True),
    }
    saved = {kind: backend.to_str() for kind, backend in backends.items()}

    def make(template: str = "chatml", kind: str = "plain") -> PreTrainedTokenizerFast:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(saved[kind]), bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
        )
        tokenizer.chat_template = TEMPLATES[template]
        return tokenizer

    return make


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """write(name, rows or text or bytes) -> the path of a file; rows become JSONL."""

    def _write(name: str, content: Any) -> Path:
        path = tmp_path / name
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return _write
