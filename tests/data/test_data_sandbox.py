"""Chat templates in the sandbox: what transformers renders, and an end to every template that does or makes too much."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time

import pytest

from lopt_edge.data import Conversation, encode_row, load_template, sandbox, template_meter
from lopt_edge.data.sandbox import render
from lopt_edge.data.template_meter import TemplateLimit
from lopt_edge.errors import InputError

CHAT = [{"role": "user", "content": "hi there"}, {"role": "assistant", "content": "yes"}]
GROW = "{% set ns = namespace(x=START) %}{% for i in range(100) %}{% set ns.x = NEXT %}{% endfor %}{{ ns.x }}"


def grow(start: str, following: str) -> str:
    return GROW.replace("START", start).replace("NEXT", following)


# Each would take minutes to ages, or gigabytes.
BOMBS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops without a turn": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "literal text": "{% for a in range(99999) %}" + "x" * 20_000 + "{% endfor %}",
    "str * int": "{{ 'a' * 10**10 }}",
    "int * str": "{{ 10**10 * 'a' }}",
    "list * int": "{{ ([1] * 10**10)|length }}",
    "power": "{{ 2 ** (10**9) }}",
    "squares": grow("3", "ns.x * ns.x"),
    "str + str": grow("'ab'", "ns.x + ns.x"),
    "str ~ str": grow("'ab'", "ns.x ~ ns.x"),
    "a list of itself twice": grow("['ab']", "[ns.x, ns.x]"),
    "a dict of itself twice": grow("['ab']", "{'a': ns.x, 'b': ns.x}"),
    "dict()": grow("['ab']", "dict(a=ns.x, b=ns.x)"),
    "batch's filling": grow("['ab']", "[1]|batch(30, ns.x)|list|first"),
    "arguments of a macro": "{% macro m() %}{% set ns.x = varargs %}{% endmacro %}" + grow("['ab']", "ns.x")
    .replace("{% endfor %}", "{{ m(ns.x, ns.x) }}{% endfor %}"),
    "a block of itself twice": "{% set ns = namespace(x='ab') %}{% for i in range(100) %}{% set y %}{{ ns.x }}{{ ns.x }}"
    "{% endset %}{% set ns.x = y %}{% endfor %}",
    "calls of itself": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "center": "{{ 'a'|center(10**10) }}",
    "map center": "{{ ['a']|map('center', 10**10)|list }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "zfill": "{{ '1'.zfill(10**10) }}",
    "expandtabs": "{{ ('\t' * 1000).expandtabs(10**9) }}",
    "format filter": "{{ '%9999999999d'|format(1) }}",
    "percent": "{{ '%9999999999d' % 1 }}",
    "percent star": "{{ '%*d' % (10**9, 1) }}",
    "str.format": "{{ '{:>9999999999}'.format(1) }}",
    "str.format nested": "{{ '{:{}}'.format('a', 10**10) }}",
    "batch": "{{ [1]|batch(10**10, 'x')|list }}",
    "slice": "{{ [1]|slice(10**10)|list|length }}",
    "indent": "{{ ('a\n' * 1000)|indent(10**9) }}",
    "tojson": "{{ [1]|tojson(indent=10**9) }}",
    "wordwrap": "{{ ('a ' * 10000)|wordwrap(1, wrapstring='x' * 10000) }}",
    "replace filter": "{{ ('a' * 1000)|replace('a', 'b' * 1000)|replace('b', 'c' * 1000) }}",
    "str.replace": "{{ ('a' * 1000).replace('', 'b' * 10000) }}",
    "join filter": "{{ (['a' * 1000] * 900)|join('b' * 1000) }}",
    "str.join": "{{ ('b' * 100000).join(['a'] * 10000) }}",
    "sum of lists": "{{ (range(99999)|batch(1)|list)|sum(start=[])|length }}",
    "a long search in a loop": "{% set l = range(99999)|list %}{% for a in l %}{% if -1 in l %}{% endif %}{% endfor %}",
    "date": "{{ strftime_now('%999999999Y') }}",
    "long source": "x" * 10**7,
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_stopped_in_seconds(name, monkeypatch):
    monkeypatch.setattr(template_meter, "MAX_SECONDS", 0.4)
    start = time.process_time()
    with pytest.raises(TemplateLimit):
        render(BOMBS[name], CHAT)
    assert time.process_time() - start < 3


def test_no_bomb_takes_much_memory():
    """All of them in one process, whose data is limited to 400 MB more than after the imports."""
    code = """
import resource, sys
from pathlib import Path
from lopt_edge.data import template_meter
from lopt_edge.data.sandbox import render
from tests.data.test_data_sandbox import BOMBS, CHAT
template_meter.MAX_SECONDS = 0.5
pages = int(Path("/proc/self/statm").read_text().split()[5])
resource.setrlimit(resource.RLIMIT_DATA, (pages * resource.getpagesize() + 400 * 2**20,) * 2)
for name, source in BOMBS.items():
    try:
        render(source, CHAT)
    except template_meter.TemplateLimit:
        continue
    sys.exit(name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_limits_hold_in_a_worker_thread():
    found: list[BaseException] = []

    def work() -> None:
        try:
            render(BOMBS["nested loops"], CHAT)
        except TemplateLimit as error:
            found.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2


def test_the_clock_stands_behind_the_count(monkeypatch):
    monkeypatch.setattr(template_meter, "MAX_SECONDS", 0.2)
    monkeypatch.setattr(template_meter, "BASE_UNITS", 10**12)
    start = time.monotonic()
    with pytest.raises(TemplateLimit, match=r"longer than 0\.2 seconds"):
        render(BOMBS["nested loops"], CHAT)
    assert time.monotonic() - start < 5


def test_a_bomb_names_template_and_row(make_tokenizer, write):
    """A template that only a long row sets off: the row's file and line are told, and the template."""
    source = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content if m.content|length < 30 else 'a' * 10**10 }}"
    path = write(
        "t.jinja", source + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = make_tokenizer("chatml")
    template, _ = load_template(tokenizer, path)
    row = Conversation((("user", "x" * 40), ("assistant", "y")), "rows.jsonl:7")
    with pytest.raises(InputError, match=r"(?s)rows\.jsonl:7: the chat template .*t\.jinja cannot render.*too much"):
        encode_row(row, tokenizer, template, 500)


@pytest.mark.parametrize("source", ["{% for m in messages %}", BOMBS["str * int"], "{{ messages[0].content }}"])
def test_a_template_that_fails_at_load_is_named(make_tokenizer, source):
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = source
    with pytest.raises(InputError, match="the model's chat template") as caught:
        load_template(tokenizer)
    assert caught.value.where


ESCAPES = ["{{ ''.__class__ }}", "{{ ''|attr('__class__') }}", "{{ messages.append(1) }}", "{{ 'a'.encode() }}",
           "{{ lipsum(9) }}",
           "{{ 'a'|urlize }}", "{{ (1).to_bytes(10**9, 'big') }}", "{{ namespace(__class__=1) }}",
           "{{ '{0.__class__}'.format(1) }}",
           "{% include '/etc/passwd' %}", "{% extends '/etc/passwd' %}", "{{ self.__init__ }}", "{{ dict.__class__ }}",
           "{{ raise_exception('no') }}", "{{ messages.__class__.__base__.__subclasses__() }}"]  # fmt: skip


@pytest.mark.parametrize("source", ESCAPES)
def test_what_a_template_may_not_do(source):
    try:
        text = render(source, CHAT)
    except Exception as error:
        assert not isinstance(error, AttributeError | NameError) or "sandbox" not in str(error)
    else:
        assert text == "", "an unsafe attribute is undefined"


FEATURES = [
    "{%- set ns = namespace(a=1, b=[]) -%}{%- for m in messages -%}{%- set ns.a = ns.a + loop.index -%}"
    "{{ ns.a }}{% endfor %}",
    "{{ messages | map(attribute='role') | join(', ') }} {{ messages|length }} {{ messages[::-1][0]['content'] }}",
    "{{ messages | tojson }} {{ messages[0] | tojson(indent=2) }} {{ {'a': [1, (2, 3)]} }} {{ dict(a=1) }}",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}"
    "{{ m.content|trim|upper ~ 1 ~ none }}{% break %}{% endfor %}",
    "{% macro f(x, y='d') %}[{{ x }}{{ y }}{{ varargs }}{{ caller() if caller else '' }}]{% endmacro %}"
    "{{ f(1) }}{{ f(1, 2, 3) }}"
    "{% call f('q') %}inside{% endcall %}",
    "{% generation %}{% set x = 3 %}{{ x }} {% endgeneration %}{{ x is defined }}",
    "{{ 'a-b-c'.split('-') | last }} {{ 'a%sb%d' % ('x', 2) }} {{ '{}-{:>4}'.format('a', 'b') }} {{ 7 // 2 }} {{ 2 ** 5 }}",
    "{% set x %}block {{ bos_token }}{% endset %}{{ x * 2 }}{{ [x] * 2 }}{{ -1 + 2 * 3 }}{{ 'y' if x else 'n' }}",
    "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}{% for a, b in [(1, 2), (3, 4)] %}"
    "{{ a }}{{ b }}{% endfor %}",
    "{% filter upper %}abc{% endfilter %}{{ [3, 1, 2]|sort }}{{ [1, 2, 3]|batch(2)|list }}{{ {'b': 1, 'a': 2}|dictsort }}",
    "{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{% else %}none{% endfor %}"
    "{{ undefined_name }}",
    "{% block b %}{{ 1 }}{% endblock %}{{ self.b() }}  \n  {% if true %}\n lstrip\n{% endif %}\n",
    "{{ ['a', 'b']|join }}{{ '-'.join(messages|map(attribute='role')) }}{{ ('x', 'y') }}{{ [1,2,3]|sum }}"
    "{{ 3.7|round|int }}",
    "{{ messages|selectattr('role', 'equalto', 'user')|list|length }}{{ 'a' in 'abc' }}"
    "{{ 'a\nb'|indent(2) }}{{ tools is none }}",
]  # fmt: skip


@pytest.mark.parametrize("source", FEATURES)
def test_the_text_is_that_of_transformers(make_tokenizer, source):
    tokenizer = make_tokenizer("chatml")
    expected = tokenizer.apply_chat_template(CHAT, chat_template=source, tokenize=False)
    assert render(source, CHAT, special_tokens=tokenizer.special_tokens_map) == expected


def test_a_long_conversation_spends_little(monkeypatch):
    spent = []

    class Watched(template_meter.Meter):
        def __init__(self, units: int) -> None:
            super().__init__(units)
            spent.append(self)

    monkeypatch.setattr(sandbox, "Meter", Watched)
    from tests.data.conftest import CHATML, LLAMA3, MISTRAL, PHI3, QWEN3

    chat = [{"role": ("user", "assistant")[i % 2], "content": "hello there, " * 8} for i in range(1000)]
    for source in (CHATML, LLAMA3, MISTRAL, PHI3, QWEN3):
        assert len(render(source, chat, special_tokens={"bos_token": "<s>", "eos_token": "</s>"})) > 100_000
        assert spent[-1].units - spent[-1].left < 0.05 * spent[-1].units, "20 times as much would still be rendered"


def test_special_tokens_and_dates_reach_the_template():
    text = render("{{ bos_token }}{{ strftime_now('%Y') }}", CHAT, special_tokens={"bos_token": "<s>"})
    assert re.fullmatch(r"<s>2024", text)
