"""Reading data files: places, collected faults, and no traceback whatever the bytes are."""

from __future__ import annotations

import csv
import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lopt_edge.data import read_records, records, to_rows
from lopt_edge.data.formats import detect_format
from lopt_edge.errors import InputError, InputErrors

ROW = {"prompt": "a", "completion": "b"}


def places(records):
    return [record.where.rpartition("/")[2] for record in records]


def test_jsonl_places_are_physical_lines(write):
    path = write("d.jsonl", b"\xef\xbb\xbf" + b'{"text": "a"}\n\n  \n{"text": "\xc3\xa9"}\r\n{"text": "c"}')
    records = read_records(path)
    assert places(records) == ["d.jsonl:1", "d.jsonl:4", "d.jsonl:5"]
    assert [record.value["text"] for record in records] == ["a", "é", "c"]


@pytest.mark.parametrize(
    ("content", "base"),
    [
        ([ROW, ROW], "d.json["),
        ({"version": 1, "data": [ROW, ROW]}, "d.json data["),
    ],
)
def test_json_places_are_indices(write, content, base):
    records = read_records(write("d.json", json.dumps(content)))
    assert places(records) == [f"{base}0]", f"{base}1]"]
    assert records[1].value == ROW


def test_json_single_row_object_is_a_row(write):
    row = {"messages": [{"role": "user", "content": "a"}]}
    assert read_records(write("d.json", json.dumps(row)))[0].value == row


def test_csv_places_survive_multi_line_fields(write):
    records = read_records(write("d.csv", '\ufeffprompt,completion\n"a\nb",c\n\nd,"e ""f"""\n'))
    assert places(records) == ["d.csv:2", "d.csv:5"]
    assert records[0].value == {"prompt": "a\nb", "completion": "c"}
    assert records[1].value["completion"] == 'e "f"'


def test_csv_field_limit_is_lifted_and_put_back(write):
    before = csv.field_size_limit()
    records = read_records(write("d.csv", "text\n" + "x" * 300_000 + "\n"))
    assert len(records[0].value["text"]) == 300_000
    assert csv.field_size_limit() == before


def test_parquet(tmp_path):
    path = tmp_path / "d.parquet"
    messages = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]] * 2
    pq.write_table(pa.table({"messages": messages}), path)
    records = read_records(path)
    assert places(records) == ["d.parquet row 1", "d.parquet row 2"]
    assert records[1].value["messages"][1]["content"] == "b"


def test_text_file_is_one_record(write):
    records = read_records(write("d.txt", "a\r\n\r\nb\n"))
    assert [record.value for record in records] == ["a\n\nb\n"]


@pytest.mark.parametrize(
    ("name", "content", "where", "what"),
    [
        ("d.jsonl", b"", "d.jsonl", "no rows"),
        ("d.jsonl", b"\n\n", "d.jsonl", "no rows"),
        ("d.jsonl", b'{"a": 1}\n{"a": }\n', "d.jsonl:2", "broken JSON at column 7"),
        ("d.jsonl", b'{"a": 1}\n[1]\n', "d.jsonl:2", "the row is list, not an object"),
        ("d.jsonl", b'{"a": 1}\nnull\n', "d.jsonl:2", "the row is null"),
        ("d.jsonl", b'{"a": NaN}\n', "d.jsonl:1", "NaN is not JSON"),
        ("d.jsonl", b'{"a": -Infinity}\n', "d.jsonl:1", "-Infinity is not JSON"),
        ("d.jsonl", b'{"a": ' + b"9" * 5000 + b"}\n", "d.jsonl:1", "bad JSON value"),
        ("d.jsonl", b"[" * 200_000 + b"\n", "d.jsonl:1", "nested deeper than 64 levels"),
        ("d.jsonl", b'{"a":' * 200_000 + b"\n", "d.jsonl:1", "nested deeper than 64 levels"),
        ("d.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "d.jsonl:2", "not valid UTF-8 (byte 0xff)"),
        ("d.jsonl", '{"a": 1}\n'.encode("utf-16"), "d.jsonl:1", "UTF-16"),
        ("d.json", b'{"a": 1}\n{"a": 2}\n', "d.json", "name it .jsonl"),
        ("d.json", b'[{"a": 1},\n {"a": }]', "d.json", "line 2, column 8"),
        ("d.json", b'[{"a": 1}, 3]', "d.json[1]", "the row is int"),
        ("d.json", b"3", "d.json", "neither a list nor an object"),
        ("d.json", b'{"a": [], "b": []}', "d.json", "several lists: 'a', 'b'"),
        ("d.json", b'{"a": 1}', "d.json", "no list"),
        ("d.json", b"[]", "d.json", "no rows"),
        ("d.json", b'[{"a":\n1},\n"\xe9"]', "d.json:3", "not valid UTF-8"),
        ("d.csv", b"", "d.csv", "no rows"),
        ("d.csv", b"a,b\n", "d.csv", "no rows"),
        ("d.csv", b"a,b\n1,2\n1,2,3\n", "d.csv:3", "3 fields, the header has 2"),
        ("d.csv", b"a,a\n1,2\n", "d.csv:1", "'a' more than once"),
        ("d.csv", b"a;b\n1;2\n", "d.csv:1", "not separated by commas"),
        ("d.csv", b'a,b\n1,2\n1,"2\n3,4\n', "d.csv:3", "broken CSV"),
        ("d.parquet", b"PAR1 and nothing", "d.parquet", "not a readable Parquet file"),
        ("d.parquet", b"", "d.parquet", "not a readable Parquet file"),
        ("d.txt", b"\n \n", "d.txt", "no rows"),
        ("d.xlsx", b"a", "d.xlsx", "unknown file type '.xlsx'"),
        ("data", b"a", "data", "no ending"),
    ],
)
def test_faults_say_what_and_where(write, name, content, where, what):
    path = write(name, content)
    with pytest.raises(InputError) as caught:
        read_records(path)
    assert what in str(caught.value)
    assert caught.value.where.startswith(str(path.parent / where))


@pytest.mark.parametrize("path", ["missing.jsonl", ".", "a\0b.jsonl", "x" * 5000 + ".jsonl", "/dev/null"])
def test_unusable_paths(path):
    with pytest.raises(InputError):
        read_records(path)


def test_damaged_parquet_never_gives_a_traceback(tmp_path):
    path, rng = tmp_path / "d.parquet", random.Random(0)
    pq.write_table(pa.table({"text": [f"row {rng.random()}" for _ in range(300)]}), path, compression="zstd")
    good, refused = path.read_bytes(), 0
    for _ in range(60):
        raw = bytearray(good)
        for _ in range(20):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        path.write_bytes(raw)
        try:
            read_records(path)
        except InputError:
            refused += 1
    assert refused > 30


def test_all_broken_lines_are_told(write):
    path = write("d.jsonl", b'{"a": 1}\nx\n{"a": 2}\ny\n')
    with pytest.raises(InputErrors) as caught:
        read_records(path)
    assert [error.where for error in caught.value.errors] == [f"{path}:2", f"{path}:4"]


def test_many_broken_lines_are_counted(write):
    with pytest.raises(InputError, match="27 problems, the first 20") as caught:
        read_records(write("d.jsonl", "x\n" * 27))
    assert "d.jsonl:20:" in str(caught.value)
    assert "d.jsonl:21:" not in str(caught.value)
    assert str(caught.value).endswith("and 7 more")


FIELDS = ["messages", "conversations", "role", "content", "from", "value", "type", "text"]
FIELDS += ["prompt", "completion", "instruction", "output"]
JSON_LIKE = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=3), inner, max_size=4)
        | st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": inner}))
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(JSON_LIKE.map(lambda v: json.dumps(v).encode()) | st.binary(max_size=30), max_size=5),
    suffix=st.sampled_from(["jsonl", "json", "csv", "txt", "parquet"]),
)
def test_any_bytes_give_rows_or_input_errors(tmp_path: Path, lines: list[bytes], suffix: str):
    path = tmp_path / f"fuzz.{suffix}"
    path.write_bytes(b"\n".join(lines))
    try:
        records = read_records(path)
        to_rows(records, data_format=detect_format(records)[0])
    except InputError as error:
        assert str(error)


def test_no_torch_is_imported():
    code = "import sys, lopt_edge.data; assert not {'torch', 'pyarrow', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- what is plainly meant --------------------------------------------------------------------------------------------

ROWS = [{"prompt": "Name a port", "completion": "Hull"}, {"prompt": "a", "completion": "b"}]


@pytest.mark.parametrize(
    "content",
    [
        "\n".join(json.dumps(row, indent=2) for row in ROWS),
        json.dumps(ROWS, indent=2),
        json.dumps(ROWS),
        "\ufeff" + json.dumps(ROWS),
    ],
)
def test_values_over_many_lines_are_read_from_jsonl(write, content):
    assert [record.value for record in read_records(write("d.jsonl", content))] == ROWS


def test_places_of_rows_over_many_lines(write):
    found = read_records(write("d.jsonl", "\n".join(json.dumps(row, indent=2) for row in ROWS)))
    assert [record.where.rpartition("/")[2] for record in found] == ["d.jsonl:1", "d.jsonl:5"]
    with pytest.raises(InputError, match=r"broken JSON at line 6, column 1: a comma after the last item"):
        read_records(write("d.jsonl", '{\n"text": "a"\n}\n{\n"text": "b",\n}\n'))


def test_a_first_row_that_is_cut_short_is_one_fault(write):
    with pytest.raises(InputError, match=r"d.jsonl:1: broken JSON at column 9: the text ends in the middle"):
        read_records(write("d.jsonl", '{"text":\n{"text": "b"}\n'))


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.json.gz", "d.txt", "d.csv.GZ"])
def test_compressed_files_are_read(write, name):
    contents = {"jsonl": '{"text": "a"}\n', "json": '[{"text": "a"}]', "txt": "a", "csv": "text\na\n"}
    plain = contents[name.lower().removesuffix(".gz").rpartition(".")[2]]
    (record,) = read_records(write(name, gzip.compress(plain.encode())))
    assert record.value == (plain if "txt" in name else {"text": "a"})


def test_a_compressed_file_has_the_limits_of_what_it_unpacks_to(write, monkeypatch):
    bomb = gzip.compress(b'{"text": "' + b"a" * 100_000 + b'"}\n')
    assert read_records(write("d.jsonl", bomb))
    with pytest.raises(InputError, match="not a readable gzip file"):
        read_records(write("d.jsonl", bomb[:60]))
    monkeypatch.setattr(records, "MAX_ROW_BYTES", 1000)
    monkeypatch.setattr(records, "MAX_WHOLE_BYTES", 2000)
    with pytest.raises(InputError, match="the line has more than"):
        read_records(write("d.jsonl", bomb))
    with pytest.raises(InputError, match="is read whole"):
        read_records(write("d.json.gz", bomb))


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ('[{"a": 1},\n]', "a comma after the last item"),
        ('{"a": 1,}', "a comma after the last item"),
        ("{'a': 1}", "single quotes"),
        ('[{"a": 1} // one\n]', "a comment"),
        ('{"a": // one\n1}', "a comment"),
        ('{"a": 1', "the text ends in the middle of a value"),
    ],
)
def test_the_cause_of_broken_json_is_said_once(write, text, cause):
    with pytest.raises(InputError, match=f"broken JSON at .*{cause}"):
        read_records(write("d.json", text))


def test_line_ends_inside_cells_are_newlines(write):
    (record,) = read_records(write("d.csv", 'text,more\r\n"a\r\nb",c\r\n'))
    assert record.value == {"text": "a\nb", "more": "c"}


def test_what_a_table_leaves_blank_is_absent(tmp_path):
    calls = [[{"arguments": {"port": "Hull", "day": None}}], None]
    table = pa.table({"text": ["a", "b"], "input": [float("nan"), 1.5], "calls": calls})
    pq.write_table(table, tmp_path / "d.parquet")
    found = [record.value for record in read_records(tmp_path / "d.parquet")]
    assert found == [{"text": "a", "calls": [{"arguments": {"port": "Hull"}}]}, {"text": "b", "input": 1.5}]
