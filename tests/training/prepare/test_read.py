"""What is evaluated: the end token behind a plain text is no target of the retention loss, and targets are counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lopt_edge import finetune
from lopt_edge.config.load import load_config
from lopt_edge.errors import InputError
from lopt_edge.training.prepare.read import read_inputs

MODEL = Path(__file__).parents[3] / "examples" / "tiny-llama"
TEXTS = ["def one(): return 1", "x = 3\n" * 40, "class A: pass"]


def written(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config_of(folder: Path, texts: list[str], **more: object):
    data = written(folder / "train.jsonl", [{"text": text} for text in TEXTS])
    retention = written(folder / "retention.jsonl", [{"text": text} for text in texts])
    values = {"model": str(MODEL), "data": data, "eval_data": data, "retention_data": retention, "max_seq_len": 64,
              "output": str(folder / "out"), "device": "cpu"}  # fmt: skip
    return load_config(None, values | more)


def test_retention_scores_a_texts_own_tokens_and_training_learns_its_end_too(tmp_path):
    inputs, _ = read_inputs(config_of(tmp_path, TEXTS))
    end = inputs.tokenizer.eos_token_id
    n_rows, n_windows = len(TEXTS), len(inputs.train.examples)
    assert n_windows > n_rows, "a long text has several windows, of which only the last one has the end behind it"
    scored = {
        name: [t for example in data.examples for t, on in zip(example.input_ids, example.supervised, strict=True) if on]
        for name, data in inputs.evaluated.items()
    }
    assert scored["eval_loss"].count(end) == n_rows
    assert scored["retention_loss"].count(end) == 0
    assert len(scored["retention_loss"]) == len(scored["eval_loss"]) - n_rows
    assert inputs.train.n_supervised == len(scored["eval_loss"])


def test_retention_replies_keep_their_end(tmp_path):
    config = config_of(tmp_path, TEXTS)
    replies = [{"prompt": "a b", "completion": " c d"}]
    retention = written(tmp_path / "replies.jsonl", replies)
    inputs, _ = read_inputs(config.model_copy(update={"retention_data": retention}))
    (example,) = inputs.retention.examples
    assert example.input_ids[-1] == inputs.tokenizer.eos_token_id and example.supervised[-1] == 1


def test_a_retention_text_of_which_nothing_is_left_is_refused(tmp_path):
    with pytest.raises(InputError, match="nothing to score"):
        read_inputs(config_of(tmp_path, ["a"]))


def test_the_numbers_of_scored_tokens_are_in_the_runs_record(tmp_path):
    config = config_of(tmp_path, TEXTS, max_steps=1, batch_size=1, grad_accum=1)
    inputs, _ = read_inputs(config)
    result = finetune(config)
    expected = {"eval_loss": inputs.held_out.n_supervised, "retention_loss": inputs.retention.n_supervised}
    assert result.scored_tokens == expected
    assert json.loads((tmp_path / "out" / "run.json").read_text())["scored_tokens"] == expected
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| retention loss | {expected['retention_loss']} |" in card
