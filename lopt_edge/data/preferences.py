"""Preferences between rows and examples: pairs of a chosen and a rejected reply, or single replies with a label.

A preference's rows are encoded as any others; here they are taken apart before and put together after. The rules: a pair
stands or falls as a whole (what is left of a truncated one teaches nothing), its chosen example comes first, and the two
are neighbours in a data set; a data set has one form, which the run's objective asks for. Pairs serve where labels are
asked for: first all chosen replies, then all rejected ones, so that a reply's neighbour has another prompt.

Mismatched examples (objectives/labelled.py) have an example's prompt and the reply of the one before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from lopt_edge.data.encode import Example
from lopt_edge.data.notes import SAME_REPLIES, Notes
from lopt_edge.data.rows import AnyRow, Preference, Preferences, Row
from lopt_edge.errors import InputError

Wanted = Preferences | Literal["as they are"]  # what an objective asks for; `data check` has none
FORMS: dict[str, Preferences] = {"preference": "pairs", "unpaired-preference": "labels"}  # by the format of the rows


def preferences_of(form: str, wanted: Wanted, *, where: str) -> Preferences:
    """What rows of this format say beside their text, for who wants it so. Raises InputError where they do not."""
    there: Preferences = FORMS.get(form, "none")
    if wanted in (there, "as they are"):
        return there
    if wanted == "labels" and there == "pairs":
        return "labels"
    if wanted == "none":
        fix = (
            "add --objective kto" if there == "labels" else "add --objective dpo, orpo, simpo or kto; to learn the chosen "
            "replies alone: --columns completion=chosen --ignore-columns rejected"
        )  # fmt: skip
        raise InputError(
            f"the rows are preferences ({form}), which objective sft does not learn from", where=where, fix=fix
        )
    needed = "prompt, chosen and rejected" if wanted == "pairs" else "prompt, completion and label"
    fix = f"give rows with {needed} (docs/preferences.md), or leave --objective out"
    raise InputError(f"the objective needs rows with {needed}; these are of the form {form}", where=where, fix=fix)


def taken_apart(rows: Sequence[AnyRow]) -> list[Row]:
    """The rows of all preferences one after the other, the others as they are."""
    return [one for row in rows for one in (row.rows if isinstance(row, Preference) else (row,))]


@dataclass(frozen=True)
class Together:
    """The examples of a data set with their labels (none without preferences), and how many rows left none."""

    examples: tuple[Example, ...]
    labels: tuple[bool, ...]
    n_dropped: int


def put_together(
    rows: Sequence[AnyRow], encoded: Sequence[list[Example]], preferences: Preferences, notes: Notes
) -> Together:
    """The examples of the rows that `taken_apart` gave, which `encoded` has in their order."""
    if preferences == "none":
        return Together(tuple(one for found in encoded for one in found), (), sum(not found for found in encoded))
    each, dropped = list[tuple[Example, bool]](), 0
    for row, found in _with_examples(rows, encoded):
        labels = [True] * (row.chosen is not None) + [False] * (row.rejected is not None)
        left = [(examples[0], label) for examples, label in zip(found, labels, strict=True) if examples]
        if preferences == "pairs" and len(left) < 2:
            left = []
        if len(left) == 2 and left[0][0].input_ids == left[1][0].input_ids:
            notes.add(SAME_REPLIES, row.where)
        dropped += not left
        each += left
    if preferences == "labels":
        each = [one for one in each if one[1]] + [one for one in each if not one[1]] if _are_pairs(rows) else each
    return Together(tuple(example for example, _ in each), tuple(label for _, label in each), dropped)


def _are_pairs(rows: Sequence[AnyRow]) -> bool:
    return any(isinstance(row, Preference) and len(row.rows) == 2 for row in rows)


def _with_examples(
    rows: Sequence[AnyRow], encoded: Sequence[list[Example]]
) -> Iterator[tuple[Preference, list[list[Example]]]]:
    at = 0
    for row in rows:
        assert isinstance(row, Preference)
        yield row, list(encoded[at : at + len(row.rows)])
        at += len(row.rows)


def mismatched(examples: Sequence[Example], *, max_seq_len: int) -> tuple[Example, ...]:
    """Each example's prompt with the reply of the one before it (the first one's is the last one's), cut as any."""
    return tuple(
        _joined(own, other, max_seq_len) for own, other in zip(examples, (examples[-1], *examples[:-1]), strict=True)
    )


def _joined(own: Example, other: Example, max_seq_len: int) -> Example:
    begin, reply = own.supervised.index(1), other.supervised.index(1)
    ids = (own.input_ids[:begin] + other.input_ids[reply:])[:max_seq_len]
    mask = (bytes(begin) + other.supervised[reply:])[:max_seq_len]
    return Example(ids, mask, own.where, truncated=begin + len(other) - reply > max_seq_len)
