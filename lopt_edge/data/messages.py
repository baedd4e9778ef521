"""The messages of a record, in the forms of OpenAI (`role`, `content`) and of ShareGPT (`from`, `value`).

Rule: whatever a message says beside its text is used: who speaks, thoughts, tool calls, whether it is learned. A role that
is not known, empty content, an image, a flag that is neither yes nor no are faults with their place.

    roles        system (developer), user (human), assistant (gpt, chatgpt, model), tool (function, observation, ipython,
    ...) calls        tool_calls, function_call, or sharegpt's role function_call, whose value is the call as JSON thoughts
    reasoning_content, reasoning, thinking, thought, or a content part {"type": "thinking", ...} learned      weight, loss,
    train, training, trainable: 1 or true; masked: false. What follows without a flag is learned
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lopt_edge.data import columns, notes
from lopt_edge.data.columns import Columns, is_absent
from lopt_edge.data.fields import shown, text_field
from lopt_edge.data.notes import Notes
from lopt_edge.data.rows import Message
from lopt_edge.data.tool_calls import calls_of, parsed
from lopt_edge.errors import InputError, raise_collected

ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    "developer": "system",
    "function": "tool",
    "ipython": "tool",
}
SHAREGPT_ROLES = {
    **ROLES, "human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "observation": "tool",
    "tool_response": "tool", "function_response": "tool", "function_call": "assistant", "tool_call": "assistant",
}  # fmt: skip
CALLING = ("function_call", "tool_call")  # sharegpt's roles whose value is a call
YES, NO = (True, 1, 1.0, "true", "1"), (False, 0, 0.0, "false", "0")


@dataclass(frozen=True)
class ChatForm:
    """A chat format: how it names a message's role and content, and which roles it has."""

    role: str
    content: str
    roles: Mapping[str, str]


OPENAI = ChatForm("role", "content", ROLES)
SHAREGPT = ChatForm("from", "value", SHAREGPT_ROLES)


@dataclass(frozen=True)
class Reading:
    """The place of the record that is being read, and where its fields and peculiarities are noted."""

    where: str
    columns: Columns
    notes: Notes


def messages_of(value: object, field: str, form: ChatForm, reading: Reading) -> tuple[Message, ...]:
    """The messages of a list (or of a list as JSON in a string). Raises InputError(s)."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        value = parsed(value, field=field, where=reading.where)
        reading.notes.add(notes.PARSED, reading.where)
    if not isinstance(value, list) or not value:
        found = "missing" if value is None else "empty" if value == [] else f"{type(value).__name__}, not a list"
        raise InputError(f"field '{field}' is {found}", where=reading.where, fix="give a list of messages")
    errors: list[InputError] = []
    messages: list[Message] = []
    n_calls = 0
    for index, item in enumerate(value):
        try:
            messages.append(_message(item, f"{field}[{index}]", form, reading, n_calls))
            n_calls += len(messages[-1].tool_calls)
        except InputError as error:
            errors.append(error)
    raise_collected(errors)
    return tuple(messages)


def flag_of(value: Mapping[str, Any], *, field: str, where: str) -> bool | None:
    """Whether a message or row is learned; None where it does not say. Raises InputError for what is neither yes nor no."""
    said: dict[str, bool] = {}
    for name in columns.FLAGS:
        flag = value.get(name)
        if is_absent(flag):
            continue
        flag = flag.lower() if isinstance(flag, str) else flag
        if isinstance(flag, (list, dict)) or flag not in (*YES, *NO):
            fix = "use 0 or 1 (true or false)"
            raise InputError(f"field '{field}{name}' is {shown(flag)}, neither yes nor no", where=where, fix=fix)
        said[name] = (flag in YES) != (name in columns.MASK_FLAGS)
    if len(set(said.values())) > 1:
        raise InputError(f"field '{field}' says both: {', '.join(said)}", where=where, fix="keep one of them")
    return next(iter(said.values()), None)


def _message(item: object, field: str, form: ChatForm, reading: Reading, n_calls: int) -> Message:
    where = reading.where
    if not isinstance(item, dict):
        fix = f'write {{"{form.role}": ..., "{form.content}": ...}}'
        raise InputError(f"field '{field}' is {type(item).__name__}, not an object", where=where, fix=fix)
    value = reading.columns.of_message(item, (form.role, form.content), where=where)
    said = value.get(form.role)
    if not isinstance(said, str) or said not in form.roles:
        fix = "use " + ", ".join(form.roles)
        raise InputError(f"field '{field}.{form.role}' is {shown(said)}", where=where, fix=fix)
    content, thought = value.get(form.content), _thought(value, field=field, where=where)
    if isinstance(content, list):
        content, parts = _joined_parts(content, field=f"{field}.{form.content}", where=where)
        thought = thought or parts
    message = Message(form.roles[said], "", thought, name=_label(value, "name", field, where), field=field)
    message = replace(
        message, call_id=_label(value, "tool_call_id", field, where), is_target=_target(message, value, reading)
    )
    if said in CALLING:
        return replace(message, tool_calls=calls_of(content, field=f"{field}.{form.content}", where=where, first=n_calls))
    if calls := [name for name in columns.CALLS if not is_absent(value.get(name))]:
        found = calls_of(value[calls[0]], field=f"{field}.{calls[0]}", where=where, first=n_calls)
        message = replace(message, tool_calls=found)
        if message.role != "assistant":
            what = f"field '{field}.{calls[0]}': only an assistant calls tools"
            raise InputError(what, where=where, fix="give the message to the assistant")
        if is_absent(content) or (isinstance(content, str) and not content.strip()):
            return message
    return replace(message, content=text_field({form.content: content}, form.content, where=where, prefix=f"{field}."))


def _target(message: Message, value: Mapping[str, Any], reading: Reading) -> bool:
    flag = flag_of(value, field=f"{message.field}.", where=reading.where)
    if flag and message.role != "assistant":
        reading.notes.add(notes.NOT_LEARNED_ROLE, reading.where)
    return flag is not False


def _label(value: Mapping[str, Any], key: str, field: str, where: str) -> str | None:
    """A short text field that may be absent."""
    found = value.get(key)
    return None if is_absent(found) else text_field(value, key, where=where, prefix=f"{field}.")


def _thought(value: Mapping[str, Any], *, field: str, where: str) -> str:
    names = [name for name in columns.THOUGHTS if not is_absent(value.get(name))]
    texts = {name: text_field(value, name, where=where, prefix=f"{field}.", may_be_blank=True) for name in names}
    if len(set(texts.values())) > 1:
        raise InputError(f"field '{field}' has two thoughts: {', '.join(texts)}", where=where, fix="keep one of them")
    if texts and value.get("role", value.get("from")) not in ("assistant", "gpt", "chatgpt", "model"):
        raise InputError(f"field '{field}.{names[0]}': only an assistant's thoughts are known", where=where)
    return next(iter(texts.values()), "").strip("\n")


def _joined_parts(parts: list[Any], *, field: str, where: str) -> tuple[str, str]:
    """The text and the thoughts of a content list; other parts (images, say) are refused."""
    texts: dict[str, list[str]] = {"text": [], "thinking": []}
    for index, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in texts or not isinstance(part.get(kind), str):
            found = f"type {shown(kind)}" if isinstance(part, dict) else type(part).__name__
            fix = 'use parts of the form {"type": "text", "text": "..."}'
            raise InputError(f"field '{field}[{index}]' is not a text part ({found})", where=where, fix=fix)
        texts[kind].append(part[kind])
    return "".join(texts["text"]), "".join(texts["thinking"])
