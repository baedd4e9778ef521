"""What tools/fuzz.py feeds to lopt-edge: for each kind of untrusted input a way to make one and a way to read it.

An input is a file name and its bytes, and a function of (seed, target, number) alone, so any of them can be made again. It
begins as a valid one and is damaged where it has structure (a value of its JSON is replaced, renamed, doubled or nested, a
line moves, an op loses a word), in its bytes (flipped, cut, spliced, a token put in), or both; some stay whole, so that
what is accepted is seen as well. `Target.read` returns when the input was taken, and checks what was taken; it raises
one of our errors for a refusal, and anything else is a finding.

Not here: limits, processes, counting (fuzz.py); rows of data with all their fields (fuzz_rows.py); checkpoints and
tokenizers (fuzz_folders.py).
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fuzz_damage import TOKENS, damaged_bytes, damaged_json, damaged_lines
from fuzz_folders import make_checkpoint, make_tokenizer, read_checkpoint, read_tokenizer
from fuzz_gguf import make_gguf, read_gguf
from fuzz_rows import CHAT, ROWS, SHARED, make_rows, read_rows

Input = tuple[str, bytes]


@dataclass(frozen=True)
class Target:
    """A target of the fuzzer. `share` is how many of a million inputs it gets; `make` and `read` as above."""

    share: int
    make: Callable[[random.Random], Input]
    read: Callable[[Path], None]


# --- data files -------------------------------------------------------------------------------------------------------

TABLES = ('prompt,completion\n"a\nb",c\n\nd,"e ""f"""\n', "text\nhello\nworld\n", "instruction,input,output\n1,,2\n3,4,5\n")


def make_data(rng: random.Random) -> Input:
    kind = rng.choices(("jsonl", "json", "csv", "txt", "parquet"), (50, 20, 20, 4, 6))[0]
    if kind == "jsonl":
        rows = [damaged_json(rng, ROWS, most=2) for _ in range(rng.randint(1, 4))]
        return "d.jsonl", b"\n".join(rows)
    if kind == "json":
        rows = [json.loads(rng.choice(ROWS)) for _ in range(rng.randint(1, 3))]
        value = rng.choice((rows, {"version": 1, "data": rows}, rows[0]))
        return "d.json", damaged_json(rng, (json.dumps(value),))
    if kind == "csv":
        return "d.csv", damaged_lines(rng, rng.choice(TABLES), tokens=TOKENS)
    if kind == "txt":
        return "d.txt", damaged_bytes(rng, b"some text\r\nand more\n")
    return "d.parquet", damaged_bytes(rng, rng.choice(_parquet_files()), times=4)


_PARQUET: list[bytes] = []


def _parquet_files() -> list[bytes]:
    if not _PARQUET:
        import pyarrow as pa
        import pyarrow.parquet as pq

        tables = (
            [{"messages": CHAT}] * 3,
            [{"prompt": "a", "completion": "b"}],
            [{"text": "some text"}] * 200,
            [SHARED[2]],
        )
        for rows in tables:
            for compression in ("none", "snappy", "gzip", "zstd"):
                sink = io.BytesIO()
                pq.write_table(pa.Table.from_pylist(rows), sink, compression=compression)
                _PARQUET.append(sink.getvalue())
    return _PARQUET


def read_data(path: Path) -> None:
    from lopt_edge.data import detect_format, read_records, to_rows

    records = read_records(path)
    assert records and all(path.name in record.where for record in records)
    rows = to_rows(records, data_format=detect_format(records)[0])
    assert len(rows) == len(records)


# --- configs ----------------------------------------------------------------------------------------------------------

RUN = """model: some/model
data: rows.jsonl
output: out
method: lopt
num-segments: 2
boundary_layers: [12, 20]
lr: 2e-4
max_seq_len: 2048
lora_targets: q_proj,v_proj
weights: disk,0-5=resident
device_memory: 24GB
seed: 0
"""
SHORT = "model: {a: [b, {c: d}]}\nlr: 1_000\nclip: .inf\nepochs: 0x10\nseed: 1:30:00\nforce: yes\n"
MODEL = {"model_type": "llama", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256,
         "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "sliding_window": 8}  # fmt: skip
MODELS = tuple(
    json.dumps({**MODEL, "model_type": family, **more})
    for family, more in (
        ("llama", {"attention_bias": True}),
        ("mistral", {}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
        ("qwen3", {"layer_types": ["full_attention"] * 4}),
        ("gemma2", {}),
        ("gemma3_text", {"sliding_window_pattern": 2}),
        ("phi3", {}),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 1], "no_rope_layer_interval": 4}),
        ("olmo2", {}),
        ("granite", {"logits_scaling": 2.0}),
        (
            "llama",
            {
                "num_labels": 2,
                "id2label": {"0": "a", "1": "b"},
                "pruned_heads": {},
                "partial_rotary_factor": 0.5,
                "rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5},
            },
        ),
        ("llama", {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}),
        ("gpt_oss", {"quantization_config": {"quant_method": "mxfp4"}, "num_local_experts": 4, "num_experts_per_tok": 2}),
    )
)
ADAPTER_VALUES = {"peft_type": "LORA", "lora_alpha": 32, "r": 4, "bias": "none", "use_rslora": False, "rank_pattern": {},
                  "target_modules": ["q_proj"], "init_lora_weights": True, "base_model_name_or_path": "a/b",
                  "task_type": "CAUSAL_LM", "inference_mode": True, "revision": None, "lora_dropout": 0.0,
                  "layers_to_transform": [0, 1], "alora_invocation_tokens": None, "use_dora": False}  # fmt: skip
ADAPTER = (json.dumps(ADAPTER_VALUES),)


def make_config(rng: random.Random) -> Input:
    kind = rng.choices(("run.yaml", "config.json", "adapter_config.json"), (35, 45, 20))[0]
    if kind == "run.yaml":
        return kind, damaged_lines(rng, rng.choice((RUN, SHORT)), tokens=TOKENS)
    return kind, damaged_json(rng, MODELS if kind == "config.json" else ADAPTER)


def read_config(path: Path) -> None:
    if path.name == "run.yaml":
        from lopt_edge.config.load import load_config
        from lopt_edge.config.rules import no_effect_warnings

        no_effect_warnings(load_config(path, {"model": "m", "data": "d", "output": "o"}))
    elif path.name == "config.json":
        from lopt_edge.plan.facts.model import facts_from_config
        from quant.untrusted import read_config as config_of

        facts = facts_from_config(config_of(path), where=str(path))
        assert len(facts.layer_types) == facts.n_layers
    else:
        from lopt_edge.run.model.lora import ADAPTER_NAME, check_adapter_folder

        if not (path.parent / ADAPTER_NAME).exists():
            (path.parent / ADAPTER_NAME).write_bytes(safetensors({}, b""))
        check_adapter_folder(path.parent)


# --- safetensors headers, index files, quantisation states ------------------------------------------------------------

HEADERS = tuple(
    json.dumps(header)
    for header in (
        {
            "a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [2, 3], "data_offsets": [8, 32]},
            "__metadata__": {"format": "pt"},
        },
        {"x.weight": {"dtype": "BF16", "shape": [4, 2], "data_offsets": [0, 16]}},
        {
            "e": {"dtype": "I64", "shape": [], "data_offsets": [0, 8]},
            "f": {"dtype": "F32", "shape": [0, 4], "data_offsets": [8, 8]},
        },
    )
)
N_DATA_BYTES = 32


def safetensors(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def make_header(rng: random.Random) -> Input:
    raw = safetensors(damaged_json(rng, HEADERS), bytes(rng.choice((N_DATA_BYTES, N_DATA_BYTES, N_DATA_BYTES, 0, 31, 40))))
    return "model.safetensors", damaged_bytes(rng, raw) if rng.random() < 0.1 else raw


def read_header_file(path: Path) -> None:
    from quant.headers import read_header

    n_bytes = path.stat().st_size
    for entry in read_header(path).values():
        assert 8 <= entry.start <= entry.start + entry.n_bytes <= n_bytes
        assert all(side >= 0 for side in entry.shape)


INDEX = (json.dumps({"metadata": {"total_size": 40}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}),)


def make_index(rng: random.Random) -> Input:
    return "model.safetensors.index.json", damaged_json(rng, INDEX)


def read_index(path: Path) -> None:
    from quant.headers import read_headers

    for name, tensor in (("one", "a"), ("two", "b")):
        shard = path.parent / f"{name}.safetensors"
        if not shard.exists():
            shard.write_bytes(safetensors({tensor: {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}}, bytes(8)))
    assert all(entry.path.parent == path.parent for entry in read_headers(path.parent).values())


STATE = json.dumps({"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [8, 32], "nested_blocksize": 256,
                    "nested_dtype": "float32", "nested_offset": 0.5})  # fmt: skip
PARTS = {
    "": ("U8", [128, 1]),
    ".absmax": ("U8", [4]),
    ".quant_map": ("F32", [16]),
    ".nested_absmax": ("F32", [1]),
    ".nested_quant_map": ("F32", [256]),
}
ITEMSIZE = {"U8": 1, "F32": 4, "I64": 8, "BF16": 2, "BOOL": 1}
STATE_NAME = ".quant_state.bitsandbytes__"


def make_state(rng: random.Random) -> Input:
    """A safetensors file with one packed matrix, its state or its parts' shapes and dtypes damaged."""
    text, parts = damaged_json(rng, (STATE,)), dict(PARTS)
    state: tuple[str, list[int]] = ("U8", [len(text)])
    if rng.random() < 0.3:
        part = rng.choice(list(parts))
        dtype, shape = parts[part]
        parts[part] = rng.choice(((rng.choice(list(ITEMSIZE)), shape), (dtype, [*shape, 1]), (dtype, [rng.randrange(300)])))
    if rng.random() < 0.1:
        state = rng.choice((("I64", []), ("BOOL", [len(text)]), ("U8", [1, len(text)]), ("I64", [2]), ("F32", [])))
        n_bytes = ITEMSIZE[state[0]] * (state[1][-1] if state[1] else 1)
        text = text[:n_bytes].ljust(n_bytes, rng.choice((b"\x00", b" ", b"\x01")))
    header, data = {}, b""
    for part, (dtype, shape) in [*parts.items(), (STATE_NAME + rng.choice(("nf4", "nf4", "nf4", "fp4")), state)]:
        n_bytes = ITEMSIZE[dtype]
        for side in shape:
            n_bytes *= side
        if rng.random() < 0.97:
            header["w.weight" + part] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + n_bytes]}
            data += text if part.startswith(STATE_NAME) else bytes(n_bytes)
    return "model.safetensors", safetensors(header, data)


def read_state(path: Path) -> None:
    from quant.files import packed_on_disk
    from quant.headers import FolderError, read_header

    entries = read_header(path)
    if "w.weight" not in entries:
        raise FolderError(f"{path}: no weight")  # `check_weights` says so before a state is ever read
    layout = packed_on_disk(entries, "w.weight")
    assert layout.parts[""].n_bytes * 2 >= layout.shape[0] * layout.shape[1]


# --- plan texts -------------------------------------------------------------------------------------------------------

_PLANS: list[str] = []


def _plan_texts() -> list[str]:
    if not _PLANS:
        from lopt_edge.plan.schedule.effects import Kind
        from lopt_edge.plan.schedule.ops import Op, Plan
        from lopt_edge.plan.schedule.segments import Segment

        head = (Segment(0, 0, 1, "reconstruct"), Segment(1, 2, 3, "task", through=(2,)))
        ops = (Op(Kind.EMBED, micro_batch=0), Op(Kind.FETCH, 0, unit="layer"), Op(Kind.WAIT, 0, unit="layer"),
               Op(Kind.FORWARD, 0, 0), Op(Kind.SPILL, 0, 0, tier="disk"), Op(Kind.WAIT, 0, 0, item="input"),
               Op(Kind.LOSS, 0, 0), Op(Kind.BACKWARD, 0, 0), Op(Kind.STEP, 0, unit="layer"))  # fmt: skip
        placement = (("embed", "resident"), ("layer 0", "disk"), ("head", "resident"))
        _PLANS.append(Plan("lopt", 4, 1, head, placement, ops, 2).text())
    return _PLANS


PLAN_TOKENS = (b"EMBED", b"FORWARD", b"LOSS", b"BACKWARD", b"STEP", b"WAIT", b"input", b"pages", b"states", b"layer",
               b"aux", b"mb=0", b"mb=9999999", b"keep=none", b"keep=graph", b"to=disk", b"pass=1", b"adapters=ema",
               b"adapters=train", b"segment 0", b"unit ", b"plan 4", b"through=0-3,7", b"absent=1",
               b"kind=local", b"READ boundary 2 mb=0", b"\xd9\xa1", b"\x0b", b"\x1c", b"\xc2\x85",
               b"\xe2\x80\xa8", b"\n", b" ", b"-1", b"007", b"\x00")  # fmt: skip


def make_plan(rng: random.Random) -> Input:
    return "plan.txt", damaged_lines(rng, rng.choice(_plan_texts()), tokens=PLAN_TOKENS)


def read_plan(path: Path) -> None:
    from lopt_edge.plan.schedule.ops import parse_plan

    plan = parse_plan(path.read_bytes().decode("utf-8", "surrogateescape"))
    assert parse_plan(plan.text()) == plan


# --- chat templates ---------------------------------------------------------------------------------------------------

TEMPLATES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "{{ bos_token }}{% set ns = namespace(last=0, s='') %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% set ns.s = ns.s ~ m['content'] | trim %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '[' + m.role|upper + ']' }}{{ m.content.split('x')[-1].strip() }}"
    "{{ eos_token if loop.last else '\n' }}{% endfor %}",
    "{% macro one(m, n=2) %}{{ m.role * n }}:{{ m.content|replace('a', 'bb')|tojson }}{% endmacro %}"
    "{% for m in messages|selectattr('role', 'equalto', 'user')|list + [messages[-1]] %}{{ one(m) }}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% if loop.index > 3 %}{% break %}{% endif %}{% endfor %}"
    "{{ strftime_now('%d %b %Y') }}"
    "{{ '%s-%5d' % (bos_token, 3) }}{{ '{:>8}'.format('a') }}{{ raise_exception('no') if messages|length > 9 else '' }}",
)
TEMPLATE_TOKENS = (b"{{", b"}}", b"{%", b"%}", b"{#", b"#}", b"-%}", b"{%- ", b"{% for i in range(99999) %}",
                   b"{% endfor %}", b"{% endif %}", b"{% set ns.s = ns.s + ns.s %}", b"{% set ns.s = [ns.s, ns.s] %}",
                   b" * 10**9", b"*m.content", b"**9", b"|list", b"|center(10**9)", b"|join(ns.s)",
                   b"|tojson(indent=9)", b"|batch(3)", b"|sum", b"|map('upper')", b"|format(1)", b".ljust(10**8)",
                   b".__class__", b"|attr('__class__')", b"recursive", b"{{ loop(messages) }}", b"{{ one(one(m)) }}",
                   b"{{ messages }}", b"messages", b"ns", b"m", b"range(3)", b"'", b"(", b")", b"[", b"]", b"[0]",
                   b"[::2]", b" ~ ", b" + ", b" % ", b" is ", b" in ", b"not ", b"and", b"1", b"9" * 5000, b"\\ud800",
                   b"\x00", b"\xff", b"{% include 'x' %}", b"{% extends 'x' %}", b"{% raw %}", b"{% block a %}",
                   b"{% filter indent %}", b"{% call one(m) %}", b"{% endcall %}", b"{% macro x() %}",
                   b"{% endmacro %}", b"{% continue %}", b"dict(a=ns.s)", b"|xmlattr", b"|urlize",
                   b"|groupby('role')", b"|sort", b"|pprint", b"|wordwrap(1)", b"|indent(9999)", b"|random", b"if",
                   b"else", b"{{ self }}", b"{{ caller() }}")  # fmt: skip


def make_template(rng: random.Random) -> Input:
    raw = rng.choice(TEMPLATES).encode()
    for _ in range(rng.randint(0, 2)):
        raw = damaged_bytes(rng, raw, tokens=TEMPLATE_TOKENS)
    return "t.jinja", raw


class _Tokenizer(SimpleNamespace):
    def get_added_vocab(self) -> dict[str, int]:
        return {"<|im_end|>": 3}


def read_template(path: Path) -> None:
    from lopt_edge.data import load_template

    tokenizer: Any = _Tokenizer(
        eos_token="</s>", chat_template=None, special_tokens_map={"bos_token": "<s>", "eos_token": "</s>"}
    )
    template, _ = load_template(tokenizer, path)
    messages = [
        ("system", "be brief"),
        ("user", "what is \ud83d\ude00 x?"),
        ("assistant", "a\nb"),
        ("user", "c"),
        ("assistant", "d"),
    ]
    text = template.render(tokenizer, messages, where="data.jsonl:1")
    assert isinstance(text, str) and len(text) < 2**21


TARGETS = {
    "data": Target(250_000, make_data, read_data),
    "rows": Target(60_000, make_rows, read_rows),
    "config": Target(150_000, make_config, read_config),
    "gguf": Target(40_000, make_gguf, read_gguf),
    "headers": Target(160_000, make_header, read_header_file),
    "index": Target(80_000, make_index, read_index),
    "quant-state": Target(80_000, make_state, read_state),
    "plan-text": Target(80_000, make_plan, read_plan),
    "template": Target(75_000, make_template, read_template),
    "checkpoint": Target(20_000, make_checkpoint, read_checkpoint),
    "tokenizer": Target(5_000, make_tokenizer, read_tokenizer),
}


def make_input(target: str, seed: int, number: int) -> Input:
    """The input of this number of a target."""
    return TARGETS[target].make(random.Random(f"{seed} {target} {number}"))


def seeds_of(target: str, *, count: int = 50) -> Iterator[Input]:
    """Some inputs to begin with, for a fuzzer that makes its own."""
    yield from (make_input(target, 0, number) for number in range(count))
