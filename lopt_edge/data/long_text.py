"""Tokenises a long text piece by piece, with the tokens that the whole text would give.

A tokenizer keeps about 170 bytes for each character that it is given at once (measured: 1.8 GiB for a 10.8 MB file),
which a machine with a memory budget does not have to spare, and uses one core for one text.

Rule: a text is cut only where it makes no difference. A cut (after a line break, or before a single blank) is taken
if its neighbourhood gives the same tokens whole and in its two halves. Tokenizers that put a blank before every text
(the older Llama form) never pass that check, and then the text stays whole: slower, never different.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE = 32_768  # characters
GROUP = 16  # pieces per tokenizer call: 0.5 M characters, near 90 MB while they last
CUT = re.compile(r"(?<=\n)(?=\S)|(?<=\S)(?= \S)")
SEARCHED, NEIGHBOURHOOD, TRIES = 4_000, 200, 4


def long_text_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> array[int]:
    """The ids of a text of any length, without special tokens around it."""
    ids: array[int] = array("i")
    pieces = list(text_pieces(text, tokenizer))
    for begin in range(0, len(pieces), GROUP):
        for piece in _ids(pieces[begin : begin + GROUP], tokenizer):
            ids.extend(piece)
    return ids


def text_pieces(text: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The pieces of a text, of about PIECE characters each; the text in one piece where no harmless cut is found."""
    begin = 0
    while len(text) - begin > PIECE:
        cut = _harmless_cut(text, begin + PIECE, tokenizer)
        if cut is None:
            break
        yield text[begin:cut]
        begin = cut
    yield text[begin:]


def _harmless_cut(text: str, limit: int, tokenizer: PreTrainedTokenizerBase) -> int | None:
    start = limit - SEARCHED
    places = [start + match.start() for match in CUT.finditer(text[start : limit + 2])]
    for cut in reversed(places[-TRIES:]):
        left, right = text[cut - NEIGHBOURHOOD : cut], text[cut : cut + NEIGHBOURHOOD]
        whole, left_ids, right_ids = _ids([left + right, left, right], tokenizer)
        if whole == left_ids + right_ids:
            return cut
    return None


def _ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids
    return ids
