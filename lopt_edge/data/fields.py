"""Single fields of a record: a text that a tokenizer can take, or a fault that names the place and the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lopt_edge.errors import InputError


def shown(value: object) -> str:
    """A wrong value for an error message; its type alone where the value may be long or nested."""
    if value is None:
        return "missing"
    if isinstance(value, (bool, int, float)):
        return repr(value)[:40]
    return repr(value[:40]) if isinstance(value, str) else type(value).__name__


def text_field(value: Mapping[str, Any], key: str, *, where: str, prefix: str = "", may_be_blank: bool = False) -> str:
    """The text of a field. Raises InputError for what is missing, blank or no text."""
    text, field = value.get(key), f"field '{prefix}{key}'"
    if text is None:
        raise InputError(f"{field} is missing", where=where, fix="add the text or remove the row")
    if not isinstance(text, str):
        raise InputError(f"{field} is {type(text).__name__}, not text", where=where, fix="write it as a string")
    if not text.strip() and not may_be_blank:
        raise InputError(f"{field} is empty", where=where, fix="add the text or remove the row")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can escape half of a surrogate pair; no tokenizer takes it
        raise InputError(f"{field} holds half a character (\\ud800 and the like)", where=where) from None
    return text


def collected(
    errors: list[InputError], value: Mapping[str, Any], key: str, *, where: str, may_be_blank: bool = False
) -> str:
    """The text of a field; its fault goes to `errors`."""
    try:
        return text_field(value, key, where=where, may_be_blank=may_be_blank)
    except InputError as error:
        errors.append(error)
        return ""
