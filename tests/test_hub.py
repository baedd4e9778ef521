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

import pytest

from tests.models import make_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ASK = """
import json, sys
from lopt_edge.errors import InputError
from lopt_edge.models import find_model, tensor_entries
try:
    model = find_model(sys.argv[1], revision=sys.argv[2] or None)
    print(json.dumps([model.name, model.commit, model.facts.n_layers, len(tensor_entries(model.path)),
                      sorted(path.name for path in model.path.iterdir())]))
except InputError as error:
    print(json.dumps(str(error)))
"""


class _Hub(BaseHTTPRequestHandler):
    folder: Path

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        if path == f"/api/models/org/tiny/tree/{COMMIT}":
            tree = [{"type": "file", "path": file.name, "size": file.stat().st_size, "oid": COMMIT}
                    for file in sorted(self.folder.iterdir())]  # fmt: skip
            self._send(json.dumps(tree).encode(), "application/json", body=body)
        elif path.startswith("/api/models/org/tiny") and path.rpartition("/")[2] in ("main", "v1", COMMIT, "tiny"):
            files = [{"rfilename": file.name} for file in sorted(self.folder.iterdir())]
            content = json.dumps({"_id": "1", "id": "org/tiny", "sha": COMMIT, "siblings": files}).encode()
            self._send(content, "application/json", body=body)
        elif path.startswith(f"/org/tiny/resolve/{COMMIT}/") and (self.folder / Path(path).name).is_file():
            self._send((self.folder / Path(path).name).read_bytes(), "application/octet-stream", body=body)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _send(self, content: bytes, kind: str, *, body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    _Hub.folder = make_folder(tmp_path_factory.mktemp("hub") / "tiny")
    (_Hub.folder / "modeling_evil.py").write_text("raise SystemExit('remote code ran')")
    (_Hub.folder / "pytorch_model.bin").write_bytes(b"pickle")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def ask(hub: str, cache: Path, name: str, revision: str = "") -> object:
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0",
                   "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", ASK, name, revision], env=environment, capture_output=True, text=True,
                          timeout=60, check=True)  # fmt: skip
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
