"""Fields of rows: what is used, what is named as unused, what is refused; the values that tools of the field write."""

from __future__ import annotations

from pathlib import Path

import pytest

from lopt_edge.data import Conversation, Message, PromptCompletion, Record, detect_format, to_conversation, to_rows
from lopt_edge.data.columns import HARMLESS, MESSAGE_FIELDS, ROW_FIELDS, Columns
from lopt_edge.data.messages import SHAREGPT_ROLES
from lopt_edge.data.notes import NOT_LEARNED_ROLE, PARSED, Notes
from lopt_edge.errors import InputError, InputErrors

USER = {"role": "user", "content": "hi"}
REPLY = {"role": "assistant", "content": "yes"}
CHAT = {"messages": [USER, REPLY]}


def normal(value, **how):
    return to_rows([Record(value, "d:1")], data_format=detect_format([Record(value, "d:1")])[0], **how)[0]


@pytest.mark.parametrize(
    "value",
    [
        {**CHAT, "rejected": "no"},
        {**CHAT, "chosen": [REPLY]},
        {**CHAT, "images": ["a.png"]},
        {"messages": [USER, {**REPLY, "refusal": "never"}]},
        {"text": "hi", "label": 3},
        {"prompt": "hi", "completion": "yes", "system": "be brief"},
        {"instruction": "hi", "output": "yes", "context": "more to read"},
    ],
)
def test_a_field_that_nobody_knows_is_refused_with_its_place(value):
    name = next(key for key in [*value, *(value.get("messages") or [{}])[-1]] if key not in (*CHAT, *REPLY, *KNOWN))
    with pytest.raises(InputError, match=f"^d:1: field '{name}' .* is not known") as caught:
        normal(value)
    assert f"--ignore-columns {name}" in caught.value.fix
    columns = Columns([name, "other"])
    assert normal(value, fields=columns)
    assert columns.ignored == (name,)
    assert columns.without_effect == ("other",)


KNOWN = ("text", "prompt", "completion", "instruction", "output")


def test_one_error_for_a_field_of_many_rows():
    records = [Record({**CHAT, "rejected": "no"}, f"d:{line}") for line in range(1, 40)]
    with pytest.raises(InputError, match=r"^d:1: field 'rejected' .*\(39 rows\)"):
        to_rows(records, data_format="messages")


def test_harmless_fields_are_named_and_empty_ones_are_absent():
    columns = Columns()
    row = {**CHAT, "id": 7, "source": "web", "rejected": None, "tools": [], "system": "", "images": {}}
    assert normal(row, fields=columns) == Conversation((("user", "hi"), ("assistant", "yes")), "d:1")
    assert columns.unused == ("id", "source")


def test_a_copy_of_a_text_that_is_used_is_harmless():
    assert normal({**CHAT, "prompt": "hi "}) == normal(CHAT)
    with pytest.raises(InputError, match="'prompt'"):
        normal({**CHAT, "prompt": "hello"})


def test_a_named_form_leaves_the_fields_of_the_others():
    columns = Columns(is_named=True)
    row = to_rows([Record({"instruction": "a", "output": "b", "text": "c"}, "d:1")], data_format="text", fields=columns)
    assert row[0].text == "c"
    assert columns.unused == ("instruction", "output")


# --- whether a message is learned -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flag",
    [
        {"weight": 0},
        {"weight": 0.0},
        {"loss": False},
        {"train": False},
        {"training": "false"},
        {"trainable": 0},
        {"masked": True},
    ],
)
def test_a_message_that_is_not_to_be_learned_is_no_target(flag):
    row = normal({"messages": [USER, {**REPLY, **flag}, USER, {**REPLY, "content": "no"}]})
    assert row.targets == (3,)
    with pytest.raises(InputError, match="every assistant message is marked as not to be learned"):
        normal({"messages": [USER, {**REPLY, **flag}]})


@pytest.mark.parametrize("flag", [{"weight": 1}, {"loss": True}, {"train": "true"}, {"masked": False}, {"weight": None}])
def test_a_message_that_is_to_be_learned_is_a_target(flag):
    assert normal({"messages": [USER, {**REPLY, **flag}]}) == normal(CHAT)
    assert normal({**CHAT, **flag}) == normal(CHAT)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ({"messages": [USER, {**REPLY, "weight": 0.5}]}, r"'messages\[1\].weight' is 0.5, neither yes nor no"),
        ({"messages": [USER, {**REPLY, "loss": "some"}]}, r"'messages\[1\].loss' is 'some'"),
        ({"messages": [USER, {**REPLY, "loss": True, "weight": 0}]}, "says both: weight, loss"),
        ({**CHAT, "weight": 0}, "the row says that it is not to be learned"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused(value, what):
    with pytest.raises(InputError, match=what):
        normal(value)


def test_a_user_message_is_not_learned_whatever_it_asks():
    notes = Notes()
    assert normal({"messages": [{**USER, "train": True}, REPLY]}, notes=notes).targets == (1,)
    assert [note.what for note in notes.all()] == [NOT_LEARNED_ROLE]


# --- system, history, thoughts, double encoding -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
def test_a_system_field_is_the_first_message(name):
    expected = Conversation((("system", "be brief"), ("user", "hi"), ("assistant", "yes")), "d:1")
    sharegpt = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]}
    for value in (CHAT, sharegpt, {"instruction": "hi", "output": "yes"}):
        assert normal({**value, name: "be brief"}) == expected
    inside = {"messages": [{"role": "developer", "content": "be brief"}, USER, REPLY]}
    assert normal({**inside, name: "be brief"}) == expected
    with pytest.raises(InputError, match="several system messages"):
        normal({**inside, name: "be long"})


def test_history_is_context():
    row = normal({"instruction": "And then?", "output": "At 18:40.", "history": [["When?", "At 06:15."]], "system": "s"})
    assert [message.content for message in row.messages] == ["s", "When?", "At 06:15.", "And then?", "At 18:40."]
    assert row.targets == (4,)
    with pytest.raises(InputError, match=r"'history\[0\]' is not a pair"):
        normal({"instruction": "a", "output": "b", "history": [["c"]]})
    with pytest.raises(InputError, match=r"'history\[1\].user' is int"):
        normal({"instruction": "a", "output": "b", "history": [["c", "d"], [1, "e"]]})


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking", "thought"])
def test_thoughts_in_a_field_of_their_own(name):
    assert normal({"messages": [USER, {**REPLY, name: "hm\n"}]}).messages[1] == Message("assistant", "yes", "hm")
    with pytest.raises(InputError, match="only an assistant's thoughts"):
        normal({"messages": [{**USER, name: "hm"}, REPLY]})


def test_thoughts_in_parts_and_two_thoughts():
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "yes"}]
    assert normal({"messages": [USER, {"role": "assistant", "content": parts}]}).messages[1].thought == "hm"
    with pytest.raises(InputError, match="two thoughts: reasoning_content, thinking"):
        normal({"messages": [USER, {**REPLY, "reasoning_content": "a", "thinking": "b"}]})


def test_json_in_a_string_is_parsed_and_said():
    notes = Notes()
    text = '[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]'
    assert normal({"messages": text}, notes=notes) == normal(CHAT)
    assert [note.what for note in notes.all()] == [PARSED]
    assert normal({"conversations": '[{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]'}) == normal(CHAT)
    with pytest.raises(InputError, match="'messages' is text that is not JSON"):
        to_conversation(Record({"messages": "[1, "}, "d:1"), "messages")


def test_faults_and_unknown_fields_come_together():
    records = [Record({**CHAT, "rejected": "no"}, "d:1"), Record({"messages": [USER], "odd": 1}, "d:2")]
    with pytest.raises(InputErrors) as caught:
        to_rows(records, data_format="messages")
    assert [error.where for error in caught.value.errors] == ["d:2", "d:1"]


def test_text_pairs_have_no_place_for_a_system_message_but_message_lists_have():
    assert isinstance(normal({"prompt": "hi", "completion": "yes"}), PromptCompletion)
    row = normal({"prompt": [USER], "completion": [REPLY], "system": "s"})
    assert [message.role for message in row.messages] == ["system", "user", "assistant"]
    assert row.targets == (2,)


def test_the_documentation_names_every_known_field():
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    fields = {*MESSAGE_FIELDS, *HARMLESS, *SHAREGPT_ROLES, *(name for form in ROW_FIELDS.values() for name in form)}
    assert [name for name in sorted(fields) if f"`{name}`" not in text and f'"{name}"' not in text] == []
