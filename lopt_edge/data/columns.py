"""Which fields of a row are known: what is used, what is left out because it carries no text to learn, what is refused.

Rule: a field that a user's file has is used, named as unused, or refused; never dropped in silence. The tables below are
the one place that says which. A field without a value (null, "", [] or {}) is as absent: tables give every row every
column. So is a text that stands in the row anyway (`prompt` beside `messages` is the first user message, in more than one
public set), or a list of messages that does (`messages` beside `chosen`). What `--ignore-columns` names is taken out of
rows and messages before anything else looks at them.

Not here: what the values must look like (`formats`, `messages`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lopt_edge.errors import InputError

MESSAGES = ("messages", "conversations")
SYSTEM = ("system", "system_prompt", "system_message")
TOOLS = ("tools", "functions")
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought")
# Whether a message (or a whole row) is learned, as tools of the field spell it: OpenAI and Mistral weight, ms-swift and
# xtuner loss, Axolotl train and training, torchtune masked.
TRAIN_FLAGS = ("weight", "loss", "train", "training", "trainable")
MASK_FLAGS = ("masked",)
FLAGS = (*TRAIN_FLAGS, *MASK_FLAGS)
CALLS = ("tool_calls", "function_call")

ROW_FIELDS: dict[str, frozenset[str]] = {
    "messages": frozenset({*MESSAGES, *SYSTEM, *TOOLS, *FLAGS}),
    "sharegpt": frozenset({*MESSAGES, *SYSTEM, *TOOLS, *FLAGS}),
    "alpaca": frozenset({"instruction", "input", "output", "history", *SYSTEM, *TOOLS, *FLAGS}),
    "prompt-completion": frozenset({"prompt", "completion", *FLAGS}),
    "prompt-completion of messages": frozenset({"prompt", "completion", *SYSTEM, *TOOLS, *FLAGS}),
    "text": frozenset({"text", *FLAGS}),
    "preference": frozenset({"prompt", "chosen", "rejected"}),
    "preference of messages": frozenset({"prompt", "chosen", "rejected", *SYSTEM, *TOOLS}),
    "unpaired-preference": frozenset({"prompt", "completion", "label"}),
    "unpaired-preference of messages": frozenset({"prompt", "completion", "label", *SYSTEM, *TOOLS}),
}
FORM_FIELDS = frozenset({*MESSAGES, "instruction", "input", "output", "prompt", "completion", "text"})
MESSAGE_FIELDS = frozenset({"name", "tool_call_id", *THOUGHTS, *CALLS, *FLAGS})  # beside the form's own two
# What says where a row is from or how it was rated, or only repeats the row.
HARMLESS = frozenset({
    "id", "_id", "idx", "index", "uid", "uuid", "guid", "row_id", "sample_id", "example_id", "question_id", "prompt_id",
    "message_id", "conversation_id", "conv_id", "thread_id", "parent_id", "message_tree_id", "user_id", "__index_level_0__",
    "source", "source_id", "dataset", "dataset_name", "data_source", "origin", "url", "link", "title", "topic", "author",
    "category", "categories", "subcategory", "tag", "tags", "task", "task_type", "task_name", "domain", "subject", "lang",
    "language", "license", "split", "created", "created_at", "created_time", "updated_at", "timestamp", "date", "time",
    "model", "model_name", "generator", "hash", "views", "avatar", "avatarUrl", "avatar_url", "score", "quality",
    "quality_score", "rating", "difficulty", "num_turns", "n_turns", "n_tokens", "num_tokens", "token_count", "length",
    "metadata", "meta", "comment", "annotator", "annotations", "parallel_tool_calls",
})  # fmt: skip
RATINGS = frozenset(f"{which}{joint}{what}" for which in ("chosen", "rejected") for joint in "_-"
                    for what in ("score", "rating", "model", "source"))  # fmt: skip
RATINGS |= {f"score_{which}" for which in ("chosen", "rejected")}
HARMLESS_HERE: dict[str, frozenset[str]] = {
    "alpaca": frozenset({"text"}),  # the whole row again, in its author's template
    "preference": RATINGS,
    "preference of messages": RATINGS,
}


def is_absent(value: object) -> bool:
    """Whether a field's value says nothing."""
    return value is None or (isinstance(value, (str, list, dict, tuple)) and len(value) == 0)


@dataclass
class _Unknown:
    """A field that nobody knows: where it stands, its first row, the number of rows, and of those without another fault."""

    form: str
    first: str
    n_rows: int = 0
    n_sound: int = 0


class Columns:
    """The fields of one data file as they are met: what is ignored, what is harmless, what nobody knows."""

    def __init__(self, ignored: Iterable[str] = (), *, is_named: bool = False) -> None:
        self._ignored, self._is_named = frozenset(ignored), is_named
        self._other = FORM_FIELDS if is_named else frozenset()  # who names the form has chosen among its fields
        self._met: set[str] = set()  # of the ignored
        self._harmless: dict[str, None] = {}
        self._unknown: dict[str, _Unknown] = {}
        self._in_row: set[str] = set()  # unknown ones of the row that is read now

    def anew(self) -> Columns:
        """The same with nothing met yet."""
        return Columns(self._ignored, is_named=self._is_named)

    @property
    def unused(self) -> tuple[str, ...]:
        """The harmless fields that were met and are not used, in order."""
        return tuple(self._harmless)

    @property
    def ignored(self) -> tuple[str, ...]:
        """The fields that were left out because --ignore-columns names them."""
        return tuple(sorted(self._met))

    @property
    def without_effect(self) -> tuple[str, ...]:
        """What --ignore-columns names and no row has."""
        return tuple(sorted(self._ignored - self._met))

    def of_row(self, value: Mapping[str, Any], form: str, *, where: str) -> dict[str, Any]:
        """The row's fields that are used, without a value or not; what is unknown is kept for `unknown`."""
        known = ROW_FIELDS[form]
        left = self._kept(value)
        texts, values = _texts(left, known), [left[name] for name in known & left.keys()]
        for name in [name for name in left if name not in known]:
            if name in HARMLESS or name in HARMLESS_HERE.get(form, ()) or name in self._other:
                self._harmless[name] = None
            elif not (is_absent(left[name]) or _repeats(left[name], texts, values)):
                self._note_unknown(name, f"a row of {form}", where=where)
            del left[name]
        return left

    def of_message(self, value: Mapping[str, Any], own: tuple[str, str], *, where: str) -> dict[str, Any]:
        """A message's fields that are used; `own` are the form's names of role and content."""
        left = self._kept(value)
        for name in [name for name in left if name not in MESSAGE_FIELDS and name not in own]:
            if name in HARMLESS:
                self._harmless[name] = None
            elif not is_absent(left[name]):
                self._note_unknown(name, "a message", where=where)
            del left[name]
        return left

    def end_row(self, *, is_sound: bool) -> None:
        """A row was read; a sound one has no fault but perhaps fields that nobody knows."""
        for name in self._in_row:
            self._unknown[name].n_rows += 1
            self._unknown[name].n_sound += is_sound
        self._in_row.clear()

    def unknown(self) -> list[InputError]:
        """An error for each field that nobody knows, with its first place and the number of rows.

        A field that only faulty rows have is left to the faults that those rows have already.
        """
        return [
            InputError(
                f"field {name[:80]!r} of {one.form} is not known, so what it means would be lost ({_rows(one.n_rows)})",
                where=one.first,
                fix=f"leave it out with --ignore-columns {name}, or give it a name of docs/usage.md",
            )
            for name, one in self._unknown.items()
            if one.n_sound
        ]

    def _kept(self, value: Mapping[str, Any]) -> dict[str, Any]:
        self._met |= self._ignored & value.keys()
        return {str(name): item for name, item in value.items() if name not in self._ignored}

    def _note_unknown(self, name: str, form: str, *, where: str) -> None:
        self._unknown.setdefault(name, _Unknown(form, where))
        self._in_row.add(name)


def _repeats(value: object, texts: set[str], values: list[Any]) -> bool:
    """Whether a field only says again what a known one says: a text, or the same messages."""
    return value.strip() in texts if isinstance(value, str) else isinstance(value, list) and value in values


def _rows(count: int) -> str:
    return f"{count:,} rows" if count > 1 else "1 row"


def _texts(value: Mapping[str, Any], known: frozenset[str]) -> set[str]:
    """The texts that a row holds in its known fields, in messages too."""
    found = set()
    for name in known & value.keys():
        items = value[name] if isinstance(value[name], list) else [{"content": value[name]}]
        for item in items:
            text = (item.get("content") or item.get("value")) if isinstance(item, dict) else None
            if isinstance(text, str) and text.strip():
                found.add(text.strip())
    return found
