"""JSON of a data file: one value, or several after each other, whose every failure is an `InputError` that names its cause.

Rule: one fault, one message. What people do to JSON by hand is told apart from other breakage: a comma after the last item,
single quotes, comments, a text that ends in the middle.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from lopt_edge.errors import InputError
from quant.untrusted import TooDeep, check_depth, parse_json

BLANKS = re.compile(r"\s*")
CUT_SHORT = "the text ends in the middle of a value"


def json_value(text: str, *, where: str) -> Any:
    """The value of a JSON text. Raises InputError."""
    try:
        return parse_json(text, parse_constant=_refuse_constant)
    except (json.JSONDecodeError, TooDeep, ValueError) as error:
        raise _fault(error, text, where=where) from None


def json_values(text: str, *, where: str) -> Iterator[tuple[int, Any]]:
    """Each value of a text that holds several after each other, and the line on which it begins. Raises InputError."""
    decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    place, line, done = _after_blanks(text, 0), 1, 0
    while place < len(text):
        line, done = line + text.count("\n", done, place), place
        try:
            value, place = decoder.raw_decode(text, place)
            check_depth(value)
        except RecursionError:
            raise InputError("the JSON is nested too deeply", where=where, fix="flatten or remove the row") from None
        except (json.JSONDecodeError, TooDeep, ValueError) as error:
            raise _fault(error, text, where=where) from None
        yield line, value
        place = _after_blanks(text, place)


def _after_blanks(text: str, place: int) -> int:
    found = BLANKS.match(text, place)
    return found.end() if found else place


def _fault(error: Exception, text: str, *, where: str) -> InputError:
    if isinstance(error, TooDeep):
        return InputError(f"the JSON is {error}", where=where, fix="flatten or remove the row")
    if not isinstance(error, json.JSONDecodeError):  # a forbidden constant, or an integer beyond Python's digit limit
        return InputError(f"bad JSON value: {error}", where=where, fix="correct the row")
    place = f"line {error.lineno}, column {error.colno}" if "\n" in text.strip() else f"column {error.colno}"
    cause, fix = _cause(error, text)
    return InputError(f"broken JSON at {place}: {cause}", where=where, fix=fix)


def _cause(error: json.JSONDecodeError, text: str) -> tuple[str, str]:
    """What is wrong at the place of the error, and what to do."""
    before, after = text[: error.pos], text[error.pos :]
    if (before.rstrip().endswith(",") and after.lstrip()[:1] in ("}", "]")) or error.msg.startswith(
        "Illegal trailing comma"
    ):
        return "a comma after the last item", "remove the comma"
    if not after.strip():
        return CUT_SHORT, "correct the row; a row of .jsonl is one line"
    if after.startswith("'"):
        return "single quotes (JSON has double ones)", "write the rows with a JSON library"
    if after.startswith(("//", "/*", "#")):
        return "a comment", "JSON has no comments; remove it"
    return error.msg, "correct the row"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON; write null or leave the field out")
