"""Tools and tool calls: every form that data comes in, rendered by templates that want them in different ways."""

from __future__ import annotations

import json

import pytest

from lopt_edge.data import Record, detect_format, encode_rows, load_template, marked_pieces, to_rows
from lopt_edge.errors import InputError

CALL = {"id": "c1", "type": "function", "function": {"name": "get_tide", "arguments": {"port": "Hull"}}}
AS_TEXT = {**CALL, "function": {"name": "get_tide", "arguments": '{"port": "Hull"}'}}
TOOL = {"type": "function", "function": {"name": "get_tide", "parameters": {"type": "object"}}}
ASK = {"role": "user", "content": "Tide?"}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "4.1 m"}
ANSWER = {"role": "assistant", "content": "It is 4.1 m."}


def rows_of(value):
    record = Record(value, "d:1")
    return to_rows([record], data_format=detect_format([record])[0])


def calling(**message):
    return {"messages": [ASK, {"role": "assistant", **message}, RESULT, ANSWER]}


def sharegpt(call, **more):
    turns = [("human", "Tide?"), ("function_call", call), ("observation", "4.1 m"), ("gpt", "It is 4.1 m.")]
    return {"conversations": [{"from": role, "value": text} for role, text in turns], **more}


FORMS = {
    "object": calling(content=None, tool_calls=[CALL]),
    "text": calling(content="", tool_calls=[AS_TEXT]),
    "bare": calling(tool_calls=[{"name": "get_tide", "arguments": {"port": "Hull"}}]),
    "json": calling(content=None, tool_calls=json.dumps([CALL])),
    "function_call": calling(content=None, function_call={"name": "get_tide", "arguments": '{"port": "Hull"}'}),
    "sharegpt": sharegpt('{"name": "get_tide", "arguments": {"port": "Hull"}}'),
    "sharegpt list": sharegpt('[{"name": "get_tide", "arguments": {"port": "Hull"}}]'),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("template", "call"),
    [
        ("qwen-tools", '<tool_call>\n{"name": "get_tide", "arguments": {"port": "Hull"}}\n</tool_call><|im_end|>'),
        ("llama-tools", '{"name": "get_tide", "parameters": {"port": "Hull"}}<|eot_id|>'),
        ("deepseek-tools", 'get_tide\n```json\n{"port": "Hull"}\n```<eos>'),
    ],
)
def test_a_call_is_learned_as_the_template_writes_it(make_tokenizer, form, template, call):
    tokenizer = make_tokenizer(template)
    found, _ = load_template(tokenizer)
    ((example,),) = encode_rows(rows_of(FORMS[form]), tokenizer, template=found, max_seq_len=900)
    pieces = list(marked_pieces(example, tokenizer))
    assert [text for text, is_target in pieces if is_target] == [call, f"It is 4.1 m.{found.end_token}"]
    assert "4.1 m" in "".join(text for text, is_target in pieces if not is_target)  # what the tool said is context


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [TOOL["function"]], TOOL])
def test_tools_are_handed_to_the_template(make_tokenizer, tools):
    tokenizer = make_tokenizer("qwen-tools")
    rows = rows_of({"messages": [{"role": "system", "content": "Help."}, ASK, ANSWER], "tools": tools})
    ((example,),) = encode_rows(rows, tokenizer, template=load_template(tokenizer)[0], max_seq_len=900)
    text = tokenizer.decode(example.input_ids.tolist())
    assert text.startswith(f"<|im_start|>system\nHelp.\n{json.dumps(TOOL)}\n<|im_end|>\n")
    expected = tokenizer.apply_chat_template([{"role": "system", "content": "Help."}, ASK, ANSWER], tools=[TOOL])
    assert example.input_ids.tolist() == expected["input_ids"]


def test_the_template_for_tools_is_taken_where_there_are_some(make_tokenizer):
    tokenizer = make_tokenizer("qwen-tools")
    tokenizer.chat_template = {"default": "x", "tool_use": tokenizer.chat_template}
    assert load_template(tokenizer, for_tools=True)[0].call_form is not None


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (FORMS["object"], r"messages\[1\]: the chat template renders no tool calls"),
        ({"messages": [ASK, ANSWER], "tools": [TOOL]}, "leaves out the tool 'get_tide'"),
    ],
)
def test_what_a_template_does_not_render_is_refused(make_tokenizer, value, what):
    tokenizer = make_tokenizer("chatml")
    with pytest.raises(InputError, match=what):
        encode_rows(rows_of(value), tokenizer, template=load_template(tokenizer)[0], max_seq_len=900)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (calling(tool_calls=[{"function": {"name": ""}}]), r"'messages\[1\].tool_calls\[0\]' is not a call"),
        (calling(tool_calls=[{"function": {"name": "f", "arguments": "[1]"}}]), "arguments' is list, not an object"),
        (calling(tool_calls=[{"function": {"name": "f", "arguments": "{"}}]), "arguments' is text that is not JSON"),
        (calling(tool_calls="no"), "tool_calls' is text that is not JSON"),
        ({"messages": [{**ASK, "tool_calls": [CALL]}, ANSWER]}, "only an assistant calls tools"),
        ({"messages": [ASK, ANSWER], "tools": "tide"}, "'tools' is text that is not JSON"),
        ({"messages": [ASK, ANSWER], "tools": [{"type": "function"}]}, r"'tools\[0\]' is not a tool with a name"),
        (sharegpt("get_tide(Hull)"), r"'conversations\[1\].value' is text that is not JSON"),
        ({"messages": [ASK, ANSWER], "tools": [TOOL], "functions": [TOOL]}, "both 'tools' and 'functions'"),
    ],
)
def test_calls_that_are_not_understood_are_refused(value, what):
    with pytest.raises(InputError, match=what):
        rows_of(value)
