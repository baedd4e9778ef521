"""Every data format in its normal form, and every fault with its place and field."""

from __future__ import annotations

import pytest

from lopt_edge.data import Conversation, PromptCompletion, Record, TextRow, detect_format, to_conversation, to_rows
from lopt_edge.errors import InputError, InputErrors

USER = {"role": "user", "content": "hi"}
REPLY = {"role": "assistant", "content": "yes"}
CHAT = (("user", "hi"), ("assistant", "yes"))


def normal(value, data_format=None):
    record = Record(value, "d.jsonl:7")
    found, reason = detect_format([record])
    assert reason
    return found, to_conversation(record, data_format or found)


@pytest.mark.parametrize(
    ("value", "data_format", "row"),
    [
        ({"messages": [USER, REPLY]}, "messages", Conversation(CHAT, "d.jsonl:7")),
        ({"conversations": [USER, REPLY]}, "messages", Conversation(CHAT, "d.jsonl:7")),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
                    REPLY,
                ]
            },
            "messages",
            Conversation(CHAT, "d.jsonl:7"),
        ),
        (
            {"messages": [USER, {**REPLY, "tool_calls": None, "name": None}]},
            "messages",
            Conversation(CHAT, "d.jsonl:7"),
        ),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]},
            "sharegpt",
            Conversation(CHAT, "d.jsonl:7"),
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "user", "value": "hi"},
                    {"from": "assistant", "value": "yes"},
                ]
            },
            "sharegpt",
            Conversation((("system", "s"), *CHAT), "d.jsonl:7"),
        ),
        ({"instruction": "hi", "output": "yes"}, "alpaca", Conversation(CHAT, "d.jsonl:7")),
        ({"instruction": "hi", "input": None, "output": "yes"}, "alpaca", Conversation(CHAT, "d.jsonl:7")),
        (
            {"instruction": "hi", "input": "you", "output": "yes", "text": "unused"},
            "alpaca",
            Conversation((("user", "hi\n\nyou"), ("assistant", "yes")), "d.jsonl:7"),
        ),
        ({"prompt": "hi ", "completion": "yes"}, "prompt-completion", PromptCompletion("hi ", "yes", "d.jsonl:7")),
        ({"prompt": [USER], "completion": [REPLY]}, "prompt-completion", Conversation(CHAT, "d.jsonl:7", n_context=1)),
        ({"text": "hi"}, "text", TextRow("hi", "d.jsonl:7")),
        ("hi", "text", TextRow("hi", "d.jsonl:7")),
    ],
)
def test_normal_forms(value, data_format, row):
    assert normal(value) == (data_format, row)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ({"messages": []}, "field 'messages' is empty"),
        ({"messages": "hi"}, "field 'messages' is str, not a list"),
        ({"messages": [USER]}, "no assistant message"),
        ({"messages": [REPLY, USER]}, "no assistant message"),
        ({"messages": [USER, "yes"]}, "field 'messages[1]' is str, not an object"),
        ({"messages": [USER, {"role": "bot", "content": "yes"}]}, "field 'messages[1].role' is 'bot'"),
        ({"messages": [USER, {"content": "yes"}]}, "field 'messages[1].role' is missing"),
        ({"messages": [USER, {"role": ["a"], "content": "yes"}]}, "field 'messages[1].role' is list"),
        ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "field 'messages[1].content' is empty"),
        ({"messages": [USER, {"role": "assistant"}]}, "field 'messages[1].content' is missing"),
        ({"messages": [USER, {"role": "assistant", "content": 3}]}, "field 'messages[1].content' is int, not text"),
        ({"messages": [USER, {"role": "assistant", "content": "\ud800"}]}, "half a character"),
        (
            {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]},
            "field 'messages[1].tool_calls[0]' is not a call with a function's name",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, REPLY]},
            "field 'messages[0].content[0]' is not a text part (type 'image_url')",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": {"a": "text"}, "text": "a"}]}, REPLY]},
            "field 'messages[0].content[0]' is not a text part (type dict)",
        ),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "bing", "value": "b"}]}, "[1].from' is 'bing'"),
        ({"instruction": "hi", "output": ""}, "field 'output' is empty"),
        ({"instruction": "hi", "input": 3, "output": "a"}, "field 'input' is int"),
        ({"prompt": "a", "completion": [REPLY]}, "only one of 'prompt' and 'completion' is a list"),
        ({"prompt": [USER], "completion": [USER]}, "no assistant message"),
        ({"prompt": [USER, REPLY], "completion": [USER]}, "no assistant message"),
        ({"prompt": "a", "completion": None}, "field 'completion' is missing"),
        ({"text": ["a"]}, "field 'text' is list, not text"),
    ],
)
def test_faults_name_place_and_field(value, what):
    with pytest.raises(InputError) as caught:
        normal(value)
    assert what in str(caught.value)
    assert caught.value.where == "d.jsonl:7"


def test_faults_of_one_row_come_together():
    with pytest.raises(InputErrors) as caught:
        normal({"instruction": 1, "output": 2})
    assert len(caught.value.errors) == 2


def test_faults_of_all_rows_come_together():
    records = [Record({"text": "a"}, "d:1"), Record({"text": 1}, "d:2"), Record({"other": 1}, "d:3")]
    with pytest.raises(InputErrors) as caught:
        to_rows(records, data_format="text")
    assert [error.where for error in caught.value.errors] == ["d:2", "d:3"]


def test_unknown_fields_are_listed():
    with pytest.raises(InputError, match="the first row has 'question', 'answer'"):
        detect_format([Record({"question": "a", "answer": "b"}, "d:1")])


def test_text_file_named_as_chat_is_refused():
    with pytest.raises(InputError, match="a plain text file is not 'messages' data"):
        to_conversation(Record("hi", "d.txt"), "messages")
    with pytest.raises(InputError, match="unknown data format"):
        to_conversation(Record("hi", "d.txt"), "chat")
