"""Renders a foreign chat template in a sandbox that counts: work, size and time have limits.

A chat template comes with a model or in a file, from whoever made it. jinja's sandbox keeps it from Python's internals,
but lets `{{ 'a' * 10**10 }}` fill the memory and two nested loops run for a day. So every step of a template pays from a
purse of units: one for a turn of a loop, a call, a filter, an operator; one for each character and each element that
the step reads as text or makes (`template_meter`). The purse grows with the conversation, so an honest template never sees
its end (those of the tests spend at most 3% of it). The same template and row end in the same way on any machine and in any
thread; a clock stands behind the purse (`MAX_SECONDS`) for what the prices get wrong.

How it is done: the parsed template is rewritten before it is compiled (a payment at the head of every loop body and before
every piece of literal text, `~` and list, tuple and dict literals as filters that pay); operators, calls, filters and
tests are those of the environment below, and values that are put out pass `_finalize`. Nothing is folded at compile time.

The language is that of transformers (same options, filters, globals, the generation tag), which a test holds. What is
otherwise: `strftime_now` answers with one fixed date, so that a run resumed tomorrow sees the same tokens; a printed
namespace does not show its content; refused are `urlize`, `lipsum`, str.encode, str.translate and int.to_bytes.

What it cannot stop: a single step in C on values that the purse allows (milliseconds each; the clock is read between
steps, no signal and no thread interrupts one), the compiler itself (so a source has at most `MAX_SOURCE_BYTES`), a defect
of jinja or Python. Memory: at most some 150 bytes per unit, 150 MB for a conversation of ordinary size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from functools import lru_cache, wraps
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from lopt_edge.data.template_meter import (
    METER,
    Meter,
    TemplateLimit,
    bounded_arguments,
    paid,
    price_of_fields,
    price_of_filter,
    price_of_method,
    price_of_operator,
    units_for,
)

MAX_SOURCE_BYTES = 64 * 1024  # of a template; compiling takes up to 2 kB of memory a byte
FIXED_DATE = date(2024, 7, 26)  # the date that Llama 3's template falls back to
FORBIDDEN = frozenset({"encode", "translate", "maketrans", "to_bytes", "from_bytes", "fromhex"})
# Filters that read their values as text pay for each character; these do not.
SHALLOW = frozenset({"length", "count", "first", "last", "list", "map", "select", "reject", "selectattr", "rejectattr",
                     "default", "d", "items", "reverse", "batch", "slice", "sum", "attr", "random", "int", "float",
                     "round", "abs"})  # fmt: skip


def render(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    add_generation_prompt: bool = False,
    special_tokens: Mapping[str, str | list[str]] | None = None,
) -> str:
    """The conversation as text. Raises TemplateLimit, and whatever else a template may raise."""
    if len(source.encode(errors="replace")) > MAX_SOURCE_BYTES:
        raise TemplateLimit(f"it has more than {MAX_SOURCE_BYTES:,} bytes")
    token = METER.set(Meter(units_for([*messages, *tools])))
    try:
        return _compiled(source).render(
            messages=[dict(message) for message in messages],
            tools=[dict(tool) for tool in tools] or None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **(special_tokens or {}),
        )
    finally:
        METER.reset(token)


@lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    return _Environment().from_string(source)


# --- the environment --------------------------------------------------------------------------------------------------


class _GenerationTag(Extension):
    """The tag {% generation %}...{% endgeneration %}: it marks in a template what the assistant wrote; here only its
    content counts."""

    tags = {"generation"}  # noqa: RUF012  (jinja's own declaration)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(list(parser.parse_statements(("name:endgeneration",), drop_needle=True)), lineno=line)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols], finalize=_finalize
        )
        self.filters["tojson"] = _tojson
        self.filters = {name: _paying_filter(name, function) for name, function in self.filters.items() if name != "urlize"}
        self.filters |= {"lopt_pay": _pay, "lopt_concat": _concat, "lopt_made": _made}
        self.tests = {name: _paying_test(function) for name, function in self.tests.items()}
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _Dict(),
            "namespace": _Namespace,
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Payments().visit(super()._parse(source, name, filename))
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in FORBIDDEN and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        METER.get().pay(price_of_operator(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        meter = METER.get()
        meter.pay_for(args, kwargs)
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            args = bounded_arguments(getattr(__obj, "__name__", ""), args)
            meter.pay(price_of_method(owner, getattr(__obj, "__name__", ""), args, kwargs))
        result = super().call(__context, __obj, *args, **kwargs)
        return paid(result)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        text = value.__self__

        @wraps(wrapped)
        def priced(*args: Any, **kwargs: Any) -> str:
            METER.get().pay(price_of_fields(text, "{", (args, kwargs)))
            return wrapped(*args, **kwargs)

        return priced


class _Payments(NodeTransformer):
    """A visitor that puts the payments into a parsed template."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.body.insert(0, _payment(1, node.lineno))
        return node

    def visit_Output(self, node: nodes.Output) -> list[nodes.Node]:
        self.generic_visit(node)
        length = sum(len(child.data) for child in node.nodes if isinstance(child, nodes.TemplateData))
        return [_payment(length, node.lineno), node] if length else [node]

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter("lopt_concat", nodes.List(node.nodes, lineno=node.lineno))

    def visit_List(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else _filter("lopt_made", node)

    visit_Tuple = visit_Dict = visit_List


def _filter(name: str, value: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(value, name, [], [], None, None, lineno=value.lineno)


def _payment(price: int, line: int) -> nodes.ExprStmt:
    return nodes.ExprStmt(_filter("lopt_pay", nodes.Const(price, lineno=line)), lineno=line)


@pass_context  # what takes the context is not folded at compile time
def _pay(_: object, price: int) -> None:
    METER.get().pay(price)


@pass_context
def _concat(_: object, values: list[Any]) -> str:
    METER.get().pay_for(values, text=True)
    return "".join(str(value) for value in values)


@pass_context
def _made(_: object, value: Any) -> Any:
    METER.get().pay_for(value)
    return value


@pass_context
def _finalize(_: object, value: Any) -> Any:
    METER.get().pay_for(value, text=True)
    return value


def _paying_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    skipped = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)  # with its jinja_pass_arg
    def paying(*args: Any, **kwargs: Any) -> Any:
        value, rest = (args[skipped] if len(args) > skipped else None), args[skipped + 1 :]
        if name in ("join", "sum", "sort", "unique", "groupby", "min", "max") and isinstance(value, Iterable):
            value = value if isinstance(value, (Sequence, Mapping)) else list(value)
            args = (*args[:skipped], value, *rest)
        meter = METER.get()
        if name in SHALLOW:
            meter.pay_for(rest, kwargs)
        else:
            meter.pay_for(value, rest, kwargs, text=True)
        meter.pay(price_of_filter(name, value, rest, kwargs))
        return paid(function(*args, **kwargs))

    return paying


def _paying_test(function: Any) -> Callable[..., Any]:
    @wraps(function)
    def paying(*args: Any, **kwargs: Any) -> Any:
        METER.get().pay(1 + sum(len(value) // 16 for value in args if isinstance(value, (str, Sequence, Mapping))))
        return function(*args, **kwargs)

    return paying


# --- what transformers adds to jinja ----------------------------------------------------------------------------------


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> NoReturn:
    raise jinja2.TemplateError(str(message)[:1000])


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 200 or re.search(r"%[^a-zA-Z%]*\d", pattern):
        raise TemplateLimit("it formats the date with a width, or in more than 200 characters")
    return FIXED_DATE.strftime(pattern)


class _Dict:
    """The functions dict() and dict.fromkeys(), without the type's attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        values = dict(*args, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"  # its content could hold itself many times over


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace takes no name that begins with an underscore ({name[:40]!r})")
