"""Rows to token ids with a mask of targets.

An `Example` holds the ids of one sequence and, for each token, whether it is a target: whether the model is trained to
predict it from the tokens before. The first token of a sequence has nothing before it and is never a target.

    text               every token, eos at the end; a long row is cut into consecutive windows, nothing overlaps
    prompt-completion  the completion and the eos after it
    conversation       the assistant turns, each with the token that ends it (so that a base model learns to stop)

Rule: assistant turns are found in the text, not in the tokens. For the turn at message k,

    start = render(messages[:k], add_generation_prompt)     must be a prefix of the whole text; the turn starts after it
    turn  = render(messages[:k + 1])                        cut after the end token; the whole text must continue so

Both are checked. A template may break them for an earlier turn (Qwen3 strips earlier thinking, Mistral moves the
system message): then only the last turn is trained on, and the row is counted as such. If the last turn breaks them
too, no mask would be honest: an `InputError` names the template. What follows the last assistant message is cut off,
and an assistant message that opens a conversation is context, since no prompt comes before it.

The whole text is tokenised once and character spans are mapped to tokens, so the tokens are exactly those of
`apply_chat_template`. A token that straddles the start of a turn is a target if what it takes from the prompt is only
white space (" Yes" after "Answer:"), else not. Conversations and completions longer than `max_seq_len` lose their
right end; what is left without any target is dropped.

Not here: templates (`template`), batches (`order`).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lopt_edge.data.faults import Faults
from lopt_edge.data.formats import Conversation, PromptCompletion, Row, TextRow
from lopt_edge.data.long_text import long_text_ids
from lopt_edge.data.template import ChatTemplate, leading_ids
from lopt_edge.data.tokenizer_faults import tokenizer_faults
from lopt_edge.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Per tokenizer call: enough rows to use every core, and few enough characters that its offsets stay small.
BATCH_ROWS, BATCH_CHARACTERS = 256, 500_000
Span = tuple[int, int]  # characters [start, end)


@dataclass(frozen=True)
class Example:
    """A training sequence. `supervised[t]` is 1 where token t is a target."""

    input_ids: array[int]
    supervised: bytes
    where: str
    truncated: bool = False
    last_turn_only: bool = False

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def n_supervised(self) -> int:
        """The number of targets."""
        return sum(self.supervised)


@dataclass(frozen=True)
class _Rendered:
    """A row as text with its target spans, before the tokenizer."""

    text: str
    spans: tuple[Span, ...]
    where: str
    lead: bool  # put the tokenizer's own leading tokens (bos) before it
    append_eos: bool
    windows: bool = False  # cut a long row into windows instead of truncating it
    last_turn_only: bool = False


def encode_row(
    row: Row, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None, max_seq_len: int
) -> list[Example]:
    """The examples of one row: one, several for a long text, none if no target is left."""
    return encode_rows([row], tokenizer, template=template, max_seq_len=max_seq_len)[0]


def encode_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, template: ChatTemplate | None, max_seq_len: int
) -> list[list[Example]]:
    """The examples of every row, in order. Rows that cannot be rendered are reported together, as InputErrors."""
    if max_seq_len < 2:
        raise InputError(f"a sequence of {max_seq_len} tokens has no target", where="max-seq-len", fix="use 2 or more")
    if not tokenizer.is_fast:
        fix = "use a model that ships tokenizer.json"
        raise InputError("the tokenizer has no fast form, so targets cannot be located", where="tokenizer", fix=fix)
    faults, rendered = Faults(), []
    for row in rows:
        try:
            rendered.append(_render(row, tokenizer, template))
        except InputError as error:
            faults.add(error)
    faults.raise_any()
    with _encoding("tokenizer"):
        lead = leading_ids(tokenizer)
    encoded = []
    for batch in _batches(rendered):
        first, last = batch[0].where, batch[-1].where
        with _encoding(first if first == last else f"{first} to {last}"):
            tokenised = list(_tokenise(batch, tokenizer))
        for item, ids, mask in tokenised:
            encoded.append(_finish(item, ids, mask, lead=lead, eos=tokenizer.eos_token_id, max_seq_len=max_seq_len))
    return encoded


# --- rows to text and spans -------------------------------------------------------------------------------------------


def _render(row: Row, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None) -> _Rendered:
    if isinstance(row, Conversation):
        assert template is not None, "a conversation needs a chat template"
        return _render_conversation(row, tokenizer, template)
    if tokenizer.eos_token_id is None:
        fix = "set eos_token in tokenizer_config.json; without it the model cannot learn to stop"
        raise InputError("the tokenizer has no end-of-sequence token", where="tokenizer", fix=fix)
    if isinstance(row, PromptCompletion):
        text = row.prompt + row.completion
        return _Rendered(text, ((len(row.prompt), len(text)),), row.where, lead=True, append_eos=True)
    assert isinstance(row, TextRow)
    return _Rendered(row.text, ((0, len(row.text)),), row.where, lead=True, append_eos=True, windows=True)


def _render_conversation(row: Conversation, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> _Rendered:
    roles = [role for role, _ in row.messages]
    last = len(roles) - 1 - roles[::-1].index("assistant")
    messages = row.messages[: last + 1]
    turns = [k for k in range(max(row.n_context, 1), last + 1) if roles[k] == "assistant"]
    text = template.render(tokenizer, messages, where=row.where)
    spans = [_turn_span(messages, k, text, tokenizer=tokenizer, template=template, where=row.where) for k in turns]
    if not spans or spans[-1] is None:
        raise InputError(
            f"{template.where} is not prefix-preserving: the text of the conversation does not begin with the text of "
            "its prompt, so the reply cannot be told from the prompt",
            where=row.where,
            fix="give another template with --chat-template",
        )
    kept = [span for span in spans if span is not None]
    last_turn_only = len(kept) < len(spans)
    if last_turn_only:
        kept = kept[-1:]
    append_eos = template.end_token is None
    text = text[: kept[-1][1]] if append_eos else text
    return _Rendered(text, tuple(kept), row.where, lead=False, append_eos=append_eos, last_turn_only=last_turn_only)


def _turn_span(
    messages: Sequence[tuple[str, str]],
    k: int,
    text: str,
    *,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    where: str,
) -> Span | None:
    """The place of the assistant turn at message k in the text, its end token included; None if it cannot be found."""
    prompt = template.render(tokenizer, messages[:k], add_generation_prompt=True, where=where)
    is_last = k == len(messages) - 1
    through = text if is_last else template.render(tokenizer, messages[: k + 1], where=where)
    if not (text.startswith(prompt) and through.startswith(prompt)):
        return None
    turn = through[len(prompt) :]
    if template.turn_tail and turn.endswith(template.turn_tail):
        turn = turn[: len(turn) - len(template.turn_tail)] + template.turn_end
    if not turn or not text.startswith(turn, len(prompt)):
        return None
    return len(prompt), len(prompt) + len(turn)


# --- text and spans to tokens -----------------------------------------------------------------------------------------


def _batches(rendered: Sequence[_Rendered]) -> Iterator[list[_Rendered]]:
    batch: list[_Rendered] = []
    size = 0
    for item in rendered:
        if batch and (len(batch) == BATCH_ROWS or size + len(item.text) > BATCH_CHARACTERS):
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += len(item.text)
    if batch:
        yield batch


def _encoding(where: str) -> AbstractContextManager[None]:
    return tokenizer_faults("the tokenizer cannot encode this text", where=where, fix="check the model's tokenizer files")


def _tokenise(
    batch: Sequence[_Rendered], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[_Rendered, array[int], bytearray]]:
    """The ids and target masks of the texts alone, without what `_finish` puts around them."""
    if len(batch) == 1 and batch[0].windows:  # perhaps a book: every token is a target, so no offsets are needed
        ids = long_text_ids(batch[0].text, tokenizer)
        yield batch[0], ids, bytearray(b"\x01") * len(ids)
        return
    out = tokenizer(
        [item.text for item in batch],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,  # no warning about lengths: cutting is our business
    )
    for item, tokens, offsets in zip(batch, out["input_ids"], out["offset_mapping"], strict=True):
        yield item, array("i", tokens), _target_mask(item.text, offsets, item.spans)


def _target_mask(text: str, offsets: Sequence[Span], spans: Sequence[Span]) -> bytearray:
    """The mask of targets: 1 for every token that belongs to a span.

    Tokens tile the text, but their offsets may not: byte-level tokenizers with `trim_offsets` leave the blanks before a
    word out of them (" yes" at 13 is reported as 14), which would push a prompt's last blank into the reply. So a token
    begins no later than where the tokens before it end.
    """
    mask = bytearray(len(offsets))
    remaining = iter(spans)
    start, end = next(remaining, (len(text), len(text)))
    covered = 0
    for index, (first, last) in enumerate(offsets):
        first = min(first, covered)
        covered = max(covered, last)
        while first >= end and end < len(text):
            start, end = next(remaining, (len(text), len(text)))
        straddles = first < start < last and text[first:start].isspace()
        mask[index] = start <= first < end or straddles
    return mask


def _finish(
    item: _Rendered, ids: array[int], mask: bytearray, *, lead: list[int], eos: int | None, max_seq_len: int
) -> list[Example]:
    """The row's examples, with bos and eos, within the length limit; those without a target are left out."""
    if item.lead:
        ids, mask = array("i", lead) + ids, bytearray(len(lead)) + mask
    if item.append_eos:
        assert eos is not None, "checked before rendering"
        ids, mask = ids + array("i", [eos]), mask + b"\x01"
    truncated = len(ids) > max_seq_len and not item.windows
    stop = len(ids) if item.windows else min(len(ids), max_seq_len)
    examples = []
    for begin in range(0, stop, max_seq_len):
        piece = mask[begin : min(begin + max_seq_len, stop)]
        piece[0] = 0  # the first token of a window has nothing before it
        if any(piece):
            window = ids[begin : begin + len(piece)]
            examples.append(Example(window, bytes(piece), item.where, truncated, item.last_turn_only))
    return examples
