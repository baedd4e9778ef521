"""What a data file does that its owner may not expect, counted: each kind is said once, with its first places.

Rule: what is done to the rows beyond the letter of the file (parsed twice, not doubled, left out of the text) is noted here
and shown by `data check` and at the start of a run; nothing is noted that changes nothing. A kind is its sentence. Kept are
a count and the first places, however many rows there are: whoever notes goes through the rows in order.
"""

from __future__ import annotations

from dataclasses import dataclass

SHOWN_PLACES = 3

PARSED = "JSON inside a string where a list belongs was parsed"
NOT_LEARNED_ROLE = "a message that is not the assistant's asks to be learned: only replies are"
TYPED = "control tokens typed in the text are the model's own to it (--escape-special-tokens encodes them as text)"
ESCAPED = "control tokens typed in the text are encoded as text (--escape-special-tokens)"
END_TYPED = "a reply ends with the end token, which the chat template writes too: it is not doubled"
BOS_TYPED = "the text begins with what the tokenizer puts first: it is not doubled"
EOS_TYPED = "the text ends with the end-of-sequence token: it is not doubled"
INSIDE_TOKEN = (
    "the prompt's end would be joined with the completion in one token (a blank at the end, often), so the two are encoded "
    "apart, as generate --raw does; a blank at the head of the completion learns better"
)
SYSTEM_MOVED = (
    "the chat template puts the system message elsewhere once a reply follows, so the text is the prompt as generation "
    "sees it, then the last reply, which alone is learned"
)
REWRITTEN = "the chat template renders earlier replies differently, so only the last one is learned"
OPENED = (
    "the chat template opens a thought before a reply, so the prompt ends there, as when generating, and the reply closes "
    "the thought first (an empty one where the row holds none)"
)
SAME_REPLIES = "the chosen and the rejected reply are the same: such a pair prefers nothing"
THOUGHTS_LEFT_OUT = "the chat template leaves earlier thoughts out (--think keep keeps them)"
THOUGHTS_STRIPPED = "thoughts are left out (--think strip)"
THOUGHTS_LAST = "earlier thoughts are left out and the last reply alone is learned (--think last)"
THOUGHTS_KEPT = "earlier thoughts that the chat template would leave out are kept (--think keep)"


@dataclass(frozen=True)
class Note:
    """A sentence about `n_rows` rows, the first of which lie at `places`."""

    what: str
    n_rows: int
    places: tuple[str, ...]

    def text(self) -> str:
        """The note in a line."""
        more = ", ..." if self.n_rows > len(self.places) else ""
        rows = "1 row" if self.n_rows == 1 else f"{self.n_rows:,} rows"
        return f"{self.what}: {rows} ({', '.join(self.places)}{more})"


class Notes:
    """A count of rows for each kind of note; a row counts once, however often it is noted before the next one."""

    def __init__(self) -> None:
        self._found: dict[str, Note] = {}
        self._last: dict[str, str] = {}

    def add(self, what: str, where: str) -> None:
        """Note this of the row at `where`."""
        if self._last.get(what) == where:
            return
        self._last[what] = where
        found = self._found.get(what, Note(what, 0, ()))
        self._found[what] = Note(what, found.n_rows + 1, (*found.places, where)[:SHOWN_PLACES])

    def all(self) -> tuple[Note, ...]:
        """The notes in the order in which they came up."""
        return tuple(self._found.values())
