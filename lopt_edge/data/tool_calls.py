"""Tools and tool calls in one form, whatever form a data file has them in: that of OpenAI, which chat templates read.

    a tool  {"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}
    a call  {"id": ..., "type": "function", "function": {"name": ..., "arguments": {...}}}

Accepted: lists, or a list as JSON in a string; tools and calls with and without the outer object; arguments as an object or
as JSON in a string; `function_call`; a single call (sharegpt's role function_call). Rule: nothing is guessed: what is not
understood is refused with its place. A call without an id gets one of nine letters and digits, which every template takes.

Not here: how a template wants the arguments (`template`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from lopt_edge.errors import InputError
from quant.untrusted import TooDeep, parse_json


def parsed(value: object, *, field: str, where: str) -> object:
    """The value of JSON in a string; anything but a string as it is. Raises InputError for a string that is no JSON."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except (json.JSONDecodeError, TooDeep, ValueError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise InputError(f"field '{field}' is text that is not JSON ({reason[:100]})", where=where) from None


def tools_of(value: object, *, field: str, where: str) -> tuple[dict[str, Any], ...]:
    """The tools that a row offers. Raises InputError."""
    value = parsed(value, field=field, where=where)
    items = value if isinstance(value, list) else [value]
    return tuple(
        _tool(parsed(item, field=f"{field}[{k}]", where=where), f"{field}[{k}]", where) for k, item in enumerate(items)
    )


def calls_of(value: object, *, field: str, where: str, first: int = 0) -> tuple[dict[str, Any], ...]:
    """The calls of a message; `first` numbers those without an id. Raises InputError."""
    value = parsed(value, field=field, where=where)
    items = value if isinstance(value, list) else [value]
    if not items:
        raise InputError(f"field '{field}' holds no call", where=where)
    return tuple(_call(item, f"{field}[{k}]", where, number=first + k) for k, item in enumerate(items))


def text_of_arguments(calls: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The calls with their arguments as JSON text, for the templates that want them so."""
    return [
        {
            **call,
            "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)},
        }
        for call in calls
    ]


def _tool(value: object, field: str, where: str) -> dict[str, Any]:
    function = value.get("function") if isinstance(value, dict) and isinstance(value.get("function"), dict) else value
    if not isinstance(function, dict) or not _is_name(function.get("name")):
        fix = 'write {"type": "function", "function": {"name": ..., "parameters": {...}}}'
        raise InputError(f"field '{field}' is not a tool with a name", where=where, fix=fix)
    return {"type": "function", "function": dict(function)}


def _call(value: object, field: str, where: str, *, number: int) -> dict[str, Any]:
    value = parsed(value, field=field, where=where)
    function = value.get("function") if isinstance(value, dict) and isinstance(value.get("function"), dict) else value
    if not isinstance(value, dict) or not isinstance(function, dict) or not _is_name(function.get("name")):
        fix = 'write {"function": {"name": ..., "arguments": {...}}}'
        raise InputError(f"field '{field}' is not a call with a function's name", where=where, fix=fix)
    given = function.get("arguments", function.get("parameters"))
    arguments = {} if given in (None, "") else parsed(given, field=f"{field}.arguments", where=where)
    if not isinstance(arguments, dict):
        fix = "write the arguments as an object, or as an object in a JSON string"
        raise InputError(f"field '{field}.arguments' is {type(arguments).__name__}, not an object", where=where, fix=fix)
    identity = value.get("id")
    return {
        "id": identity if isinstance(identity, str) and identity else f"call{number:05d}",
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())
