"""`lopt-edge push`, against a server on the loopback address that speaks the hub's protocol: create, preupload, commit."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from lopt_edge.adapters.push import push
from lopt_edge.config.settings import Config
from lopt_edge.errors import InputError
from lopt_edge.training.run import finetune

TOKEN = "hf_secretsecretsecret"


class _Hub(BaseHTTPRequestHandler):
    asked: ClassVar[list[tuple[str, dict]]] = []
    committed: ClassVar[dict[str, bytes]] = {}

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.partition("?")[0]
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, {"error": f"Invalid token {self.headers.get('Authorization')}"})
        elif path == "/api/repos/create":
            self.asked.append((path, json.loads(body)))
            self._send(200, {"url": f"http://{self.headers['Host']}/org/tiny", "name": "org/tiny", "id": "1"})
        elif path == "/api/validate-yaml":
            self._send(200, {"errors": [], "warnings": []})
        elif path == "/api/models/org/tiny/preupload/main":
            files = json.loads(body)["files"]
            self._send(200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif path == "/api/models/org/tiny/commit/main":
            for line in body.decode().splitlines():
                value = json.loads(line)
                if value["key"] == "file":
                    self.committed[value["value"]["path"]] = base64.b64decode(value["value"]["content"])
            where = f"http://{self.headers['Host']}/org/tiny/commit/0123"
            self._send(200, {"success": True, "commitOid": "0123", "commitUrl": where, "hookOutput": ""})
        else:
            self._send(404, {"error": "not found"})

    def do_GET(self) -> None:
        self._send(200, {"_id": "1", "id": "org/tiny", "sha": "0123", "siblings": [], "tags": []})

    def _send(self, status: int, value: dict) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def output(tmp_path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/home/me/model.gguf"}))
    for name in ("adapter_model.safetensors", "README.md", "tokenizer.json", "chat_template.jinja"):
        (folder / name).write_text(name)
    for name in ("run.json", "metrics.jsonl", "config.yaml", "secrets.py"):
        (folder / name).write_text("of this machine")
    return folder


@pytest.fixture
def call(hub, monkeypatch, command) -> Callable[..., tuple[int, str]]:
    """(exit code, all that is said) of `lopt-edge WORD ...` in this process, with the hub on the loopback address."""
    from huggingface_hub import constants

    def run(*words: object, token: str = TOKEN) -> tuple[int, str]:
        monkeypatch.setattr(constants, "ENDPOINT", hub)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", token)
        code, out, err = command(*words)
        assert "secretsecret" not in out + err
        return code, " ".join((out + err).split())

    return run


def test_an_adapter_is_pushed_and_nothing_else_of_the_folder(call, output):
    code, said = call("push", output, "org/tiny", "--private")
    assert code == 0 and "/org/tiny/commit/0123" in said, said
    assert "names a base on this machine (/home/me/model.gguf)" in said
    assert _Hub.asked[-1][1]["name"] == "tiny" and _Hub.asked[-1][1].get("private", "private" in str(_Hub.asked[-1][1]))
    assert {*_Hub.committed} >= {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"}
    assert not {"run.json", "metrics.jsonl", "config.yaml", "secrets.py"} & {*_Hub.committed}
    assert _Hub.committed["tokenizer.json"] == b"tokenizer.json"


def test_a_run_ends_on_the_hub_and_says_what_comes_next(call, tmp_path):
    root = Path(__file__).resolve().parents[2]
    rows = (root / "examples" / "data" / "docstrings-eval.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:4]
    (tmp_path / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
    _Hub.committed.clear()
    words = ("--model", root / "examples" / "tiny-llama", "--data", tmp_path / "rows.jsonl", "--output", tmp_path / "a run",
             "--cache-dir", tmp_path / "cache", "--max-seq-len", 32, "--max-steps", 1, "--grad-accum", 1, "--device", "cpu",
             "--push-to-hub", "org/tiny")  # fmt: skip
    code, said = call("finetune", *words)
    assert code == 0 and "pushed: " in said, said
    assert {*_Hub.committed} >= {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"}
    assert not any("secretsecret" in path.read_text(errors="replace") for path in (tmp_path / "a run").rglob("*.*"))
    for line in ("lopt-edge chat --adapter", "--gguf", "--ollama", "lopt-edge push"):
        assert line in said
    assert f"'{tmp_path / 'a run'}'" in said


def test_a_token_that_is_refused(call, output):
    code, said = call("push", output, "org/tiny", token="hf_wrongsecretsecret")
    assert code == 2 and "the hub refuses (401)" in said, said


def test_what_is_refused_before_anything_is_sent(output, tmp_path):
    for name in ("tiny", "a/b/c", "org/ti ny"):
        with pytest.raises(InputError, match="can be no repository"):
            push(output, name)
    for options in ({"merged": tmp_path / "nowhere"}, {"merged": output}):
        with pytest.raises(InputError, match=r"cannot be read|no merged model"):
            push(output, "org/tiny", **options)
    with pytest.raises(InputError, match="can be no repository"):  # before the hours that a run takes
        finetune(Config(model="x", data="x", output=str(tmp_path / "new"), push_to_hub="tiny"))
    assert not (tmp_path / "new").exists()
    (output / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="holds no adapter"):
        push(output, "org/tiny")
