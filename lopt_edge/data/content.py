"""Whether all that a conversation says stands in its rendered text.

A chat template may leave something out without a word: a role that it does not know, a thought, a call, the tools. A model
would then learn replies to what it never read. Rule: every message's content, every call, the last reply's thought and
every tool must be in the text, or the row is refused with the message's place.

How it is told: the conversation is rendered a second time with a mark of its own in the place of each text, and every mark
must come out. (The texts themselves do not tell: "4.1" is also found in a reply "4.1 m".) What comes out depends on the
shape of a conversation, so each shape is rendered once for a whole file. The texts themselves are looked for as well, since
a template may treat a certain text otherwise; blanks at their ends, escapes of JSON, and a line's blanks do not count.

Not here: thoughts before the last reply, which many templates leave out by design (`turns` notes it).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from lopt_edge.data.rows import Conversation, Message
from lopt_edge.data.thoughts import Parts, parts_of, stripped
from lopt_edge.data.turns import Renderer, render_conversation
from lopt_edge.errors import InputError

Part = tuple[str, int, int]  # content, thought, call or tool; the message's (or tool's) number; the call's number


class ContentCheck:
    """A check of conversations against their texts, which remembers the shapes that it has seen."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self._shapes: dict[Any, tuple[Part, ...]] = {}

    def check(self, row: Conversation, text: str) -> None:
        """Raise InputError for a conversation of which something is missing in the text."""
        row = replace(row, messages=row.messages[: row.targets[-1] + 1])
        row = stripped(row, self._renderer.think)
        shape = _shape(row)
        if shape not in self._shapes:
            self._shapes[shape] = tuple(_left_out(row, self._renderer))
        missing = self._shapes[shape] or tuple(_not_found(row, text, self._renderer))
        if missing:
            places = ", ".join(dict.fromkeys(_place(row, part) for part in missing[:4]))
            strip = "use --think strip, " if any(kind == "thought" for kind, *_ in missing) else ""
            raise InputError(
                f"{self._renderer.template.where} leaves out {places}",
                where=row.where,
                fix=f"{strip}take it out of the row, or give a template that renders it with --chat-template",
            )


def _shape(row: Conversation) -> Any:
    """What decides which parts a template renders: the roles, and which parts each message has."""
    messages = (
        (
            message.role,
            bool(message.content.strip()),
            bool(message.thought),
            message.role == "assistant" and bool(parts_of(message).thought),
            tuple(len(_arguments(call)) for call in message.tool_calls),
            bool(message.name),
            message.is_target,
        )
        for message in row.messages
    )
    return row.n_context, len(row.tools), *messages


def _arguments(call: dict[str, Any]) -> dict[str, Any]:
    arguments: dict[str, Any] = call["function"]["arguments"]
    return arguments


def _left_out(row: Conversation, renderer: Renderer) -> Iterator[Part]:
    """The parts of a conversation of this shape that its text does not show."""
    marked, marks = _marked(row, renderer)
    text = render_conversation(marked, renderer).text
    return (part for part, mark in marks.items() if mark not in text)


def _is_shown(row: Conversation, k: int, renderer: Renderer) -> bool:
    """Whether the thought of message k must be in the text."""
    return k == row.targets[-1] or renderer.think == "keep"


def _marked(row: Conversation, renderer: Renderer) -> tuple[Conversation, dict[Part, str]]:
    """The conversation with a mark in the place of each text, and the marks by what they stand for."""
    marks: dict[Part, str] = {}

    def mark(kind: str, k: int, number: int = 0) -> str:
        return marks.setdefault((kind, k, number), f"lopt-edge-{kind}-{k}-{number}-")

    messages = []
    for k, message in enumerate(row.messages):
        parts = parts_of(message) if message.role == "assistant" else Parts("", message.content)
        content = mark("content", k) if parts.answer.strip() else ""
        thought = (mark("thought", k) if _is_shown(row, k, renderer) else "lopt-edge") if parts.thought else ""
        if thought and not message.thought:  # between tags in the content, where templates look for them
            content, thought = f"<think>\n{thought}\n</think>\n\n{content}", ""
        calls = tuple(_marked_call(call, mark("call", k, number)) for number, call in enumerate(message.tool_calls))
        messages.append(replace(message, content=content, thought=thought, tool_calls=calls))
    tools = tuple({**tool, "function": {**tool["function"], "name": mark("tool", k)}} for k, tool in enumerate(row.tools))
    return replace(row, messages=tuple(messages), tools=tools), marks


def _marked_call(call: dict[str, Any], mark: str) -> dict[str, Any]:
    arguments = dict.fromkeys(_arguments(call), mark)
    name = call["function"]["name"] if arguments else mark
    return {**call, "function": {"name": name, "arguments": arguments}}


def _not_found(row: Conversation, text: str, renderer: Renderer) -> Iterator[Part]:
    """The parts whose own text is not in the rendered one."""
    squeezed = ""
    for k, message in enumerate(row.messages):
        for part, own in _texts(message, k, with_thought=_is_shown(row, k, renderer)):
            if own in text or any(_escaped(own, ascii_only=ascii_only) in text for ascii_only in (False, True)):
                continue
            squeezed = squeezed or " ".join(text.split())
            if " ".join(own.split()) not in squeezed:
                yield part


def _texts(message: Message, k: int, *, with_thought: bool) -> Iterator[tuple[Part, str]]:
    parts = parts_of(message) if message.role == "assistant" else Parts("", message.content)
    yield ("content", k, 0), parts.answer.strip()
    if with_thought:
        yield ("thought", k, 0), parts.thought.strip()
    for number, call in enumerate(message.tool_calls):
        yield ("call", k, number), call["function"]["name"]


def _escaped(text: str, *, ascii_only: bool) -> str:
    return json.dumps(text, ensure_ascii=ascii_only)[1:-1]


def _place(row: Conversation, part: Part) -> str:
    """What an error calls a part."""
    kind, k, _ = part
    if kind == "tool":
        return f"the tool {row.tools[k]['function']['name'][:40]!r}"
    message = row.messages[k]
    what = {"content": "the text", "thought": "the thought", "call": "the tool call"}[kind]
    return f"{what} of {message.field or f'message {k + 1}'} ({message.role})"
