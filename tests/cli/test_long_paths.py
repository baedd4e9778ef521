"""A path that no system takes, in whatever option or argument a path may stand: a short message and exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.tiny_runs import make_model, write_rows

SETTINGS = ("model", "data", "output", "chat-template", "eval-data", "retention-data", "cache-dir", "page-dir", "resume",
            "init-adapter", "memory-report", "boundary-cache")  # fmt: skip
PATH, MODEL, DATA = "PATH", "MODEL", "DATA"
PATHS = {"8300 letters": "/tmp/" + "a" * 8300, "a long name": "/tmp/" + "b" * 300, "deep": "/tmp/" + "c/" * 2500}
FINETUNE = ("finetune", "--model", MODEL, "--data", DATA, "--output", "out", "--max-steps", "1", "--device", "cpu")
COMMANDS = [
    *((*FINETUNE, f"--{name}", PATH) for name in SETTINGS),
    (*FINETUNE, "--weights", "disk", "--page-dir", PATH),
    (*FINETUNE, "--method", "lopt", "--local-loss", "align", "--teacher", PATH),
    ("finetune", PATH), ("resume", PATH), ("plan", PATH), ("plan", "--model", PATH), ("compare", PATH, "--methods", "e2e"),
    ("plan", "--model", "llama-3.1-8b", "--timeline", PATH),
    ("plan", "--model", "llama-3.1-8b", "--sweep", "max-seq-len=1k..2k", "--picture", PATH),
    ("data", "check", PATH, "--model", MODEL), ("data", "check", DATA, "--model", PATH),
    ("generate", "--model", PATH, "--prompt", "x"), ("generate", "--model", MODEL, "--prompt", "x", "--adapter", PATH),
    ("generate", "--model", MODEL, "--prompt", "x", "--cache-dir", PATH),
    ("generate", "--model", MODEL, "--prompt", "x", "--chat-template", PATH),
    ("export", PATH, "--merged", "merged"), ("quantize", PATH, "new"), ("quantize", MODEL, PATH),
]  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("inputs")
    return {MODEL: str(make_model(root / "tiny")), DATA: str(write_rows(root / "train.jsonl", 4))}


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[-3:]))
@pytest.mark.parametrize(
    "path", ["/tmp/" + "a" * 8300, "/tmp/" + "b" * 300, "/tmp/" + "c/" * 2500], ids=["8300", "name", "deep"]
)
def test_it_is_refused(inputs, tmp_path, monkeypatch, command, words, path):
    monkeypatch.chdir(tmp_path)
    code, _, err = command(*({**inputs, PATH: path}.get(word, word) for word in words))
    assert code == 2 and len(err) < 1500, err
    assert not Path("out").exists()


def test_a_prompt_may_be_longer_than_a_path():
    from lopt_edge.cli.options import check_words

    check_words(["generate", "--prompt", "x" * 10_000, "--prompt=" + "x" * 10_000])
