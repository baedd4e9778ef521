"""The hub path, against a server on the loopback address that answers as the hub does: tree, HEAD with commit, GET.

Runs in a subprocess because huggingface_hub reads its environment once, at import.
"""

from __future__ import annotations

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

import pytest
import torch
from safetensors.torch import load_file, save_file

from lopt_edge import plan_run
from tools.tiny_quantised import write_quantised
from tools.tiny_runs import make_model, write_rows

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ASK = """
import json, sys
from lopt_edge.errors import InputError
from lopt_edge.models.folder import find_model, tensor_entries
try:
    model = find_model(sys.argv[1], revision=sys.argv[2] or None)
    print(json.dumps([model.name, model.commit, model.facts.n_layers, len(tensor_entries(model.path)),
                      sorted(path.name for path in model.path.iterdir())]))
except InputError as error:
    print(json.dumps(str(error)))
"""


PLAN = """
import json, sys
sys.modules["torch"] = None
from lopt_edge import plan_run
found = plan_run(sys.argv[1], revision=sys.argv[2] or None, gpu="rtx4090", max_seq_len=64)
print(json.dumps([found.fits, found.items["head"], found.plan_hash]))
"""


TRAIN = """
import json, sys
from pathlib import Path
from lopt_edge import finetune
from lopt_edge.config.load import load_config
root = Path(sys.argv[2])
finetune(load_config(None, {"model": sys.argv[1], "revision": "v1", "data": str(root / "train.jsonl"), "max_steps": 1,
                            "output": str(root / "out"), "cache_dir": str(root / "cache"), "device": "cpu", "lora_r": 2,
                            "max_seq_len": 64}))
run, adapter = (json.loads((root / "out" / name).read_text()) for name in ("run.json", "adapter_config.json"))
print(json.dumps([run["base"], run["revision"], adapter["base_model_name_or_path"], adapter["revision"]]))
"""


class _Hub(BaseHTTPRequestHandler):
    """`sent` has (path, bytes of the body) of each answer. Ranges are answered as the hub does."""

    folder: Path
    sent: ClassVar[list[tuple[str, int]]] = []

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        if path == f"/api/models/org/tiny/tree/{COMMIT}":
            tree = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": COMMIT}
                for file in sorted(self.folder.iterdir())
            ]
            self._send(json.dumps(tree).encode(), "application/json", body=body)
        elif path.startswith("/api/models/org/tiny") and path.rpartition("/")[2] in ("main", "v1", COMMIT, "tiny"):
            files = [{"rfilename": file.name} for file in sorted(self.folder.iterdir())]
            content = json.dumps({"_id": "1", "id": "org/tiny", "sha": COMMIT, "siblings": files}).encode()
            self._send(content, "application/json", body=body)
        elif path.startswith(tuple(f"/org/tiny/resolve/{name}/" for name in ("v1", COMMIT))) and self._has(path):
            self._send((self.folder / Path(path).name).read_bytes(), "application/octet-stream", body=body)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _has(self, path: str) -> bool:
        return (self.folder / Path(path).name).is_file()

    def _send(self, content: bytes, kind: str, *, body: bool) -> None:
        last = int(self.headers.get("Range", "bytes=0--1").rpartition("-")[2] or -1)
        ranged = self.headers.get("Range", "").startswith("bytes=0-") and 0 <= last < len(content) - 1
        whole, content = content, content[: last + 1] if ranged else content
        self.send_response(206 if ranged else 200)
        if ranged:
            self.send_header("Content-Range", f"bytes 0-{last}/{len(whole)}")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{sha256(whole).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.sent.append((self.path.partition("?")[0], len(content)))
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    _Hub.folder = make_model(tmp_path_factory.mktemp("hub") / "tiny")
    for name in ("modeling_evil.py", "tokenizer_evil.py", "vocab.py"):
        (_Hub.folder / name).write_text("raise SystemExit('remote code ran')")
    (_Hub.folder / "pytorch_model.bin").write_bytes(b"pickle")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def ask(hub: str, cache: Path, name: str, revision: str = "", *, code: str = ASK) -> object:
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0",
                   "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, name, revision],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_a_hub_model_is_fetched_and_pinned(hub, tmp_path):
    name, commit, n_layers, n_tensors, files = ask(hub, tmp_path, "org/tiny", "v1")
    assert (name, commit, n_layers) == ("org/tiny", COMMIT, 4)
    assert n_tensors > 4 * 7
    assert "config.json" in files
    assert not any(file.endswith((".py", ".bin")) for file in files), "no code and no pickle is ever fetched"


def test_an_unknown_hub_model_is_refused(hub, tmp_path):
    message = ask(hub, tmp_path, "org/other")
    assert "org/other" in message
    assert "the hub did not give it" in message


def test_a_hub_model_is_planned_from_its_config_and_headers_alone(hub, tmp_path):
    """Not a byte of a weight is asked for: huggingface_hub reads the first 100 kB of a file for its header, so the file
    here is larger than that."""
    (weights,) = _Hub.folder.glob("*.safetensors")
    assert weights.stat().st_size > 300_000
    _Hub.sent.clear()
    fits, head, plan_hash = ask(hub, tmp_path, "org/tiny", "v1", code=PLAN)
    files = {path.rpartition("/")[2]: n_bytes for path, n_bytes in _Hub.sent if "/resolve/" in path}
    assert set(files) == {"config.json", "model.safetensors"}, _Hub.sent
    assert files["model.safetensors"] <= 100_001
    weights_asked = {path for path, _ in _Hub.sent if path.endswith("model.safetensors")}
    assert weights_asked == {f"/org/tiny/resolve/{COMMIT}/model.safetensors"}, "of the commit that config.json came from"
    assert sum(n_bytes for path, n_bytes in _Hub.sent if path.endswith("model.safetensors")) <= 100_001
    local = plan_run(str(_Hub.folder), gpu="rtx4090", max_seq_len=64)
    assert (fits, head, plan_hash) == (local.fits, local.items["head"], local.plan_hash)


def test_a_head_beside_a_tied_config_is_planned_as_the_local_folder(hub, tmp_path, monkeypatch):
    """Its dtype counts, not the embedding's; known by the headers alone."""
    folder = make_model(tmp_path / "tiny", tie_word_embeddings=True, dtype=torch.bfloat16)
    tied = plan_run(str(folder), gpu="rtx4090", max_seq_len=64)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn(tensors["model.embed_tokens.weight"].shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(_Hub, "folder", folder)
    fits, head, plan_hash = ask(hub, tmp_path / "hub", "org/tiny", "v1", code=PLAN)
    local = plan_run(str(folder), gpu="rtx4090", max_seq_len=64)
    assert (fits, head, plan_hash) == (local.fits, local.items["head"], local.plan_hash)
    assert head != tied.items["head"]


def test_a_run_records_the_commit_that_a_branch_stood_for(hub, tmp_path):
    write_rows(tmp_path / "train.jsonl", 6)
    found = ask(hub, tmp_path / "hub", "org/tiny", str(tmp_path), code=TRAIN)
    assert found == ["org/tiny", COMMIT, "org/tiny", COMMIT]


def test_a_quantised_hub_model_is_planned_as_the_local_folder(hub, tmp_path, monkeypatch):
    """By its headers alone, without torch, and nothing is laid out in blocks."""
    write_quantised(make_model(tmp_path / "tiny"), tmp_path / "gptq", "gptq-4")
    monkeypatch.setattr(_Hub, "folder", tmp_path / "gptq")
    monkeypatch.setenv("LOPT_EDGE_CACHE", str(tmp_path / "cache"))
    fits, head, plan_hash = ask(hub, tmp_path / "hub", "org/tiny", "v1", code=PLAN)
    local = plan_run(str(tmp_path / "gptq"), gpu="rtx4090", max_seq_len=64)
    assert (fits, head, plan_hash) == (local.fits, local.items["head"], local.plan_hash)
    assert not (tmp_path / "cache").exists()
