"""`data check` and the system message, as a user meets them: what finetune refuses is refused here, in the same words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lopt_edge.adapters.generation import generate
from tests.cli.test_main import TINY

CHAT = [{"role": "user", "content": "f(x)"}, {"role": "assistant", "content": "Return x."}]


@pytest.fixture
def write(tmp_path):
    def _write(*rows: dict) -> Path:
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return _write


@pytest.mark.parametrize(
    ("row", "flags", "told"),
    [
        ({"messages": CHAT, "rejected": "x"}, (), "field 'rejected'"),
        ({"messages": CHAT}, ("--max-seq-len", 1_000_000), "beyond the model's"),
        ({"messages": [CHAT[0], {**CHAT[1], "reasoning_content": "hm"}]}, (), "leaves out the thought of messages[1]"),
        ({"messages": CHAT}, ("--think", "some"), "'some'"),
        ({"prompt": "a", "completion": "b"}, ("--chat-template", "/nowhere.jinja"), "/nowhere.jinja"),
    ],
)
def test_what_finetune_refuses_is_refused(command, write, tmp_path, row, flags, told):
    path = write(row, row)
    for words in (("data", "check", path), ("finetune", "--data", path, "--output", tmp_path / "out", "--dry-run")):
        code, _, err = command(*words, "--model", TINY, *flags)
        assert code == 2 and told in err.replace("\n", " ").replace("  ", " "), err
    assert not (tmp_path / "out").exists()


def test_what_is_left_out_or_peculiar_is_said_by_both(command, write, tmp_path):
    row = {"id": 1, "rejected": "x", "messages": [CHAT[0], {**CHAT[1], "content": "see <|im_start|> there"}]}
    path = write(row, row)
    code, out, _ = command("data", "check", path, "--model", TINY, "--ignore-columns", "rejected, other", "--json")
    facts = json.loads(out)
    assert code == 0
    assert (facts["unused_columns"], facts["ignored_columns"]) == (["id"], ["rejected"])
    assert [(note["rows"], len(note["first"])) for note in facts["notes"]] == [(2, 2)]
    code, out, _ = command("data", "check", path, "--model", TINY, "--ignore-columns", "rejected")
    shown = " ".join(out.split())
    assert "not used id" in shown and "ignored rejected" in shown and "control tokens typed in the text" in shown
    code, _, err = command(
        "finetune", "--model", TINY, "--data", path, "--output", tmp_path / "out", "--dry-run", "--grad-accum", 1,
        "--ignore-columns", "rejected,other", "--cache-dir", tmp_path / "cache",
    )  # fmt: skip
    assert code == 0
    assert "control tokens typed in the text" in err and "no row has other" in err


def test_escaped_tokens_are_text(command, write):
    path = write({"messages": [CHAT[0], {**CHAT[1], "content": "see <|im_start|> there"}]})
    counts = []
    for flags in ((), ("--escape-special-tokens",)):
        code, out, _ = command("data", "check", path, "--model", TINY, "--json", *flags)
        assert code == 0
        counts.append(json.loads(out)["tokens"])
    assert counts[0] < counts[1]


@pytest.mark.parametrize("flags", [(), ("--raw",)])
def test_an_empty_prompt_is_refused(command, flags):
    code, _, err = command("generate", "--model", TINY, "--prompt", " ", *flags)
    assert code == 2 and "--prompt: is empty" in err
    code, _, err = command("generate", "--model", TINY, "--prompt", "x", "--system", "s", "--raw")
    assert code == 2 and "--system" in err


def test_a_system_message_reaches_the_model(command, tmp_path):
    words = (
        "generate",
        "--model",
        TINY,
        "--prompt",
        "f(x)",
        "--max-new-tokens",
        16,
        "--cache-dir",
        tmp_path,
        "--temperature",
        1,
    )
    texts = {system: command(*words, *(("--system", system) if system else ())) for system in ("", "Answer in French.")}
    assert all(code == 0 for code, _, _ in texts.values())
    assert texts[""][1] != texts["Answer in French."][1]
    again = generate(
        str(TINY), "f(x)", system="Answer in French.", max_new_tokens=16, cache_dir=str(tmp_path), temperature=1.0
    )
    assert again.strip() == texts["Answer in French."][1].strip()


def test_the_sample_prompt_takes_a_system_message(command, write, tmp_path):
    path = write({"messages": CHAT}, {"messages": CHAT})
    words = (
        "finetune",
        "--model",
        TINY,
        "--data",
        path,
        "--max-steps",
        1,
        "--grad-accum",
        1,
        "--cache-dir",
        tmp_path / "c",
    )
    samples = {}
    for name, flags in {"bare": (), "told": ("--system", "Answer in French.")}.items():
        code, _, err = command(*words, "--output", tmp_path / name, "--sample-prompt", "f(x)", *flags)
        assert code == 0, err
        samples[name] = json.loads((tmp_path / name / "run.json").read_text())["samples"]["before"]
    assert samples["bare"] != samples["told"]
    code, _, err = command(*words, "--output", tmp_path / "none", "--system", "x", "--dry-run")
    assert code == 0 and "system has no effect" in err


@pytest.mark.parametrize("width", [80, 120])
def test_nothing_is_cut_at_the_terminals_width(command, write, monkeypatch, width):
    """All words are there, unbroken, the closing mark among them, and no line is wider than the terminal."""
    monkeypatch.setenv("COLUMNS", str(width))
    reply = " ".join(f"word{number}" for number in range(60))
    path = write(*[{"messages": [CHAT[0], {"role": "assistant", "content": reply}]}] * 2)
    code, out, _ = command("data", "check", path, "--model", TINY)
    assert code == 0
    assert max(map(len, out.splitlines())) <= width
    words = set(out.replace("⟦", " ").replace("<|im_end|>", " ").split())
    assert {f"word{number}" for number in range(60)} <= words
    assert "⟧" in out.split("The first examples")[1].split("is marked:")[1]
