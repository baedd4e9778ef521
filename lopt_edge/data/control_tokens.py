"""Control tokens that somebody typed: `<|im_end|>` in a message becomes the token that ends a message.

Rule: a text that holds one is noted; with `--escape-special-tokens` it is encoded as the text that it is. For that a typed
token is cut in two where it is encoded (no half of a token is a token), so neither the text nor the tokenizer changes.
Before rendering, each typed token becomes three of Unicode's noncharacters, which no text has, so that a template can
neither react to it nor hide where it went.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from lopt_edge.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIRST, BASE, WIDTH = 0xFDD0, 32, 3  # the noncharacters U+FDD0 to U+FDEF as digits of a token's number
DIGIT = re.compile("[\ufdd0-\ufdef]")
STAND_IN = re.compile(f"(?:{DIGIT.pattern}){{{WIDTH}}}")
Span = tuple[int, int]


@dataclass(frozen=True)
class ControlTokens:
    """The control tokens of a tokenizer."""

    tokens: tuple[str, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ControlTokens:
        """All tokens that the tokenizer calls special."""
        added = tokenizer.added_tokens_decoder.values()
        found = {*map(str, tokenizer.all_special_tokens), *(token.content for token in added if token.special)}
        return cls(tuple(sorted((token for token in found if len(token) > 1), key=lambda token: (-len(token), token))))

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self.tokens)) or r"(?!)")

    def typed(self, text: str) -> bool:
        """Whether the text holds a control token."""
        return self._pattern.search(text) is not None

    def hidden(self, text: str, *, where: str) -> str:
        """The text with a stand-in for each typed token. Raises InputError for a text that holds such stand-ins itself."""
        if DIGIT.search(text):
            raise InputError("holds Unicode noncharacters (U+FDD0 to U+FDEF)", where=where, fix="remove them")
        return self._pattern.sub(lambda found: _stand_in(self.tokens.index(found[0])), text)

    def shown(self, text: str, spans: tuple[Span, ...]) -> tuple[str, tuple[Span, ...], tuple[int, ...]]:
        """A text of `hidden` with its tokens written out, its spans moved along, and the places inside the tokens to cut
        at."""
        pieces: list[str] = []
        cuts: list[int] = []
        moved = {place: place for span in spans for place in span}
        length = done = 0
        for match in STAND_IN.finditer(text):
            token = self.tokens[_number(match[0])]
            pieces += [text[done : match.start()], token]
            length += match.start() - done
            cuts.append(length + 1)
            length += len(token)
            done = match.end()
            for place in moved:
                moved[place] += len(token) - WIDTH if place >= match.end() else 0
        return "".join([*pieces, text[done:]]), tuple((moved[start], moved[end]) for start, end in spans), tuple(cuts)


def _stand_in(number: int) -> str:
    return "".join(chr(FIRST + number // BASE**power % BASE) for power in reversed(range(WIDTH)))


def _number(text: str) -> int:
    return sum((ord(digit) - FIRST) * BASE**power for power, digit in enumerate(reversed(text)))
