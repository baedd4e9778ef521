"""What a step of a chat template costs, and the purse that it is paid from (`sandbox` says why).

Rule: what could be large is priced before it is made, from its arguments, at about the characters and elements that it
will have (methods of str that cannot grow: a sixteenth of it). What nests is weighed at all levels as often as it occurs: a
list that holds the same list twice, forty levels deep, is small in memory and has 2**40 elements for whoever prints or
compares it, so such lists cannot be made. Nothing here knows jinja.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence, Set
from contextvars import ContextVar
from typing import Any

MAX_SECONDS = 5.0  # of one rendering
BASE_UNITS, UNITS_A_CHARACTER, UNITS_A_MESSAGE = 1_000_000, 64, 4_000
MAX_INTEGER_BITS = 20_000  # str() of a longer one is slow, and refused by Python as well
MAX_INDENT = 16
WIDE_FIELD = re.compile(r"\d{5}|\{[^{}]*:[^{}]*\{|%[^%a-zA-Z]*\*")  # a width of 10,000 and more, or one from the arguments


class TemplateLimit(Exception):
    """A template that did or made too much."""


class Meter:
    """The purse and the clock of one rendering."""

    def __init__(self, units: int) -> None:
        self.units = units
        self.left = units
        self.end = time.monotonic() + MAX_SECONDS

    def pay(self, price: int) -> None:
        """Pay a price. Raises TemplateLimit where the purse or the time is out."""
        self.left -= price
        if self.left < 0:
            self.left = -1
            raise TemplateLimit(f"it did or made too much (more than {self.units:,} steps, characters and elements)")
        if time.monotonic() > self.end:
            raise TemplateLimit(f"it took longer than {MAX_SECONDS:g} seconds")

    def weigh(self, *values: object, text: bool = False) -> int:
        """The number of elements that the values hold at all levels, with `text` also their characters; never more than is
        left."""
        stack, weight = list(values), 0
        while stack:
            value = stack.pop()
            weight += 1
            if isinstance(value, str):
                weight += len(value) if text else 0
            elif isinstance(value, Mapping):
                stack += value.values()
                stack += value.keys() if text else ()
            elif isinstance(value, (Sequence, Set)):
                stack += value
            if weight + len(stack) > self.left:
                self.pay(self.left + 1)
        return weight

    def pay_for(self, *values: object, text: bool = False) -> None:
        """Pay for the elements of the values, with `text` also for their characters."""
        self.pay(self.weigh(*values, text=text))


METER: ContextVar[Meter] = ContextVar("lopt_edge_template_meter")


def units_for(messages: Sequence[Mapping[str, Any]]) -> int:
    """The units that a rendering of these messages and tools may spend."""
    characters = sum(_characters(message) for message in messages)
    return BASE_UNITS + UNITS_A_CHARACTER * characters + UNITS_A_MESSAGE * len(messages)


def _characters(value: object) -> int:
    """The characters of all texts inside a value of JSON; any other value counts as a few."""
    stack, count = [value], 0
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            count += len(item)
        elif isinstance(item, Mapping):
            stack += [*item.keys(), *item.values()]
        elif isinstance(item, Sequence):
            stack += item
        else:
            count += 8
    return count


def paid(result: Any) -> Any:
    """A result of a call or a filter, its elements or characters paid for."""
    if isinstance(result, str):
        METER.get().pay(len(result) // 16 + 1)
    elif isinstance(result, (Mapping, Sequence, Set)):
        METER.get().pay_for(result)
    return result


def price_of_operator(operator: str, left: Any, right: Any) -> int:
    """The price of a binary operator, before it is applied."""
    meter = METER.get()
    if operator == "%" and isinstance(left, str):
        return price_of_fields(left, "%", right)
    if isinstance(left, int) and isinstance(right, int):
        bits = {"*": left.bit_length() + right.bit_length(), "**": left.bit_length() * max(int(right), 0)}.get(operator, 0)
        if bits > MAX_INTEGER_BITS:
            raise TemplateLimit(f"it computes an integer of more than {MAX_INTEGER_BITS:,} bits")
        return 1
    if operator == "*":
        times, value = (left, right) if isinstance(left, int) else (right, left)
        return max(times, 0) * meter.weigh(value, text=True) if isinstance(times, int) else 1
    text = isinstance(left, str) and isinstance(right, str)
    return meter.weigh(left, right, text=text)


def price_of_fields(text: str, mark: str, values: object) -> int:
    """The price of str.format and of %: each field may put out all values."""
    if WIDE_FIELD.search(text):
        raise TemplateLimit("it formats with a width of 10,000 or more, or with one that the values give")
    return len(text) + text.count(mark) * METER.get().weigh(values, text=True)


def bounded_arguments(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a method, iterables as lists: `join` takes any iterable, and what is counted must be there still
    when it is joined."""
    return ([*args[0]], *args[1:]) if name == "join" and args and isinstance(args[0], Iterable) else args


def price_of_method(owner: str, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """The price of a method of str, before it is called."""
    meter = METER.get()
    number = next((max(value, 0) for value in (*args, *kwargs.values()) if isinstance(value, int)), 0)
    if name in ("center", "ljust", "rjust", "zfill"):
        return number + 1
    if name == "expandtabs":
        return number * owner.count("\t") + len(owner)
    if name == "replace":
        return _price_of_replacing(owner, *args, **kwargs)
    if name == "join" and args:
        return meter.weigh(args[0], text=True) + len(owner) * len(args[0])
    return len(owner) // 16 + 1


def _price_of_replacing(text: Any, old: Any = "", new: Any = "", *_: Any, **__: Any) -> int:
    text, old, new = (value if isinstance(value, str) else str(value)[:1000] for value in (text, old, new))
    found: int = text.count(old)
    return len(text) // 16 + 1 + found * len(new)


def price_of_filter(name: str, value: Any, rest: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """The price of what a filter makes beyond what it was given."""
    meter, given = METER.get(), (*rest, *kwargs.values())
    number = max((int(item) for item in given if isinstance(item, int)), default=0)
    longest = max((len(item) for item in given if isinstance(item, str)), default=0)
    if name == "replace":
        return _price_of_replacing(value, *rest, **{{"s": "text"}.get(key, key): item for key, item in kwargs.items()})
    if name == "format":
        return price_of_fields(str(value), "%", given)
    if name == "tojson":
        if max(number, longest) > MAX_INDENT:
            raise TemplateLimit(f"it writes JSON with an indent of more than {MAX_INDENT}")
        return meter.weigh(value) * (4 * number + 1)
    if name in ("center", "batch", "slice"):
        return max(number, 0)
    if name in ("indent", "wordwrap"):
        lines = len(str(value)) if name == "wordwrap" else str(value).count("\n") + 1
        return lines * (number + longest if name == "indent" else longest)
    if name == "join":
        return len(value) * longest if isinstance(value, (Sequence, Mapping)) else 1
    if name == "sum" and any(not isinstance(item, (int, float, str)) for item in given):
        return len(value) * meter.weigh(value, given) if isinstance(value, (Sequence, Mapping)) else 1
    return 1
