"""The rows of a data set in their normal form: a conversation, a prompt with its completion, a text.

Rule: a row says all that its record said and is of use: who speaks, thoughts, tool calls, the tools on offer, and which
replies are learned. Rows compare by content alone; `where` and `field` say where a complaint about one belongs.

A preference is a pair of rows with one prompt, the chosen one first, or one row with a label; its rows are encoded as any.

Not here: how records of the formats become rows (`formats`), and how rows become text (`turns`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Message:
    """A message of a conversation.

    `thought` is reasoning that came in a field of its own. A tool call is `{"id", "type": "function", "function": {"name",
    "arguments"}}`, its arguments an object. `is_target` counts for assistant messages alone: whether this one is learned.
    """

    role: str
    content: str
    thought: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()
    name: str | None = None
    call_id: str | None = None
    is_target: bool = True
    field: str = field(default="", compare=False)  # its place in the row, such as messages[2]


AnyMessage = Message | tuple[str, str]  # whoever has no more than a role and a content gives the two


def as_messages(messages: Iterable[AnyMessage]) -> tuple[Message, ...]:
    """The messages, pairs of role and content among them."""
    return tuple(item if isinstance(item, Message) else Message(*item) for item in messages)


@dataclass(frozen=True)
class Conversation:
    """A conversation. Assistant messages among the first `n_context` are context: never trained on."""

    messages: tuple[Message, ...]
    where: str = field(compare=False)
    n_context: int = 0
    tools: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "messages", as_messages(self.messages))  # pairs are welcome

    @property
    def targets(self) -> tuple[int, ...]:
        """The messages to learn, by index. One that opens the conversation answers nothing, so it is context as well."""
        first = max(self.n_context, 1)
        return tuple(
            index
            for index, message in enumerate(self.messages)
            if index >= first and message.role == "assistant" and message.is_target
        )


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
Preferences = Literal["none", "pairs", "labels"]  # what a data set's rows say beside their text


@dataclass(frozen=True)
class Preference:
    """A chosen row and the rejected one with the same prompt; or one row, where only one of the two is there."""

    chosen: Row | None
    rejected: Row | None
    where: str

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows that are there, the chosen one first."""
        return tuple(row for row in (self.chosen, self.rejected) if row is not None)


AnyRow = Row | Preference
