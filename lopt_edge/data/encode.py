"""Rows to token ids with a mask of targets.

An `Example` holds the ids of one sequence and, for each token, whether it is a target: whether the model is trained to
predict it from the tokens before. The first token of a sequence has nothing before it and is never a target.

    text               every token, eos at the end; a long row is cut into consecutive windows, nothing overlaps
    prompt-completion  the completion and the eos after it
    conversation       the assistant turns that are learned, each with the token that ends it (so that a base model learns
                       to stop)

Rules. A conversation is tokenised once, whole, and character spans are mapped to tokens, so the tokens are exactly those of
`apply_chat_template`. A token that straddles the start of a turn is a target if what it takes from the prompt is only white
space, else not. A prompt's tokens are those that `generate --raw` feeds (`prompt_ids`), so where the tokenizer would join
its end with the completion the two are encoded apart. Tokens that the tokenizer or we put first and last are not put where
the text has them already. Conversations and completions longer than `max_seq_len` lose their right end; what is left
without any target is dropped.

Not here: the text of a conversation and its turns (`turns`), templates (`template`), batches (`order`).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lopt_edge.data.faults import Faults
from lopt_edge.data.long_text import long_text_ids
from lopt_edge.data.notes import BOS_TYPED, EOS_TYPED, INSIDE_TOKEN, Notes
from lopt_edge.data.pieces import encoded, pieces
from lopt_edge.data.rendered import Rendered, RowRenderer
from lopt_edge.data.rows import Row
from lopt_edge.data.template import ChatTemplate, leading_ids
from lopt_edge.data.thoughts import Think
from lopt_edge.data.tokenizer_faults import tokenizer_faults
from lopt_edge.data.turns import Span
from lopt_edge.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Per tokenizer call: enough rows to use every core, and few enough characters that its offsets stay small.
BATCH_ROWS, BATCH_CHARACTERS = 256, 500_000


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


def encode_row(
    row: Row, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None, max_seq_len: int, **how: Any
) -> list[Example]:
    """The examples of one row: one, several for a long text, none if no target is left. `how`: as for `encode_rows`."""
    return encode_rows([row], tokenizer, template=template, max_seq_len=max_seq_len, **how)[0]


def encode_rows(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, **how: Any) -> list[list[Example]]:
    """The examples of every row, in order. Raises InputErrors for all rows that cannot be rendered. `how`: as for
    `RowEncoder`."""
    encoder = RowEncoder(tokenizer, **how)
    found = encoder.encode(rows)
    encoder.finish()
    return found


class RowEncoder:
    """Encodes the rows of a data set, some at a time; rows that cannot be rendered are told when all have been seen.

    `think` is --think, `escape` --escape-special-tokens; `notes` takes what the rows' owner should know.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: ChatTemplate | None,
        max_seq_len: int,
        think: Think | None = None,
        escape: bool = False,
        notes: Notes | None = None,
    ) -> None:
        if max_seq_len < 2:
            raise InputError(f"a sequence of {max_seq_len} tokens has no target", where="max-seq-len", fix="use 2 or more")
        if not tokenizer.is_fast:
            fix = "use a model that ships tokenizer.json"
            raise InputError("the tokenizer has no fast form, so targets cannot be located", where="tokenizer", fix=fix)
        self._tokenizer, self._max_seq_len, self._notes = tokenizer, max_seq_len, notes or Notes()
        self._renderer = RowRenderer(tokenizer, template, think=think, escape=escape, notes=self._notes)
        self._faults = Faults()

    def encode(self, rows: Sequence[Row]) -> list[list[Example]]:
        """The examples of every row, in order. Once a row could not be rendered, no more are encoded: `finish` raises."""
        rendered = []
        for row in rows:
            try:
                rendered.append(self._renderer.rendered(row))
            except InputError as error:
                self._faults.add(error)
        if self._faults.count:
            return [[] for _ in rows]
        found = []
        for batch in _batches(rendered):
            first, last = batch[0].where, batch[-1].where
            with _encoding(first if first == last else f"{first} to {last}"):
                tokenised = list(_tokenise(batch, self._tokenizer, self._notes))
            for item, ids, mask in tokenised:
                found.append(_finish(item, ids, mask, ends=self._ends, max_seq_len=self._max_seq_len))
        return found

    def finish(self) -> None:
        """Raise InputError(s) for all rows that could not be rendered."""
        self._faults.raise_any()

    @cached_property
    def _ends(self) -> _Ends:
        with _encoding("tokenizer"):
            return _Ends(leading_ids(self._tokenizer), self._tokenizer.eos_token_id, self._notes)


def prompt_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a prompt without a chat template, as training on prompts and completions has them."""
    with _encoding("the prompt"):
        lead, (ids, _) = leading_ids(tokenizer), next(encoded([text], tokenizer))
    return ids if ids[: len(lead)] == lead else [*lead, *ids]


# --- text and spans to tokens -----------------------------------------------------------------------------------------


def _batches(rendered: Sequence[Rendered]) -> Iterator[list[Rendered]]:
    batch: list[Rendered] = []
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
    batch: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase, notes: Notes
) -> Iterator[tuple[Rendered, array[int], bytearray]]:
    """The ids and target masks of the texts alone, without what `_finish` puts around them."""
    if len(batch) == 1 and batch[0].windows and not batch[0].cuts:  # perhaps a book: all are targets, no offsets needed
        ids = long_text_ids(batch[0].text, tokenizer)
        yield batch[0], ids, bytearray(b"\x01") * len(ids)
        return
    prompts = encoded([item.text[: item.prompt_end] for item in batch if item.prompt_end is not None] or [""], tokenizer)
    for item, (tokens, offsets) in zip(batch, encoded([item.text for item in batch], tokenizer), strict=True):
        prompt = next(prompts)[0] if item.prompt_end is not None else []
        if item.prompt_end is not None and not item.cuts and tokens[: len(prompt)] == prompt:
            yield item, array("i", tokens), bytearray(len(prompt)) + bytearray(b"\x01") * (len(tokens) - len(prompt))
        elif item.prompt_end is not None or item.cuts:
            if not item.cuts:
                notes.add(INSIDE_TOKEN, item.where)
            yield item, *_in_pieces(item, tokenizer)
        else:
            yield item, array("i", tokens), _target_mask(item.text, offsets, item.spans)


def _in_pieces(item: Rendered, tokenizer: PreTrainedTokenizerBase) -> tuple[array[int], bytearray]:
    """The ids and the mask of a text that is encoded apart at its cuts and at the end of its prompt."""
    ids, mask = array("i"), bytearray()
    cuts = (*item.cuts, *([item.prompt_end] if item.prompt_end is not None else []))
    for begin, text, (tokens, offsets) in pieces(item.text, cuts, tokenizer):
        inside = [(max(start - begin, 0), min(end - begin, len(text))) for start, end in item.spans]
        ids.extend(tokens)
        mask += _target_mask(text, offsets, [(start, end) for start, end in inside if start < end])
    return ids, mask


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


@dataclass(frozen=True)
class _Ends:
    """What is put around a text: the tokenizer's leading ids, and eos; where the text has them already, it is noted."""

    lead: list[int]
    eos: int | None
    notes: Notes

    def around(self, item: Rendered, ids: array[int], mask: bytearray) -> tuple[array[int], bytearray]:
        """The ids and the mask with both ends."""
        if item.lead and self.lead:
            if ids[: len(self.lead)].tolist() == self.lead:
                self.notes.add(BOS_TYPED, item.where)
            else:
                ids, mask = array("i", self.lead) + ids, bytearray(len(self.lead)) + mask
        if item.append_eos:
            assert self.eos is not None, "checked before rendering"
            if len(ids) and ids[-1] == self.eos:
                self.notes.add(EOS_TYPED, item.where)
            else:
                ids, mask = ids + array("i", [self.eos]), mask + b"\x01"
        return ids, mask


def _finish(item: Rendered, ids: array[int], mask: bytearray, *, ends: _Ends, max_seq_len: int) -> list[Example]:
    """The row's examples, with bos and eos, within the length limit; those without a target are left out."""
    ids, mask = ends.around(item, ids, mask)
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
