"""Turns records of the five data formats into one of three row types.

    messages           {"messages": [{"role": "user", "content": "..."}, ...]}          -> Conversation
    sharegpt           {"conversations": [{"from": "human", "value": "..."}, ...]}      -> Conversation
    alpaca             {"instruction": "...", "input": "..." (optional), "output": ""}  -> Conversation
    prompt-completion  {"prompt": "...", "completion": "..."}                           -> PromptCompletion
                       (or two lists of messages, the form of TRL)                      -> Conversation
    text               {"text": "..."}, or a whole .txt file                            -> TextRow

Rule: nothing is guessed about a row and nothing is dropped silently. The format is decided once, from the first
record, with its reason; a row that does not fit it is a fault that names the place and the field. Faults are collected
over all rows. Refused: unknown roles, empty or non-text content, a conversation without an assistant message that
answers something, tool calls (their rendering differs per model, and a half-kept call would train garbage).

Not here: chat templates and tokens (`template`, `encode`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lopt_edge.data.faults import Faults
from lopt_edge.data.records import Record
from lopt_edge.errors import InputError, raise_collected

DataFormat = Literal["messages", "prompt-completion", "alpaca", "sharegpt", "text"]
DATA_FORMATS: tuple[str, ...] = get_args(DataFormat)

OPENAI_ROLES = {role: role for role in ("system", "user", "assistant", "tool")}
SHAREGPT_ROLES = {**OPENAI_ROLES, "human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}

Message = tuple[str, str]


@dataclass(frozen=True)
class Conversation:
    """A conversation of (role, content) pairs. Assistant messages among the first `n_context` are context: never trained
    on."""

    messages: tuple[Message, ...]
    where: str
    n_context: int = 0


@dataclass(frozen=True)
class PromptCompletion:
    """A text and its continuation, without any chat template between them."""

    prompt: str
    completion: str
    where: str


@dataclass(frozen=True)
class TextRow:
    """Raw text, every token of it a target."""

    text: str
    where: str


Row = Conversation | PromptCompletion | TextRow


# --- which format -----------------------------------------------------------------------------------------------------


def detect_format(records: Sequence[Record]) -> tuple[DataFormat, str]:
    """The format of the first record, and why; the other records must follow it."""
    first = records[0]
    if isinstance(first.value, str):
        return "text", "a plain text file"
    has = first.value.keys()
    for key in ("messages", "conversations"):
        if key in has:
            pairs = _first_item_keys(first.value[key])
            if "from" in pairs or (key == "conversations" and "role" not in pairs):
                return "sharegpt", f"the first row has '{key}' with from/value pairs"
            return "messages", f"the first row has '{key}' with role/content pairs"
    if "instruction" in has and "output" in has:
        return "alpaca", "the first row has 'instruction' and 'output'"
    if "prompt" in has and "completion" in has:
        return "prompt-completion", "the first row has 'prompt' and 'completion'"
    if "text" in has:
        return "text", "the first row has 'text'"
    fields = ", ".join(repr(str(key)) for key in list(has)[:12]) or "no field at all"
    raise InputError(
        f"the data format is not recognised; the first row has {fields}",
        where=first.where,
        fix="use 'messages', 'conversations', 'instruction' + 'output', 'prompt' + 'completion' or 'text'",
    )


def _first_item_keys(value: object) -> frozenset[str]:
    first = value[0] if isinstance(value, list) and value else None
    return frozenset(first) if isinstance(first, dict) else frozenset()


def to_rows(records: Sequence[Record], *, data_format: DataFormat) -> list[Row]:
    """The records as rows. Raises InputErrors: all faulty records are reported together."""
    faults, rows = Faults(), []
    for record in records:
        try:
            rows.append(to_conversation(record, data_format))
        except InputError as error:
            faults.add(error)
    faults.raise_any()
    return rows


def to_conversation(record: Record, data_format: DataFormat) -> Row:
    """The record in its normal form. Raises InputError."""
    if data_format not in _CONVERTERS:
        raise InputError(f"unknown data format {data_format!r}", fix="use one of " + ", ".join(DATA_FORMATS))
    if isinstance(record.value, str) and data_format != "text":
        fix = "leave the data format to be detected, or use 'text'"
        raise InputError(f"a plain text file is not '{data_format}' data", where=record.where, fix=fix)
    return _CONVERTERS[data_format](record)


# --- one converter per format -----------------------------------------------------------------------------------------


def _from_messages(record: Record) -> Row:
    value, where = _fields(record), record.where
    messages = _messages(value, _chat_key(value, "messages"), where=where, form=_OPENAI)
    return _conversation(messages, where=where)


def _from_sharegpt(record: Record) -> Row:
    value, where = _fields(record), record.where
    messages = _messages(value, _chat_key(value, "conversations"), where=where, form=_SHAREGPT)
    return _conversation(messages, where=where)


def _from_alpaca(record: Record) -> Row:
    value, where = _fields(record), record.where
    errors: list[InputError] = []
    instruction = _collect(errors, value, "instruction", where=where)
    extra = ""
    if value.get("input") not in (None, ""):
        extra = _collect(errors, value, "input", where=where, may_be_blank=True)
    output = _collect(errors, value, "output", where=where)
    raise_collected(errors)
    user = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    return Conversation((("user", user), ("assistant", output)), where)


def _from_prompt_completion(record: Record) -> Row:
    value, where = _fields(record), record.where
    as_lists = [isinstance(value.get(key), list) for key in ("prompt", "completion")]
    if all(as_lists):
        prompt = _messages(value, "prompt", where=where, form=_OPENAI)
        completion = _messages(value, "completion", where=where, form=_OPENAI)
        return _conversation(prompt + completion, where=where, n_context=len(prompt))
    if any(as_lists):
        fix = "write both as text, or both as lists of messages"
        raise InputError("only one of 'prompt' and 'completion' is a list", where=where, fix=fix)
    errors: list[InputError] = []
    prompt_text = _collect(errors, value, "prompt", where=where)
    completion_text = _collect(errors, value, "completion", where=where)
    raise_collected(errors)
    return PromptCompletion(prompt_text, completion_text, where)


def _from_text(record: Record) -> Row:
    value = record.value if isinstance(record.value, dict) else {"text": record.value}
    return TextRow(_text(value, "text", where=record.where), record.where)


_CONVERTERS: dict[str, Callable[[Record], Row]] = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "prompt-completion": _from_prompt_completion,
    "text": _from_text,
}


# --- conversations ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ChatForm:
    """A chat format: how it names a message's role and content, and which roles it has."""

    role: str
    content: str
    roles: dict[str, str]


_OPENAI = _ChatForm("role", "content", OPENAI_ROLES)
_SHAREGPT = _ChatForm("from", "value", SHAREGPT_ROLES)


def _chat_key(value: dict[str, Any], preferred: str) -> str:
    """The key of the messages: both chat formats are found under either key in the wild; the preferred one is what an error
    names."""
    other = {"messages": "conversations", "conversations": "messages"}[preferred]
    return other if preferred not in value and other in value else preferred


def _conversation(messages: tuple[Message, ...], *, where: str, n_context: int = 0) -> Conversation:
    # An assistant message that opens the conversation answers nothing, so it is context as well (see `encode`).
    if not any(role == "assistant" for role, _ in messages[max(n_context, 1) :]):
        fix = "add an assistant message after a user message"
        raise InputError("no assistant message to learn from", where=where, fix=fix)
    return Conversation(messages, where, n_context)


def _messages(value: dict[str, Any], key: str, *, where: str, form: _ChatForm) -> tuple[Message, ...]:
    items = value.get(key)
    if not isinstance(items, list) or not items:
        found = "missing" if items is None else "empty" if items == [] else f"{type(items).__name__}, not a list"
        raise InputError(f"field '{key}' is {found}", where=where, fix="give a list of messages")
    errors: list[InputError] = []
    messages = []
    for index, item in enumerate(items):
        try:
            messages.append(_message(item, field=f"{key}[{index}]", where=where, form=form))
        except InputError as error:
            errors.append(error)
    raise_collected(errors)
    return tuple(messages)


def _message(item: object, *, field: str, where: str, form: _ChatForm) -> Message:
    if not isinstance(item, dict):
        fix = f'write {{"{form.role}": ..., "{form.content}": ...}}'
        raise InputError(f"field '{field}' is {type(item).__name__}, not an object", where=where, fix=fix)
    role = item.get(form.role)
    if not isinstance(role, str) or role not in form.roles:
        fix = "use " + ", ".join(form.roles)
        raise InputError(f"field '{field}.{form.role}' is {_shown(role)}", where=where, fix=fix)
    for call in ("tool_calls", "function_call"):
        if item.get(call):
            fix = "remove the row, or write the call as text in the content"
            raise InputError(f"field '{field}.{call}': tool calls are not supported", where=where, fix=fix)
    content = item.get(form.content)
    if isinstance(content, list):
        content = _joined_parts(content, field=f"{field}.{form.content}", where=where)
    return form.roles[role], _text({form.content: content}, form.content, where=where, prefix=f"{field}.")


def _joined_parts(parts: list[Any], *, field: str, where: str) -> str:
    """The text of a content list; only text parts are known."""
    texts = []
    for index, part in enumerate(parts):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = f"type {_shown(part.get('type'))}" if isinstance(part, dict) else type(part).__name__
            fix = 'use parts of the form {"type": "text", "text": "..."}'
            raise InputError(f"field '{field}[{index}]' is not a text part ({kind})", where=where, fix=fix)
        texts.append(part["text"])
    return "".join(texts)


# --- single fields ----------------------------------------------------------------------------------------------------


def _fields(record: Record) -> dict[str, Any]:
    assert isinstance(record.value, dict)  # `to_conversation` lets text through to `_from_text` only
    return record.value


def _shown(value: object) -> str:
    """A wrong value for an error message; its type alone where the value may be long or nested."""
    if value is None:
        return "missing"
    return repr(value[:40]) if isinstance(value, str) else type(value).__name__


def _collect(errors: list[InputError], value: dict[str, Any], key: str, *, where: str, may_be_blank: bool = False) -> str:
    try:
        return _text(value, key, where=where, may_be_blank=may_be_blank)
    except InputError as error:
        errors.append(error)
        return ""


def _text(value: dict[str, Any], key: str, *, where: str, prefix: str = "", may_be_blank: bool = False) -> str:
    """A text field that a tokenizer can take."""
    text, field = value.get(key), f"field '{prefix}{key}'"
    if text is None:
        raise InputError(f"{field} is missing", where=where, fix="add the text or remove the row")
    if not isinstance(text, str):
        raise InputError(f"{field} is {type(text).__name__}, not text", where=where, fix="write it as a string")
    if not text.strip() and not may_be_blank:
        raise InputError(f"{field} is empty", where=where, fix="add the text or remove the row")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can escape half of a surrogate pair; no tokenizer takes it
        raise InputError(f"{field} holds half a character (\\ud800 and the like)", where=where) from None
    return text
