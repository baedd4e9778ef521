"""Rows of preferences: their forms, the prompt that both replies begin with, what is refused, what `data check` shows."""

from __future__ import annotations

import json

import pytest

from lopt_edge.data import Conversation, Preference, PromptCompletion, Record, detect_format, load_dataset, split, to_rows
from lopt_edge.data.columns import Columns
from lopt_edge.data.order import epoch_windows
from lopt_edge.errors import InputError, InputErrors


def user(text):
    return {"role": "user", "content": text}


def reply(text):
    return {"role": "assistant", "content": text}


def row_of(value, **how):
    record = Record(value, "d:1")
    return to_rows([record], data_format=detect_format([record], preferred=True)[0], **how)[0]


@pytest.mark.parametrize(
    ("value", "prompt", "chosen", "rejected"),
    [
        ({"prompt": "2+2?", "chosen": " 4", "rejected": " 5"}, "2+2?", " 4", " 5"),
        (
            {"chosen": "Human: 2+2? Assistant: 4", "rejected": "Human: 2+2? Assistant: 40"},
            "Human: 2+2? Assistant:",
            " 4",
            " 40",
        ),
        (
            {"chosen": "Q: a? A: yes, it is", "rejected": "Q: a? A: yellow", "prompt": None},
            "Q: a? A:",
            " yes, it is",
            " yellow",
        ),
    ],
)
def test_texts_with_and_without_a_prompt(value, prompt, chosen, rejected):
    found = row_of(value)
    assert found == Preference(PromptCompletion(prompt, chosen, "d:1"), PromptCompletion(prompt, rejected, "d:1"), "d:1")


def test_messages_with_and_without_a_prompt():
    explicit = row_of({"prompt": [user("a"), reply("b"), user("c")], "chosen": [reply("yes")], "rejected": [reply("no")]})
    both = [user("a"), reply("b"), user("c")]
    beside = {"messages": [*both, reply("yes")], "prompt_id": "x", "score_chosen": 9.0}
    implicit = row_of({"prompt": "a", "chosen": [*both, reply("yes")], "rejected": [*both, reply("no")], **beside})
    for found in (explicit, implicit):
        assert [row.n_context for row in found.rows] == [3, 3] and all(isinstance(row, Conversation) for row in found.rows)
        assert [[row.messages[i].content for i in row.targets] for row in found.rows] == [["yes"], ["no"]]
    with_system = row_of({"system": "be brief", "prompt": [user("a")], "chosen": [reply("b")], "rejected": [reply("c")]})
    assert all(row.messages[0].role == "system" and row.targets == (2,) for row in with_system.rows)


def test_labelled_replies():
    wanted = row_of({"prompt": "a", "completion": "b", "label": "True"})
    other = row_of({"prompt": [user("a")], "completion": [reply("b")], "label": 0})
    assert wanted.chosen is not None and wanted.rejected is None and other.chosen is None and other.rejected is not None


REFUSED = (
    ({"prompt": "a", "chosen": "b", "rejected": " "}, "'rejected' is empty"),
    ({"prompt": "a", "chosen": [reply("b")], "rejected": "c"}, "only some of 'prompt', 'chosen' and 'rejected' are lists"),
    ({"chosen": "yes", "rejected": "no"}, "there is no 'prompt'"),
    ({"chosen": [user("a"), reply("b")], "rejected": [user("c"), reply("b")]}, "do not begin with the same message"),
    (
        {"prompt": "z", "chosen": [user("a"), reply("b")], "rejected": [user("a"), reply("c")]},
        "'prompt' is none of the messages",
    ),
    ({"prompt": [user("a")], "chosen": [user("b")], "rejected": [reply("c")]}, "no assistant message to learn from"),
    ({"prompt": "a", "completion": "b", "label": "maybe"}, "'label' is 'maybe', neither yes nor no"),
    ({"prompt": "a", "completion": "b", "label": None}, "'label' is missing"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "weights": 1}, "'weights' of a row of preference is not known"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "system": "s"}, "'system' of a row of preference is not known"),
)


@pytest.mark.parametrize(("value", "message"), REFUSED)
def test_what_is_refused_has_its_place(value, message):
    with pytest.raises((InputError, InputErrors), match=r"(?s)d:1.*" + message):
        row_of(value)


def test_the_form_goes_by_what_is_asked_for():
    both = [Record({"messages": [user("a"), reply("b")], "chosen": "b", "rejected": "c", "prompt": "a"}, "d:1")]
    assert detect_format(both)[0] == "messages" and detect_format(both, preferred=True)[0] == "preference"
    ignored = ("chosen", "rejected")
    assert detect_format(both, preferred=True, ignored=ignored)[0] == "messages"
    assert to_rows(both, data_format="messages", fields=Columns((*ignored, "prompt")))
    assert detect_format([Record({"prompt": "a", "completion": "b", "label": 1}, "d:1")])[0] == "prompt-completion"


def test_pairs_stand_or_fall_together(tmp_path, make_tokenizer):
    bpe = make_tokenizer()
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "What? " * 3, "chosen": "a b c", "rejected": "d e"}] * 3
    rows += [
        {"prompt": "What? " * 400, "chosen": "a", "rejected": "b"},
        {"prompt": "x", "chosen": "same", "rejected": "same"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_dataset(path, bpe, max_seq_len=64, preferences="pairs")
    assert (found.n_rows, found.n_dropped, found.n_units, found.labels) == (5, 1, 4, (True, False) * 4)
    assert any("are the same" in note.what for note in found.notes)
    train, held_out = split(found, fraction=0.25, seed=0)
    assert (train.n_units, held_out.n_units) == (3, 1) and held_out.labels == (True, False)
    windows = epoch_windows(train.lengths, seed=1, epoch=0, batch_size=2, grad_accum=1, together=2)
    assert sorted(index for window in windows for batch in window for index in batch) == list(range(6))
    assert all(batch[1] == batch[0] + 1 and batch[0] % 2 == 0 for window in windows for batch in window)
    assert load_dataset(path, bpe, max_seq_len=64, preferences="labels").labels == (True,) * 4 + (False,) * 4


def test_data_check_shows_pairs_and_labels(command, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        json.dumps({"prompt": [user("f(x)")], "chosen": [reply("Return x.")], "rejected": [reply("No.")]}) + "\n"
    )
    code, out, err = command("data", "check", path, "--model", "examples/tiny-llama")
    assert code == 0, err
    assert "1 pairs" in out and "chosen," in out and "rejected," in out
    code, out, _ = command("data", "check", path, "--model", "examples/tiny-llama", "--objective", "kto", "--json")
    assert (json.loads(out)["preferences"], json.loads(out)["preferred"], json.loads(out)["examples"]) == ("labels", 1, 2)
    code, _, err = command("data", "check", path, "--model", "examples/tiny-llama", "--objective", "sft")
    assert code == 2 and "--columns completion=chosen" in err
    code, _, err = command("data", "check", path, "--model", "examples/tiny-llama", "--objective", "ppo")
    assert code == 2 and "choose from sft, dpo, orpo, simpo, kto" in err
