"""A data set that is streamed is the one that is read at once, whatever its rows; memory does not grow with the file."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from lopt_edge.data import detect_format, load_dataset, mismatched_part, sources, split, streamed
from lopt_edge.data.columns import Columns
from lopt_edge.data.notes import Notes
from lopt_edge.data.stored import StoredExamples
from lopt_edge.data.streamed import HowRead, SoundRows
from lopt_edge.errors import InputError, RunError

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-llama"
CHILD = """
import sys
sys.modules["torch"] = None
from transformers import AutoTokenizer
from lopt_edge.data import load_dataset, streamed

def peak():  # KiB, since this program began: getrusage's has that of the process that forked
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

streamed.STREAM_BYTES = int(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[3])
load_dataset(sys.argv[4], tokenizer, max_seq_len=512)
before = peak()
found = load_dataset(sys.argv[1], tokenizer, max_seq_len=512)
print(peak() - before, found.fingerprint, found.n_tokens)
"""


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOPT_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(streamed, "FEW_ROWS", 7)


def rows_of(form: str, n_rows: int) -> list[dict]:
    texts = [f"row {index}: " + "word and word " * (index % 23) for index in range(n_rows)]
    if form == "text":
        return [{"text": text * (1 + index % 5), "source": "x"} for index, text in enumerate(texts)]
    if form == "prompt-completion":
        return [{"prompt": text, "completion": "yes" * (index % 4 + 1), "id": index} for index, text in enumerate(texts)]
    if form == "preference":
        return [
            {"prompt": text, "chosen": "yes" * (index % 4 + 1), "rejected": "yes" if index % 9 == 0 else "no"}
            for index, text in enumerate(texts)
        ]
    pair = [("user", "assistant"), ("user", "assistant")]
    return [
        {"messages": [{"role": role, "content": f"{text}<eos>"} for both in pair[: 1 + index % 2] for role in both]}
        for index, text in enumerate(texts)
    ]


def both(spec: str, tokenizer, monkeypatch, **how):
    """The data set read at once, and streamed."""
    found = []
    for limit in (1 << 60, 1):
        monkeypatch.setattr(streamed, "STREAM_BYTES", limit)
        found.append(load_dataset(spec, tokenizer, max_seq_len=40, **how))
    assert isinstance(found[1].examples, StoredExamples) and not isinstance(found[0].examples, StoredExamples)
    return found


def assert_same(one, other) -> None:
    for field in fields(one):
        if field.name == "examples":
            assert list(one.examples) == list(other.examples) and len(one.examples) == len(other.examples)
            assert list(one.examples[2:9:3]) == list(other.examples[2:9:3]) and one.examples[-1] == other.examples[-1]
        elif field.name != "template":
            assert getattr(one, field.name) == getattr(other, field.name), field.name
    for name in ("lengths", "target_counts"):
        assert list(getattr(one, name)) == list(getattr(other, name))
    for name in ("n_tokens", "n_supervised", "n_truncated", "n_last_turn_only", "n_units", "together"):
        assert getattr(one, name) == getattr(other, name), name
    assert other.largest_id >= one.largest_id


def lines_of(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def places(tmp_path, monkeypatch) -> dict[str, tuple[str, dict]]:
    """Specifications of data wherever it may lie, each with how it is read."""
    talks, pairs = rows_of("messages", 60), rows_of("preference", 60)
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "a.jsonl").write_text(lines_of(talks[:20]))
    (folder / "b.jsonl.zst").write_bytes(pa.compress(lines_of(talks[20:40]).encode(), "zstd", asbytes=True))
    (folder / "c.json").write_text(json.dumps(talks[40:50]))
    pq.write_table(pa.Table.from_pylist(talks[50:]), folder / "d.parquet", row_group_size=3)
    for name in ("t.csv", "u.csv"):
        (tmp_path / name).write_text("question,answer,id\n" + "".join(f"what {n}?,it is {n},{n}\n" for n in range(50)))
    (tmp_path / "pairs.jsonl").write_text(lines_of(pairs))
    labels = [{"prompt": one["prompt"], "completion": one["chosen"], "label": n % 3 > 0} for n, one in enumerate(pairs)]
    (tmp_path / "labels.jsonl.gz").write_bytes(gzip.compress(lines_of(labels).encode()))
    (tmp_path / "few.jsonl").write_text(lines_of(pairs[:9]))
    monkeypatch.setattr(sources, "fetched", lambda wanted: (folder / "d.parquet", folder / "a.jsonl"))
    mapping = {"columns": ["prompt=question", "completion=answer"]}
    chosen = {"columns": ["completion=chosen"], "ignore_columns": ["rejected"]}
    return {
        "a folder": (str(folder), {}),
        "a pattern": (f"{folder}/*.*", {}),
        "a mixture": (f"{folder}:0.6,{tmp_path}/few.jsonl:0.4", chosen),
        "a hub set": ("org/set", {}),
        "a part of a hub set": ("org/set[train[20%:25]]", {}),
        "renamed columns": (f"{tmp_path}/t.csv", mapping),
        "a mixture of renamed columns": (f"{tmp_path}/t.csv:1,{tmp_path}/u.csv:0.5", mapping),
        "pairs": (f"{tmp_path}/pairs.jsonl", {"preferences": "pairs"}),
        "pairs as labels": (f"{tmp_path}/pairs.jsonl", {"preferences": "labels"}),
        "labels": (f"{tmp_path}/labels.jsonl.gz", {"preferences": "labels"}),
        "pairs and labels": (f"{tmp_path}/labels.jsonl.gz:3,{tmp_path}/few.jsonl:1", {"preferences": "labels"}),
    }


def test_data_is_streamed_wherever_it_lies(places, tokenizer, monkeypatch):
    for name, (spec, how) in places.items():
        whole, large = both(spec, tokenizer, monkeypatch, **how)
        assert whole.n_rows > 5, name
        assert_same(whole, large)
        for mine, other in zip(split(whole, fraction=0.3, seed=1), split(large, fraction=0.3, seed=1), strict=True):
            assert isinstance(other.examples, StoredExamples), name
            assert_same(mine, other)
        if whole.preferences != "none":
            assert_same(mismatched_part(whole), mismatched_part(large))


def test_mistakes_are_told_alike(places, tokenizer, monkeypatch, tmp_path):
    pairs = places["pairs"][0]
    both_kinds = f"{places['a folder'][0]},{pairs}"
    table = places["renamed columns"][0]
    wrong = [
        (table, {}, "format is not recognised"),
        (table, {"columns": ["prompt=query"]}, "no row has the column 'query' .*answer, id"),
        (pairs, {"columns": ["prompt=query"], "preferences": "pairs"}, "no row has the column 'query'"),
        (both_kinds, {"columns": ["prompt=query"]}, "no row has the column 'query'"),
        (pairs, {"columns": ["chosen=prompt"], "preferences": "pairs"}, "both 'prompt' and 'chosen'"),
        ("org/set[train[99:]]", {}, "no row is left of 30"),
        (both_kinds, {"preferences": "pairs"}, "parts: the objective needs rows with prompt, chosen"),
        (both_kinds, {"preferences": "as they are"}, "rows of different kinds: messages, preference"),
    ]
    for spec, how, told in wrong:
        for limit in (1 << 60, 1):
            monkeypatch.setattr(streamed, "STREAM_BYTES", limit)
            with pytest.raises(InputError, match=rf"(?s){told}"):
                load_dataset(spec, tokenizer, max_seq_len=40, **how)
    path = tmp_path / "pairs.jsonl"
    rows = SoundRows(str(path), HowRead(None, {}, detect_format), Columns(), Notes())
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(InputError, match="changed while it was read"):
        list(rows.few())


@pytest.mark.parametrize("form", ["text", "prompt-completion", "messages"])
def test_streamed_is_read_at_once(tmp_path, tokenizer, monkeypatch, form):
    lines = [json.dumps(row) + "\n" for row in rows_of(form, 60)]
    (tmp_path / "a.jsonl").write_text("".join(lines[:40]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[40:]).encode()))
    for spec in (str(tmp_path / "a.jsonl"), f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl.gz"):
        whole, large = both(spec, tokenizer, monkeypatch, ignore_columns=["id"])
        assert_same(whole, large)
        for mine, other in zip(split(whole, fraction=0.3, seed=1), split(large, fraction=0.3, seed=1), strict=True):
            assert isinstance(other.examples, StoredExamples)
            assert_same(mine, other)


def test_faults_are_found_before_anything_is_encoded(tmp_path, tokenizer, monkeypatch):
    rows = [json.dumps(row) for row in rows_of("prompt-completion", 40)]
    rows[11], rows[25] = '{"prompt": "x", "completion": 7}', '{"prompt": "x", "completion": "y", "colour": "red"}'
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(rows))
    told = []
    for limit in (1 << 60, 1):
        monkeypatch.setattr(streamed, "STREAM_BYTES", limit)
        with pytest.raises(InputError) as refusal:
            load_dataset(path, tokenizer, max_seq_len=40)
        told.append(str(refusal.value))
    assert told[0] == told[1] and "a.jsonl:12" in told[0] and "'colour'" in told[0]
    path.write_text("\n".join([*rows[:11], "{"]))
    with pytest.raises(InputError, match=r"a\.jsonl:12"):
        load_dataset(path, tokenizer, max_seq_len=40)


def test_a_disk_that_lies_is_noticed(tmp_path, tokenizer, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of("text", 20)))
    _, large = both(str(path), tokenizer, monkeypatch)
    large.examples.store._file.seek(large.examples.store.starts[3] + 20)
    large.examples.store._file.write(b"\xff")
    large.examples.store._file.flush()
    assert large.examples[2] and large.examples[4]
    with pytest.raises(RunError, match="example 3 of the encoded data"):
        large.examples[3]
    monkeypatch.setenv("LOPT_EDGE_CACHE", str(path / "none"))
    with pytest.raises(RunError, match="cannot be kept there"):
        load_dataset(path, tokenizer, max_seq_len=40)


def test_memory_does_not_grow_with_the_file(tmp_path):
    """10 MiB of rows take less than 2 MiB more than the first of them; read at once they take more than the file has. In
    one arena of the allocator: those of the tokenizer's threads take 3 to 5 MiB, as they happen to be used."""
    small, large = tmp_path / "small.jsonl", tmp_path / "large.jsonl"
    line = json.dumps({"text": "one word and the next " * 90}) + "\n"
    small.write_text(line * 600)
    large.write_text(line * (10 * 2**20 // len(line)))
    taken, rest = dict[int, int](), set[str]()
    one_arena = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "MALLOC_ARENA_MAX": "1"}
    for limit in (1, 1 << 60):
        command = [sys.executable, "-c", CHILD, str(large), str(limit), str(TINY), str(small)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=one_arena)
        kib, found = done.stdout.split(maxsplit=1)
        taken[limit] = int(kib)
        rest.add(found)
    assert len(rest) == 1 and taken[1] < 2 * 1024 and taken[1 << 60] > 10 * 1024, taken
