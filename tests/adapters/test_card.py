"""The model card says what run.json says, and no name of a foreign folder becomes markup, a key or code on it."""

from __future__ import annotations

import ast
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from lopt_edge.adapters.card import model_card
from quant.untrusted import printable_name

NAMES = [
    "org/a-model_0.5B",
    "/models/`x`",
    "/models/a\nlicense: other\n---\n# fake",
    '/models/"); import os; os.system("x") #',
    "/models/'''\n```\n<script>alert(1)</script>",
    "/models/[click](http:evil)![i](j)<b>*bold*_it_~~s~~",
    "/models/\x1b[31m\u202e\u2028\x85{{ x }}: - & * %",
    "key: [value",
]


def card(base: str, copy: str = "/cache/x") -> str:
    run: dict[str, Any] = {
        "base": base,
        "quantised_folder": copy,
        "versions": {"lopt-edge": "0"},
        "config": {"method": "e2e"},
        "totals": {"steps": 1, "tokens": 2, "supervised_tokens": 1},
        "scored_tokens": {"eval_loss": 7},
        "evaluation": {"before": {"eval_loss": 2.0}, "after": {"eval_loss": 1.0}},
    }
    return model_card(run, run_file="run.json", log_file="metrics.jsonl")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_stays_a_name(name):
    text = card(name, name)
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": printable_name(name), "library_name": "peft", "pipeline_tag": "text-generation",
        "tags": ["lora", "lopt-edge"],
    }  # fmt: skip
    parser = MarkdownIt("commonmark", {"html": True})
    tokens, honest = parser.parse(body), parser.parse(card("a").split("---\n", 2)[2])
    assert [token.type for token in tokens] == [token.type for token in honest]
    heading = tokens[1]
    assert heading.children is not None and {child.type for child in heading.children} <= {"text", "text_special"}
    code = next(token.content for token in tokens if token.type == "fence")
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert len(calls) == 3 and calls[0].args[0].value == name  # type: ignore[attr-defined]


def test_the_honest_name_is_readable():
    assert "# LoRA adapter for a-model\\_0.5B\n" in card("org/a-model_0.5B")
    assert "| eval loss | 7 | 2.0000 | 1.0000 |" in card("a")
