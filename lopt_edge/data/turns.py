"""A conversation as one text, and where in it the replies to learn stand.

For the turn at message k,

    start = render(messages[:k], add_generation_prompt)     must be a prefix of the whole text; the turn starts after it
    turn  = render(messages[:k + 1])                        cut after the end token; the whole text must continue so

Both are checked. A template may break them for an earlier turn (Qwen3 strips earlier thoughts): then only the last turn is
learned, and the row is counted as such. It may break them for the last turn too, because the prompt opens a thought (R1,
QwQ) or because the system message moves when a reply follows (Mistral). Then the text is made of what generation would see:
the prompt, and after it the reply as the template renders it. If no reply can be told from its prompt, no mask would be
honest: an InputError names the template. What follows the last reply to learn is cut off.

`--think keep` puts earlier thoughts where the template leaves them out: each reply is rendered as the last one of its
conversation, and that text takes the place of the reply in the whole.

Not here: tokens (`encode`), whether all of the conversation stands in the text (`content`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lopt_edge.data import notes
from lopt_edge.data.rows import Conversation, Message
from lopt_edge.data.template import ChatTemplate
from lopt_edge.data.thoughts import CLOSING, OPENING, Think, has_thought, parts_of, stripped
from lopt_edge.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]  # characters [start, end)


@dataclass(frozen=True)
class ChatText:
    """The text of a conversation, the spans of its replies to learn, and what was done to get them (`notes`)."""

    text: str
    spans: tuple[Span, ...]
    notes: tuple[str, ...] = ()
    last_turn_only: bool = False


@dataclass(frozen=True)
class Renderer:
    """A template with its tokenizer, what `--think` says, and the conversation's tools."""

    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    think: Think | None = None

    def prompt(self, row: Conversation, k: int) -> str:
        """What generation sees before message k."""
        return self._text(row, row.messages[:k], generating=True)

    def through(self, row: Conversation, k: int) -> str:
        """The conversation up to and with message k."""
        return self._text(row, row.messages[: k + 1])

    def _text(self, row: Conversation, messages: Sequence[Message], *, generating: bool = False) -> str:
        return self.template.render(
            self.tokenizer, messages, tools=row.tools, add_generation_prompt=generating, where=row.where
        )

    def ended(self, turn: str) -> str:
        """A reply up to and with its end token, without what the template writes between turns."""
        tail = self.template.turn_tail
        return turn[: len(turn) - len(tail)] + self.template.turn_end if tail and turn.endswith(tail) else turn


def render_conversation(row: Conversation, renderer: Renderer) -> ChatText:
    """The text and the spans of a conversation. Raises InputError where no reply can be told from its prompt."""
    plain = stripped(row, renderer.think)
    plain = replace(plain, messages=plain.messages[: plain.targets[-1] + 1])
    found = _rendered(plain, renderer)
    if plain.messages != row.messages[: len(plain.messages)]:
        said = notes.THOUGHTS_STRIPPED if renderer.think == "strip" else notes.THOUGHTS_LAST
        found = replace(found, notes=(*found.notes, said))
    return found


def _rendered(row: Conversation, renderer: Renderer) -> ChatText:
    *earlier, last = row.targets
    text = renderer.through(row, last)
    if renderer.think == "keep" and any(_left_out(message, text) for message in row.messages[:last]):
        return _with_all_thoughts(row, renderer)
    span = _turn_span(row, last, text, renderer)
    found = ChatText(text, (span,)) if span else _as_generated(row, last, renderer)
    said = [notes.THOUGHTS_LEFT_OUT] if any(_left_out(message, text) for message in row.messages[:last]) else []
    spans = [_turn_span(row, k, text, renderer) for k in earlier] if span else []
    kept = tuple(span for span in spans if span is not None)
    if span and len(kept) == len(earlier):
        return replace(found, spans=(*kept, span), notes=(*found.notes, *said))
    said += [notes.REWRITTEN] if earlier and notes.SYSTEM_MOVED not in found.notes else []
    return replace(found, notes=(*found.notes, *said), last_turn_only=bool(earlier))


def _left_out(message: Message, text: str) -> bool:
    """Whether a message's thought is missing in the text."""
    return has_thought(message) and parts_of(message).thought.strip() not in text


def _turn_span(row: Conversation, k: int, text: str, renderer: Renderer) -> Span | None:
    """The place of the reply at message k in the text, its end token included; None if it cannot be found."""
    prompt = renderer.prompt(row, k)
    through = text if k == len(row.messages) - 1 else renderer.through(row, k)
    if not (text.startswith(prompt) and through.startswith(prompt)):
        return None
    turn = renderer.ended(through[len(prompt) :])
    if not turn or not text.startswith(turn, len(prompt)):
        return None
    return len(prompt), len(prompt) + len(turn)


# --- a text made of what generation sees ------------------------------------------------------------------------------


def _as_generated(row: Conversation, k: int, renderer: Renderer) -> ChatText:
    """The prompt of message k as generation sees it, and after it the reply. Raises InputError."""
    prompt = renderer.prompt(row, k)
    for reply, said in _replies(row, k, prompt, renderer):
        if reply:
            turn = renderer.ended(reply)
            return ChatText(prompt + turn, ((len(prompt), len(prompt) + len(turn)),), (said,))
    raise InputError(
        f"{renderer.template.where} is not prefix-preserving: the text of the conversation does not begin with the text "
        "of its prompt, so the reply cannot be told from the prompt",
        where=row.where,
        fix="give another template with --chat-template",
    )


def _replies(row: Conversation, k: int, prompt: str, renderer: Renderer) -> Iterator[tuple[str, str]]:
    """The reply's text by each way there is to find it ("" where it fails), and what to say of it."""
    yield _after_opening(row, k, prompt, renderer), notes.OPENED
    without_system = replace(row, messages=tuple(message for message in row.messages if message.role != "system"))
    moved = len(row.messages) - len(without_system.messages)
    if moved and k - moved >= 1:
        yield _alone(without_system, k - moved, renderer), notes.SYSTEM_MOVED


def _after_opening(row: Conversation, k: int, prompt: str, renderer: Renderer) -> str:
    """The reply after a prompt that opens a thought, which the template does not write for a reply that is there."""
    found = OPENING.search(prompt)
    text = renderer.through(row, k)
    if found is None or not text.startswith(prompt[: found.start()]):
        return ""
    reply, message, closing = text[found.start() :], row.messages[k], CLOSING[found[1]]
    parts = parts_of(message)
    head, mark, answer = reply.rpartition(closing)
    is_thought = mark and head.removeprefix(found[1]).strip() in ("", parts.thought.strip())
    answer = answer if is_thought else reply
    answer = answer.lstrip() if parts.thought or is_thought or closing in message.content else answer
    gap = prompt[found.end(1) :] or "\n"  # between the opening tag and the thought
    start = parts.thought.strip() + gap if parts.thought else gap
    return f"{start}{closing}\n\n{answer}"


def _alone(row: Conversation, k: int, renderer: Renderer) -> str:
    """The reply at message k as it stands after the prompt of this (shorter) conversation; "" if it does not."""
    try:
        prompt, text = renderer.prompt(row, k), renderer.through(row, k)
    except InputError:  # a template may refuse what is left
        return ""
    return text[len(prompt) :] if text.startswith(prompt) else ""


# --- thoughts in every turn -------------------------------------------------------------------------------------------


def _with_all_thoughts(row: Conversation, renderer: Renderer) -> ChatText:
    """The conversation with each reply as the template renders it when it is the last one."""
    replies = [k for k, message in enumerate(row.messages) if message.role == "assistant" and k > 0]
    marks = {k: f"lopt-edge-reply-{k}-" for k in replies}
    marked = replace(row, messages=tuple(
        replace(message, content=marks[k], thought="", tool_calls=()) if k in marks else message
        for k, message in enumerate(row.messages)
    ))  # fmt: skip
    rest = renderer.through(marked, len(row.messages) - 1)
    text, spans = "", []
    for k in replies:
        opening, turn = _as_last(row, k, renderer)
        lead = _as_last(marked, k, renderer)[1].partition(marks[k])[0]
        head, found, rest = rest.partition(marks[k])
        end = renderer.template.turn_end
        if not found or not turn.endswith(end) or not rest.startswith(end):
            raise InputError(
                f"{row.messages[k].field}: earlier thoughts cannot be kept, the chat template renders this reply otherwise",
                where=row.where,
                fix="use --think last or --think strip",
            )
        text += head.removesuffix(lead) + opening  # an empty thought, or the blank of Mistral, is part of the turn
        spans.append((k, (len(text), len(text) + len(turn))))
        text, rest = text + turn, rest[len(end) :]
    wanted = set(row.targets)
    return ChatText(text + rest, tuple(span for k, span in spans if k in wanted), (notes.THOUGHTS_KEPT,))


def _as_last(row: Conversation, k: int, renderer: Renderer) -> tuple[str, str]:
    """What the prompt of message k opens, and the reply with its thought and its end, as rendered when nothing follows."""
    shorter = replace(row, messages=row.messages[: k + 1])
    prompt, text = renderer.prompt(shorter, k), renderer.through(shorter, k)
    if not text.startswith(prompt):
        text = _as_generated(shorter, k, renderer).text
    opening = OPENING.search(prompt)
    return prompt[opening.start() :] if opening else "", renderer.ended(text[len(prompt) :])
