"""Where data lies: files, folders, patterns, weights, packed files, mapped columns; and hub data sets, against a server on
the loopback address (in a process of its own, since huggingface_hub reads its environment at import)."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lopt_edge.data.hub_sets import HubSet, choose_files, read_hub_name
from lopt_edge.data.records import Record, read_records
from lopt_edge.data.renamed import Renamed, mapping_of
from lopt_edge.data.sources import absolute, mixed, sources_of
from lopt_edge.errors import InputError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write(path: Path, n_rows: int, word: str = "row") -> Path:
    path.write_text("".join(json.dumps({"text": f"{word} {number}"}) + "\n" for number in range(n_rows)))
    return path


def texts(spec: str) -> list[str]:
    return [record.value["text"] for source in sources_of(spec) for record in source.records()]


def test_files_folders_and_patterns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chats").mkdir()
    write(tmp_path / "chats" / "b.ndjson", 1, "b")
    write(tmp_path / "chats" / "a.jsonl", 2, "a")
    (tmp_path / "chats" / "notes.md").write_text("no data")
    write(tmp_path / "x,y.jsonl", 1, "comma")
    assert texts("chats") == texts("chats/*.*l,chats/b.*") == ["a 0", "a 1", "b 0"]
    assert texts("x,y.jsonl") == ["comma 0"], "what exists is a path, whatever else it could mean"
    assert absolute("chats/*.jsonl:0.5,org/name:0.5") == f"{tmp_path}/chats/*.jsonl:0.5,org/name:0.5"
    for spec, told in (("none.jsonl,chats/*.csv", "2 problems"), ("chats/a.jsonl:0.5,chats/b.ndjson", "has no weight"),
                       ("chats/a.jsonl:0", "weight 0"), ("org/name[train[x]]", "no part of a split")):  # fmt: skip
        with pytest.raises(InputError, match=told):
            sources_of(spec)


@pytest.mark.parametrize("packed", ["gz", "zst"])
def test_packed_files(tmp_path, packed):
    raw = write(tmp_path / "a.jsonl", 1000).read_bytes()
    path = tmp_path / f"a.jsonl.{packed}"
    path.write_bytes(gzip.compress(raw) if packed == "gz" else pa.compress(raw, "zstd", asbytes=True))
    assert len(read_records(path)) == 1000
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError):
        read_records(path)


def test_weights_are_shares_of_the_mixture_and_no_row_comes_twice():
    found = mixed([100, 60], [0.75, 0.25], seed="x")
    assert [(len(each), sum(each)) for each in found] == [(100, 100), (60, 33)]
    assert found == mixed([100, 60], [3, 1], seed="x") != mixed([100, 60], [3, 1], seed="y")
    assert mixed([100, 60], [None, None], seed="x") == [None, None]
    often = [mixed([6, 6], [2, 1], seed=str(seed))[1] for seed in range(400)]
    assert all(100 < sum(each[at] for each in often) < 300 for at in range(6)), "each row about every second time"


def test_columns_are_mapped_and_mistakes_told():
    records = [Record({"question": "q", "answer": "a"}, "x:1")]
    mapping = mapping_of(["prompt=question", "completion=answer"])
    assert next(Renamed(records, mapping, name="x").records).value == {"prompt": "q", "completion": "a"}
    with pytest.raises(
        InputError, match=r"no row has the column 'questoin' \(there are: answer, question\).*\n.*did you mean 'question'"
    ):
        Renamed(records, mapping_of(["prompt=questoin"]), name="x").finish()
    with pytest.raises(InputError, match="both 'question' and 'answer'"):
        Renamed(records, mapping_of(["answer=question"]), name="x").finish()
    for wrong in (["prompt"], ["a=b", "c=b"]):
        with pytest.raises(InputError):
            mapping_of(wrong)


def test_names_of_the_hub():
    assert read_hub_name("tatsu-lab/alpaca") == HubSet("tatsu-lab/alpaca")
    assert read_hub_name("o/n:cfg[test[10:20%]]@v1") == HubSet("o/n", "cfg", "test", (10, False), (20, True), "v1")
    assert read_hub_name("data/train.jsonl") is None and read_hub_name("one-word") is None
    assert HubSet("o/n", first=(1, False), last=(50, True)).part_of(10) == range(1, 5)
    names = ["data/train-0-of-2.parquet", "data/train-1-of-2.parquet", "data/test-0.parquet", "x.py", "README.md"]
    assert choose_files(names, HubSet("o/n"), converted=False) == names[:2]
    assert choose_files(["rows.jsonl"], HubSet("o/n"), converted=False) == ["rows.jsonl"]
    assert choose_files(["rows.jsonl"], HubSet("o/n", split="test"), converted=False) == []
    with pytest.raises(InputError, match="several configs: a, b"):
        choose_files(["a/train/0.parquet", "b/train/0.parquet"], HubSet("o/n"), converted=True)


class _Hub(BaseHTTPRequestHandler):
    """Answers as the hub does for one data set with a script, whose Parquet form is on the branch that the hub makes."""

    files: ClassVar[dict[str, bytes]] = {}
    sent: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        names = {"main": ["loader.py", "README.md"], "refs%2Fconvert%2Fparquet": list(self.files)}
        if path.startswith("/api/datasets/org/set"):
            found = names[path.rpartition("/revision/")[2]] if "/revision/" in path else names["main"]
            siblings = [{"rfilename": name} for name in found]
            content = {"_id": "1", "id": "org/set", "sha": COMMIT, "siblings": siblings}
            self._send(json.dumps(content).encode(), body=body)
        elif (name := path.partition(f"/resolve/{COMMIT}/")[2]) in self.files:
            self._send(self.files[name], body=body)
            self.sent.append(name)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _send(self, content: bytes, *, body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    for split, n_rows in (("train", 40), ("test", 3)):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"text": [f"{split} {n}" for n in range(n_rows)]}), sink)
        _Hub.files[f"default/{split}/0000.parquet"] = sink.getvalue().to_pybytes()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


ASK = """
import json, sys
from lopt_edge.errors import InputError
from lopt_edge.data.sources import sources_of
for spec in sys.argv[1:]:
    try:
        print(json.dumps([record.value["text"] for source in sources_of(spec) for record in source.records()]))
    except InputError as error:
        print(json.dumps(str(error)))
"""


def test_a_hub_data_set_is_read_from_its_parquet_files_and_no_code_is_fetched(hub, tmp_path):
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0",
                   "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip
    specs = ["org/set[train[:5%]]", "org/set[test]", "org/set[validation]", "org/other"]
    done = subprocess.run(
        [sys.executable, "-c", ASK, *specs], env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    part, test, validation, other = map(json.loads, done.stdout.strip().splitlines())
    assert part == ["train 0", "train 1"] and test == ["test 0", "test 1", "test 2"]
    assert "no data files of split validation" in validation and "the hub did not give it" in other
    assert set(_Hub.sent) == {"default/train/0000.parquet", "default/test/0000.parquet"}
