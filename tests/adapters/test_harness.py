"""Tasks of lm-evaluation-harness give on our model what they give on transformers' with the same weights (the extra
`eval`); without the package, and for what is no task, they are refused before a model is loaded."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from lopt_edge import export, finetune
from lopt_edge.adapters import harness
from tools.tiny_runs import make_config

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-llama"
needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed (the extra `eval`)")
CHOICE = """
task: choose
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rows.json}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}} "
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
TEXTS = """
task: texts
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rows.json}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: byte_perplexity}]
"""
WRITTEN = """
task: written
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rows.json}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n", "."], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three tasks in a folder: their YAML files, and the rows beside them."""
    root = tmp_path_factory.mktemp("tasks")
    words = ["def area(width, height):", "The committee met on Tuesday", "return the sum of", "a quick brown fox jumps"]
    rows = [
        {"question": f"{word} " * (1 + i % 3), "choices": [words[i % 4], "nine hundred", f" {i}"], "answer": i % 3}
        for i, word in enumerate(words * 3)
    ]
    (root / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    for name, text in (("choose", CHOICE), ("texts", TEXTS), ("written", WRITTEN)):
        (root / f"{name}.yaml").write_text(text.replace("FOLDER", str(root)))
    return root


@needs_harness
@pytest.mark.usefixtures("warm_children")
def test_figures_are_those_of_transformers(folder, tmp_path, command, monkeypatch):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    config = make_config(TINY, tmp_path, max_steps=3, method="e2e", cache_dir=str(tmp_path / "cache"))
    finetune(config)
    words = ("--tasks", "choose,texts,written", "--task-folder", folder, "--device", "cpu", "--compute-dtype", "float32")
    code, out, err = command("eval", config.output, *words, "--json", "--cache-dir", tmp_path / "cache")
    assert code == 0, err
    ours = json.loads(out[out.index("{") :])
    export(config.output, merged=tmp_path / "m", onto="dequantized", dtype="float32", cache_dir=str(tmp_path / "cache"))
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32),
        AutoTokenizer.from_pretrained(TINY),
    )
    found = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", add_bos_token=True),
        tasks=["choose", "texts", "written"], task_manager=TaskManager(include_path=str(folder)), bootstrap_iters=1000,
    )["results"]  # fmt: skip
    for task in ("choose", "texts", "written"):
        theirs = harness._figures(found[task])
        assert ours["adapter"]["tasks"][task] == pytest.approx(theirs, rel=1e-4), task
    assert ours["base"]["tasks"]["texts"] != ours["adapter"]["tasks"]["texts"]
    code, out, _ = command("eval", "--model", TINY, *words, "--limit", "3", "--few-shot", "0")
    assert code == 0 and "acc_norm" in out and "±" in out and "byte_perplexity" in out


@needs_harness
def test_a_name_that_is_no_task_is_refused(folder, command):
    code, _, err = command("eval", "--model", TINY, "--tasks", "choose,chooze", "--task-folder", folder)
    assert code == 2 and "'chooze' is no task" in err


def test_what_has_no_effect_is_refused(monkeypatch, command, tmp_path):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    for words, told in (
        ((), "name the file to score, or tasks with --tasks"),
        (("--data", "x", "--limit", "3", "--as-chat"), "--limit: has no effect without --tasks"),
        (("--tasks", "a", "--exact-match", "3"), "--exact-match: has no effect without --data"),
        (("--tasks", "a", "--few-shot", "-1"), "--few-shot: must be 0 or more"),
        (("--tasks", "a"), "pip install 'lopt-edge[eval]'"),
    ):
        code, _, err = command("eval", "--model", TINY, *words)
        assert code == 2 and told in " ".join(err.split()), (words, err)
