"""A row as one text with the spans of what is learned, ready for the tokenizer.

Rule: what a row holds beyond plain words (control tokens that somebody typed, an end token at the end of a reply) is seen
here, before any template runs, and noted. With `--escape-special-tokens` typed tokens are to be encoded as text: `cuts`
says where.

Not here: turns (`turns`), tokens (`encode`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lopt_edge.data import notes
from lopt_edge.data.content import ContentCheck
from lopt_edge.data.control_tokens import ControlTokens
from lopt_edge.data.notes import Notes
from lopt_edge.data.rows import Conversation, Message, PromptCompletion, Row, TextRow
from lopt_edge.data.template import ChatTemplate
from lopt_edge.data.thoughts import Think
from lopt_edge.data.turns import Renderer, Span, render_conversation
from lopt_edge.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Rendered:
    """A row as text with its target spans, before the tokenizer."""

    text: str
    spans: tuple[Span, ...]
    where: str
    lead: bool  # put the tokenizer's own leading tokens (bos) before it
    append_eos: bool
    windows: bool = False  # cut a long row into windows instead of truncating it
    last_turn_only: bool = False
    cuts: tuple[int, ...] = ()  # characters before which the text is encoded apart
    prompt_end: int | None = None  # of a prompt with its completion


class RowRenderer:
    """Turns rows into texts with one tokenizer and template; notes what their owner should know."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: ChatTemplate | None,
        *,
        think: Think | None = None,
        escape: bool = False,
        notes: Notes | None = None,
    ) -> None:
        self._tokenizer, self._template, self._escape, self._notes = tokenizer, template, escape, notes or Notes()
        self._control = ControlTokens.of(tokenizer)
        self._renderer = Renderer(tokenizer, template, think) if template is not None else None
        self._check = ContentCheck(self._renderer) if self._renderer is not None else None

    def rendered(self, row: Row) -> Rendered:
        """The row's text and spans. Raises InputError."""
        if isinstance(row, Conversation):
            return self._conversation(row)
        if not self._tokenizer.eos_token:
            fix = "set eos_token in tokenizer_config.json; without it the model cannot learn to stop"
            raise InputError("the tokenizer has no end-of-sequence token", where="tokenizer", fix=fix)
        bos, eos = self._tokenizer.bos_token or "", self._tokenizer.eos_token  # at the ends these are not doubled
        if isinstance(row, PromptCompletion):
            prompt = self._seen(row.prompt, row.where, start=bos)
            text = prompt + self._seen(row.completion, row.where, end=eos)
            found = Rendered(
                text, ((len(prompt), len(text)),), row.where, lead=True, append_eos=True, prompt_end=len(prompt)
            )
        else:
            assert isinstance(row, TextRow)
            text = self._seen(row.text, row.where, start=bos, end=eos)
            found = Rendered(text, ((0, len(text)),), row.where, lead=True, append_eos=True, windows=True)
        return self._written_out(found)

    def _conversation(self, row: Conversation) -> Rendered:
        assert self._renderer is not None and self._check is not None, "a conversation needs a chat template"
        template = self._renderer.template
        if not self._escape:
            row = self._without_typed_ends(row, template)
        row = replace(row, messages=tuple(self._seen_message(message, row.where) for message in row.messages))
        found = render_conversation(row, self._renderer)
        self._check.check(row, found.text)
        for said in found.notes:
            self._notes.add(said, row.where)
        append_eos = template.end_token is None
        text = found.text[: found.spans[-1][1]] if append_eos else found.text
        return self._written_out(
            Rendered(text, found.spans, row.where, lead=False, append_eos=append_eos, last_turn_only=found.last_turn_only)
        )

    def _without_typed_ends(self, row: Conversation, template: ChatTemplate) -> Conversation:
        """The conversation without end tokens at the end of replies: the template writes them."""
        end = template.end_token
        messages = []
        for message in row.messages:
            content = message.content.rstrip()
            if end and message.role == "assistant" and content.endswith(end) and content != end:
                self._notes.add(notes.END_TYPED, row.where)
                message = replace(message, content=content.removesuffix(end))
            messages.append(message)
        return replace(row, messages=tuple(messages))

    def _seen(self, text: str, where: str, *, start: str = "", end: str = "") -> str:
        """The text, its typed control tokens noted, and hidden where they are to be encoded as text.

        Without escaping, tokens that belong at the text's `start` and `end` are none to speak of.
        """
        inner = text if self._escape else text.rstrip().removesuffix(end).removeprefix(start)
        if not self._control.typed(inner):
            return text
        self._notes.add(notes.ESCAPED if self._escape else notes.TYPED, where)
        return self._control.hidden(text, where=where) if self._escape else text

    def _seen_message(self, message: Message, where: str) -> Message:
        def seen(text: str) -> str:
            return self._seen(text, where)

        calls = tuple(_mapped(call, seen) for call in message.tool_calls)
        return replace(message, content=seen(message.content), thought=seen(message.thought), tool_calls=calls)

    def _written_out(self, found: Rendered) -> Rendered:
        if not self._escape:
            return found
        places = [(found.prompt_end, found.prompt_end)] if found.prompt_end is not None else []
        text, moved, cuts = self._control.shown(found.text, (*found.spans, *places))
        n_spans = len(found.spans)
        prompt_end = moved[n_spans][0] if places else None
        return replace(found, text=text, spans=moved[:n_spans], cuts=cuts, prompt_end=prompt_end)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """The value of JSON with every text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    return [_mapped(item, change) for item in value] if isinstance(value, list) else value
