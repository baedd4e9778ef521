"""Encodes a text in pieces, each with the tokens that it has after what came before and not joined with it.

Rule: the ids of all pieces, decoded, are the text. A SentencePiece-like tokenizer puts a blank before every text that it is
given; a piece that continues another one is therefore encoded behind an anchor, a short text that the tokenizer keeps apart
from what follows, and the anchor's ids are taken off again.

Not here: which texts are cut and where (`encode`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
Encoded = tuple[list[int], list[Span]]  # ids, and the characters [start, end) of each
ANCHORS = ("\n", ":", "a", ".", "é", "\t")


def encoded(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[Encoded]:
    """The ids and offsets of whole texts, without special tokens around them."""
    out = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,  # no warning about lengths: cutting is our business
    )
    yield from zip(out["input_ids"], out["offset_mapping"], strict=True)


def pieces(text: str, cuts: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, str, Encoded]]:
    """The pieces between the cuts: where each begins, its text, its ids and its offsets within the piece."""
    edges = [0, *sorted({cut for cut in cuts if 0 < cut < len(text)}), len(text)]
    for begin, end in pairwise(edges):
        piece = text[begin:end]
        yield begin, piece, continuation(piece, tokenizer) if begin else next(encoded([piece], tokenizer))


def continuation(text: str, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """The ids and offsets of a text that follows another one."""
    for anchor in ANCHORS:
        (before, _), (ids, offsets) = encoded([anchor, anchor + text], tokenizer)
        n, shift = len(before), len(anchor)
        if before and ids[:n] == before and offsets[n - 1][1] <= shift:
            return ids[n:], [(max(first - shift, 0), max(last - shift, 0)) for first, last in offsets[n:]]
    return next(encoded([text], tokenizer))
