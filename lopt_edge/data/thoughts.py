"""Thoughts: what a reasoning model writes between its think tags before it answers.

A thought comes in a field of its own (`Message.thought`) or inside the content, between tags or before a closing tag alone
(as R1's templates leave it, the opening tag being part of the prompt). Rule: `--think` decides what happens to them, and
what the template does without it is noted. `strip` takes all of them out, `last` all but the last learned reply's, `keep`
leaves them in every turn even where the template would not (see `turns`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal, get_args

from lopt_edge.data.rows import Conversation, Message

Think = Literal["keep", "strip", "last"]
THINK: tuple[str, ...] = get_args(Think)
# Opening and closing tag of the models that write thoughts into the text (Qwen, DeepSeek; Magistral; Seed-OSS).
TAGS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))
OPENING = re.compile(r"(" + "|".join(re.escape(opening) for opening, _ in TAGS) + r")\s*\Z")
CLOSING = dict(TAGS)


@dataclass(frozen=True)
class Parts:
    """A reply in two parts: the thought without its tags, and the answer."""

    thought: str
    answer: str


def parts_of(message: Message) -> Parts:
    """The thought and the answer of a message, wherever the thought stands."""
    if message.thought:
        return Parts(message.thought, message.content)
    return split_content(message.content)


def split_content(content: str) -> Parts:
    """A text split at its first closing tag; no thought where it has none."""
    for opening, closing in TAGS:
        head, mark, answer = content.partition(closing)
        if mark:
            return Parts(head.strip().removeprefix(opening).strip(), answer.lstrip())
    return Parts("", content)


def has_thought(message: Message) -> bool:
    """Whether an assistant message thinks."""
    return message.role == "assistant" and bool(parts_of(message).thought)


def without_thought(message: Message) -> Message:
    """The message with its answer alone."""
    return replace(message, thought="", content=parts_of(message).answer) if has_thought(message) else message


def stripped(row: Conversation, think: Think | None) -> Conversation:
    """The conversation without the thoughts that `think` takes out; after `last` only the last reply is learned."""
    if think not in ("strip", "last") or not row.targets:
        return row
    last = row.targets[-1]
    kept = last if think == "last" else -1
    messages = tuple(message if index == kept else without_thought(message) for index, message in enumerate(row.messages))
    if think == "last" and messages != row.messages:
        messages = tuple(replace(message, is_target=index == last) for index, message in enumerate(messages))
    return replace(row, messages=messages)
