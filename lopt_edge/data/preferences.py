"""Preferences between rows and examples: pairs of a chosen and a rejected reply, or single replies with a label.

A preference's rows are encoded as any others; here they are taken apart before and put together after. The rules: a pair
stands or falls as a whole (what is left of a truncated one teaches nothing), its chosen example comes first, and the two
are neighbours in a data set; a data set has one form, which the run's objective asks for. Pairs serve where labels are
asked for: first all chosen replies, then all rejected ones, so that a reply's neighbour has another prompt.

Mismatched examples (objectives/labelled.py) have an example's prompt and the reply of the one before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Literal

from lopt_edge.data.encode import Example
from lopt_edge.data.notes import SAME_REPLIES, Notes
from lopt_edge.data.rows import AnyRow, Preference, Preferences, Row
from lopt_edge.errors import InputError, together

Wanted = Preferences | Literal["as they are"]  # what an objective asks for; `data check` has none
FORMS: dict[str, Preferences] = {"preference": "pairs", "unpaired-preference": "labels"}  # by the format of the rows


def preferences_of(forms: Sequence[str], wanted: Wanted, *, names: Sequence[str]) -> Preferences:
    """What the rows of sources of these formats say beside their text, for who wants it so. Raises InputError(s) where
    they do not, or not all the same."""
    found = together(*(partial(_of_source, form, wanted, where=name) for form, name in zip(forms, names, strict=True)))
    if len(set(found)) > 1:  # only where no objective asks
        what = f"the sources have rows of different kinds: {', '.join(dict.fromkeys(forms))}"
        raise InputError(what, where="data", fix="look at each source alone; an objective takes one kind")
    form: Preferences = found[0]
    return form


def _of_source(form: str, wanted: Wanted, *, where: str) -> Preferences:
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


def put_together(
    rows: Sequence[AnyRow], encoded: Iterable[list[Example]], preferences: Preferences, notes: Notes
) -> Iterator[list[tuple[Example, bool]]]:
    """Of each row its examples, each with its label; `encoded` has those of the rows that `taken_apart` gave."""
    each = iter(encoded)
    for row in rows:
        if not isinstance(row, Preference):
            yield [(example, True) for example in next(each)]
            continue
        labels = [True] * (row.chosen is not None) + [False] * (row.rejected is not None)
        left = [(examples[0], label) for examples, label in zip(islice(each, len(labels)), labels, strict=True) if examples]
        if preferences == "pairs" and len(left) < 2:
            left = []
        if len(left) == 2 and left[0][0].input_ids == left[1][0].input_ids:
            notes.add(SAME_REPLIES, row.where)
        yield left


def mismatched(examples: Sequence[Example], *, max_seq_len: int) -> Iterator[Example]:
    """Each example's prompt with the reply of the one before it (the first one's is the last one's), cut as any."""
    other = examples[-1]
    for own in examples:
        yield _joined(own, other, max_seq_len)
        other = own


def _joined(own: Example, other: Example, max_seq_len: int) -> Example:
    begin, reply = own.supervised.index(1), other.supervised.index(1)
    ids = (own.input_ids[:begin] + other.input_ids[reply:])[:max_seq_len]
    mask = (bytes(begin) + other.supervised[reply:])[:max_seq_len]
    return Example(ids, mask, own.where, truncated=begin + len(other) - reply > max_seq_len)
