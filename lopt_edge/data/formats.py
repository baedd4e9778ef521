"""Turns records of the data formats into one of three row types, or into a preference between two.

    messages           {"messages": [{"role": "user", "content": "..."}, ...]}          -> Conversation
    sharegpt           {"conversations": [{"from": "human", "value": "..."}, ...]}      -> Conversation
    alpaca             {"instruction": "...", "input": "..." (optional), "output": ""}  -> Conversation
    prompt-completion  {"prompt": "...", "completion": "..."}                           -> PromptCompletion
                       (or two lists of messages, the form of TRL)                      -> Conversation
    text               {"text": "..."}, or a whole .txt file                            -> TextRow
    preference         {"prompt": "...", "chosen": "...", "rejected": "..."}            -> Preference of two rows
                       (texts or lists of messages; without a prompt it is what both replies begin with, as TRL has it)
    unpaired-preference  {"prompt": "...", "completion": "...", "label": true}          -> Preference of one row

Conversations may have `system` and `tools` beside them, alpaca rows a `history` of earlier turns, which are context.

Rule: nothing is guessed about a row and nothing is dropped silently. The format is decided once, from the first record and
from whether preferences are asked for, with its reason; a row that does not fit it is a fault that names the place and the
field. Faults are collected over all rows. Refused: fields that `columns` does not know, unknown roles, empty or non-text
content, a conversation without an assistant message that answers something and is learned.

Not here: single messages (`messages`), chat templates and tokens (`template`, `turns`, `encode`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from itertools import takewhile
from os.path import commonprefix
from typing import Any, Literal, get_args

from lopt_edge.data import columns
from lopt_edge.data.columns import Columns, is_absent
from lopt_edge.data.faults import Faults
from lopt_edge.data.fields import collected, shown, text_field
from lopt_edge.data.messages import NO, OPENAI, SHAREGPT, YES, ChatForm, Reading, flag_of, messages_of
from lopt_edge.data.notes import Notes
from lopt_edge.data.records import Record
from lopt_edge.data.rows import AnyRow, Conversation, Message, Preference, PromptCompletion, Row, TextRow
from lopt_edge.data.tool_calls import parsed, tools_of
from lopt_edge.errors import InputError, raise_collected, together

DataFormat = Literal["messages", "prompt-completion", "alpaca", "sharegpt", "text", "preference", "unpaired-preference"]
DATA_FORMATS: tuple[str, ...] = get_args(DataFormat)

# --- which format -----------------------------------------------------------------------------------------------------


def detect_format(
    records: Sequence[Record], *, preferred: bool = False, ignored: Collection[str] = ()
) -> tuple[DataFormat, str]:
    """The format of the first record, and why; the other records must follow it.

    `preferred`: preferences are asked for, so they come before whatever else is in the row. `ignored` fields are not there.
    """
    first = records[0]
    if isinstance(first.value, str):
        return "text", "a plain text file"
    has = first.value.keys() - set(ignored)
    pair = {"chosen", "rejected"} <= has
    if preferred and pair:
        return "preference", "the first row has 'chosen' and 'rejected'"
    if preferred and {"prompt", "completion", "label"} <= has:
        return "unpaired-preference", "the first row has 'prompt', 'completion' and 'label'"
    for key in ("messages", "conversations"):
        if key in has:
            pairs = _first_item_keys(first.value[key], where=first.where)
            if "from" in pairs or (key == "conversations" and "role" not in pairs):
                return "sharegpt", f"the first row has '{key}' with from/value pairs"
            return "messages", f"the first row has '{key}' with role/content pairs"
    if "instruction" in has and "output" in has:
        return "alpaca", "the first row has 'instruction' and 'output'"
    if "prompt" in has and "completion" in has:
        return "prompt-completion", "the first row has 'prompt' and 'completion'"
    if "text" in has:
        return "text", "the first row has 'text'"
    if pair:
        return "preference", "the first row has 'chosen' and 'rejected'"
    fields = ", ".join(repr(str(key)) for key in list(first.value)[:12]) or "no field at all"
    raise InputError(
        f"the data format is not recognised; the first row has {fields}",
        where=first.where,
        fix="use 'messages', 'conversations', 'instruction' + 'output', 'prompt' + 'completion', 'text' or, with an "
        "objective of preferences, 'chosen' + 'rejected'; --columns prompt=question,completion=answer takes others",
    )


def _first_item_keys(value: object, *, where: str) -> frozenset[str]:
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        value = parsed(value, field="messages", where=where)
    first = value[0] if isinstance(value, list) and value else None
    return frozenset(first) if isinstance(first, dict) else frozenset()


def to_rows(
    records: Sequence[Record], *, data_format: DataFormat, fields: Columns | None = None, notes: Notes | None = None
) -> list[AnyRow]:
    """The records as rows. Raises InputErrors: all faulty records are reported together.

    `fields` says what is ignored and learns which fields there are, `notes` takes what the file's owner should know.
    """
    maker = RowMaker(data_format, fields or Columns(), notes or Notes())
    rows = maker.rows(records)
    maker.finish()
    return rows


class RowMaker:
    """Makes rows of the records of one source, some at a time; what is wrong is kept until all have been seen."""

    def __init__(self, data_format: DataFormat, fields: Columns, notes: Notes) -> None:
        self.format, self.fields, self.notes = data_format, fields, notes
        self._faults = Faults()

    def rows(self, records: Iterable[Record]) -> list[AnyRow]:
        """The rows of those records that are sound."""
        found = list[AnyRow]()
        for record in records:
            try:
                found.append(_converted(record, self.format, Reading(record.where, self.fields, self.notes)))
                self.fields.end_row(is_sound=True)
            except InputError as error:
                self._faults.add(error)
                self.fields.end_row(is_sound=False)
        return found

    def finish(self) -> None:
        """Raise InputError(s) for all records that were not sound, and for fields that nobody knows."""
        for unknown in self.fields.unknown():
            self._faults.add(unknown)
        self._faults.raise_any()


def to_conversation(record: Record, data_format: DataFormat) -> AnyRow:
    """The record in its normal form. Raises InputError."""
    return to_rows([record], data_format=data_format)[0]


def _converted(record: Record, data_format: DataFormat, reading: Reading) -> AnyRow:
    if data_format not in _CONVERTERS:
        raise InputError(f"unknown data format {data_format!r}", fix="use one of " + ", ".join(DATA_FORMATS))
    value = record.value
    if isinstance(value, str):
        if data_format != "text":
            fix = "leave the data format to be detected, or use 'text'"
            raise InputError(f"a plain text file is not '{data_format}' data", where=record.where, fix=fix)
        value = {"text": value}
    of_messages = any(isinstance(value.get(key), list) for key in ("prompt", "completion", "chosen", "rejected"))
    named = f"{data_format} of messages"
    form = named if of_messages and named in columns.ROW_FIELDS else data_format
    value = reading.columns.of_row(value, form, where=record.where)
    if flag_of(value, field="", where=record.where) is False:
        raise InputError("the row says that it is not to be learned", where=record.where, fix="remove the row")
    return _CONVERTERS[data_format](value, reading)


# --- one converter per format -----------------------------------------------------------------------------------------


def _from_messages(value: dict[str, Any], reading: Reading) -> Row:
    return _from_chat(value, "messages", OPENAI, reading)


def _from_sharegpt(value: dict[str, Any], reading: Reading) -> Row:
    return _from_chat(value, "conversations", SHAREGPT, reading)


def _from_chat(value: dict[str, Any], preferred: str, form: ChatForm, reading: Reading) -> Row:
    # Both chat formats are found under either key in the wild; the preferred one is what an error names.
    (other,) = set(columns.MESSAGES) - {preferred}
    key = other if preferred not in value and other in value else preferred
    messages = messages_of(value.get(key), key, form, reading)
    return _conversation(messages, value, reading)


def _from_alpaca(value: dict[str, Any], reading: Reading) -> Row:
    where = reading.where
    errors: list[InputError] = []
    instruction = collected(errors, value, "instruction", where=where)
    extra = "" if is_absent(value.get("input")) else collected(errors, value, "input", where=where, may_be_blank=True)
    output = collected(errors, value, "output", where=where)
    earlier: tuple[Message, ...] = ()
    try:
        earlier = _history(value.get("history"), reading)
    except InputError as error:
        errors.append(error)
    raise_collected(errors)
    user = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    pair = (Message("user", user, field="instruction"), Message("assistant", output, field="output"))
    return _conversation((*earlier, *pair), value, reading, n_context=len(earlier))


def _history(value: object, reading: Reading) -> tuple[Message, ...]:
    """The earlier turns of an alpaca row, [[instruction, output], ...]."""
    if is_absent(value):
        return ()
    value = parsed(value, field="history", where=reading.where)
    found: list[Message] = []
    for index, turn in enumerate(value if isinstance(value, list) else [value]):
        if not isinstance(turn, list) or len(turn) != 2:
            fix = "write [[instruction, output], ...]"
            raise InputError(f"field 'history[{index}]' is not a pair of texts", where=reading.where, fix=fix)
        for role, text in zip(("user", "assistant"), turn, strict=True):
            content = text_field({role: text}, role, where=reading.where, prefix=f"history[{index}].")
            found.append(Message(role, content, field=f"history[{index}]"))
    return tuple(found)


def _from_prompt_completion(value: dict[str, Any], reading: Reading) -> Row:
    where = reading.where
    as_lists = [isinstance(value.get(key), list) for key in ("prompt", "completion")]
    if all(as_lists):
        prompt = messages_of(value["prompt"], "prompt", OPENAI, reading)
        completion = messages_of(value["completion"], "completion", OPENAI, reading)
        return _conversation(prompt + completion, value, reading, n_context=len(prompt))
    if any(as_lists):
        fix = "write both as text, or both as lists of messages"
        raise InputError("only one of 'prompt' and 'completion' is a list", where=where, fix=fix)
    errors: list[InputError] = []
    prompt_text = collected(errors, value, "prompt", where=where)
    completion_text = collected(errors, value, "completion", where=where)
    raise_collected(errors)
    return PromptCompletion(prompt_text, completion_text, where)


def _from_text(value: dict[str, Any], reading: Reading) -> Row:
    return TextRow(text_field(value, "text", where=reading.where), reading.where)


# --- preferences ------------------------------------------------------------------------------------------------------


def _from_preference(value: dict[str, Any], reading: Reading) -> Preference:
    replies = [value.get("chosen"), value.get("rejected")]
    if all(isinstance(reply, list) for reply in replies):
        return _pair_of_messages(value, reading)
    if isinstance(value.get("prompt"), list) or any(isinstance(reply, list) for reply in replies):
        fix = "write prompt, chosen and rejected as texts, or all as lists of messages"
        raise InputError("only some of 'prompt', 'chosen' and 'rejected' are lists", where=reading.where, fix=fix)
    errors: list[InputError] = []
    chosen, rejected = (collected(errors, value, key, where=reading.where) for key in ("chosen", "rejected"))
    implicit = is_absent(value.get("prompt"))
    prompt = "" if implicit else collected(errors, value, "prompt", where=reading.where)
    raise_collected(errors)
    if implicit:
        prompt = _common_text(chosen, rejected, reading)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    pair = PromptCompletion(prompt, chosen, reading.where), PromptCompletion(prompt, rejected, reading.where)
    return Preference(*pair, reading.where)


def _common_text(chosen: str, rejected: str, reading: Reading) -> str:
    """What both texts begin with, up to a blank: a word is not cut in two. Raises InputError where there is none."""
    common = commonprefix([chosen, rejected])  # noqa: RUF071  # letters are what is meant
    prompt = common[: max((at for at, letter in enumerate(common) if letter.isspace()), default=0)]
    if not prompt.strip() or not (chosen[len(prompt) :].strip() and rejected[len(prompt) :].strip()):
        what = "there is no 'prompt', and 'chosen' and 'rejected' do not begin with the same words and go on differently"
        raise InputError(what, where=reading.where, fix="add the prompt")
    return prompt


def _pair_of_messages(value: dict[str, Any], reading: Reading) -> Preference:
    keys = ("chosen", "rejected")
    chosen, rejected = together(*(partial(messages_of, value[key], key, OPENAI, reading) for key in keys))
    prompt = value.get("prompt")
    if isinstance(prompt, list) and prompt:
        context = messages_of(prompt, "prompt", OPENAI, reading)
        n_context, chosen, rejected = len(context), context + chosen, context + rejected
    else:
        n_context = sum(
            1 for _ in takewhile(lambda both: both[0] == both[1], zip(chosen[:-1], rejected[:-1], strict=False))
        )
        if not n_context:
            what = "'chosen' and 'rejected' do not begin with the same message, so there is no prompt"
            raise InputError(what, where=reading.where, fix="add the prompt as a list of messages")
        texts = {message.content.strip() for message in chosen[:n_context]}
        if not is_absent(prompt) and (not isinstance(prompt, str) or prompt.strip() not in texts):
            what = "'prompt' is none of the messages that 'chosen' and 'rejected' begin with"
            raise InputError(what, where=reading.where, fix="write it as a list of messages, or --ignore-columns prompt")
    both = (chosen, rejected)
    pair = together(*(partial(_conversation, reply, value, reading, n_context=n_context) for reply in both))
    return Preference(pair[0], pair[1], reading.where)


def _from_unpaired(value: dict[str, Any], reading: Reading) -> Preference:
    label = value.get("label")
    label = label.lower() if isinstance(label, str) else label
    if isinstance(label, (list, dict)) or label not in (*YES, *NO):
        fix = "write true for a reply that is wanted, false for one that is not"
        raise InputError(f"field 'label' is {shown(label)}, neither yes nor no", where=reading.where, fix=fix)
    row = _from_prompt_completion(value, reading)
    return Preference(row, None, reading.where) if label in YES else Preference(None, row, reading.where)


_CONVERTERS: dict[str, Callable[[dict[str, Any], Reading], AnyRow]] = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "prompt-completion": _from_prompt_completion,
    "text": _from_text,
    "preference": _from_preference,
    "unpaired-preference": _from_unpaired,
}


# --- what stands beside the messages ----------------------------------------------------------------------------------


def _conversation(
    messages: tuple[Message, ...], value: dict[str, Any], reading: Reading, *, n_context: int = 0
) -> Conversation:
    """The conversation with the row's system message and tools. Raises InputError where nothing in it is learned."""
    system = _system(value, messages, where=reading.where)
    found = Conversation(
        (*system, *messages), reading.where, n_context + len(system) if n_context else 0, _tools(value, reading)
    )
    if not found.targets:
        answers = any(message.role == "assistant" for message in found.messages[max(found.n_context, 1) :])
        what = "every assistant message is marked as not to be learned" if answers else "no assistant message to learn from"
        fix = "remove the row" if answers else "add an assistant message after a user message"
        raise InputError(what, where=reading.where, fix=fix)
    return found


def _system(value: dict[str, Any], messages: tuple[Message, ...], *, where: str) -> tuple[Message, ...]:
    """The system message of a field of its own, unless the conversation begins with the same."""
    texts = {
        name: text_field(value, name, where=where, may_be_blank=True)
        for name in columns.SYSTEM
        if not is_absent(value.get(name))
    }
    texts = {name: text for name, text in texts.items() if text.strip()}
    first = {messages[0].field: messages[0].content} if messages[0].role == "system" else {}
    if len({text.strip() for text in (*texts.values(), *first.values())}) > 1:
        names = ", ".join(f"'{name}'" for name in (*texts, *first))
        raise InputError(f"several system messages: {names}", where=where, fix="keep one of them")
    return tuple(Message("system", text, field=name) for name, text in texts.items())[:1] if not first else ()


def _tools(value: dict[str, Any], reading: Reading) -> tuple[dict[str, Any], ...]:
    names = [name for name in columns.TOOLS if not is_absent(value.get(name))]
    if len(names) > 1:
        raise InputError(f"both {names[0]!r} and {names[1]!r} name tools", where=reading.where, fix="keep one of them")
    return tools_of(value[names[0]], field=names[0], where=reading.where) if names else ()
