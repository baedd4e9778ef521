"""From a file to a dataset: counts, refusals, split, and what `data check` shows."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from lopt_edge.data import check_facts, check_report, fingerprint_of, load_dataset, split
from lopt_edge.errors import InputError

CHATS = [
    {"messages": [{"role": "user", "content": f"hello {n}"}, {"role": "assistant", "content": "yes " * n}]}
    for n in range(1, 21)
]
PAIRS = [{"prompt": f"hello {n}", "completion": " yes" * n} for n in range(1, 21)]


def shown(dataset, tokenizer, **settings):
    out = io.StringIO()
    Console(file=out, width=120, **settings).print(check_report(dataset, tokenizer))
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "data_format"),
    [
        ("d.jsonl", CHATS, "messages"),
        ("d.jsonl", PAIRS, "prompt-completion"),
        ("d.csv", "instruction,output\nhello,yes\nwhat,no\n", "alpaca"),
        ("d.txt", "hello there. " * 50, "text"),
    ],
)
def test_load(make_tokenizer, write, name, content, data_format):
    dataset = load_dataset(write(name, content), make_tokenizer(), max_seq_len=100)
    assert dataset.format == data_format
    assert dataset.reason
    assert dataset.template_reason
    assert (dataset.template is not None) == (data_format in ("messages", "alpaca"))
    assert dataset.n_supervised > 0
    assert len(dataset.fingerprint) == 64
    facts = check_facts(dataset)
    assert facts["examples"] == len(dataset.examples) == len(dataset.lengths)
    assert facts["tokens"] == sum(dataset.lengths)


def test_what_is_lost_is_counted(make_tokenizer, write):
    tokenizer = make_tokenizer()
    whole = load_dataset(write("a.jsonl", CHATS), tokenizer, max_seq_len=500)
    assert (whole.n_truncated, whole.n_dropped) == (0, 0)
    long_prompt = {"messages": [{"role": "user", "content": "hello " * 99}, {"role": "assistant", "content": "yes"}]}
    dataset = load_dataset(write("b.jsonl", [*CHATS, long_prompt]), tokenizer, max_seq_len=30)
    too_long = sum(length > 30 for length in whole.lengths)
    assert 0 < too_long < 20
    assert (dataset.n_rows, dataset.n_truncated, dataset.n_dropped) == (21, too_long, 1)
    assert len(dataset.examples) == 20


def test_no_target_at_all_is_refused(make_tokenizer, write):
    path = write("d.jsonl", CHATS)
    with pytest.raises(InputError, match=r"no token to learn from is left within 4 tokens \(20 rows") as caught:
        load_dataset(path, make_tokenizer(), max_seq_len=4)
    assert caught.value.where == str(path)


@pytest.mark.parametrize("max_seq_len", [1, 0, -1])
def test_short_limits_are_refused(make_tokenizer, write, max_seq_len):
    with pytest.raises(InputError, match="has no target"):
        load_dataset(write("d.jsonl", CHATS), make_tokenizer(), max_seq_len=max_seq_len)


def test_settings_without_effect_are_said(make_tokenizer, write):
    settings = {"max_seq_len": 50, "chat_template": write("t.jinja", "x")}
    assert "has no effect" in load_dataset(write("d.jsonl", PAIRS), make_tokenizer(), **settings).template_reason


def test_a_named_format_is_taken_at_its_word(make_tokenizer, write):
    path = write("d.jsonl", [{"instruction": "hello", "output": "yes", "text": "all of it"}])
    tokenizer = make_tokenizer()
    assert load_dataset(path, tokenizer, max_seq_len=50).format == "alpaca"
    assert load_dataset(path, tokenizer, max_seq_len=50, data_format="text").format == "text"
    with pytest.raises(InputError, match=r"d.jsonl:1: field 'messages' is missing"):
        load_dataset(path, tokenizer, max_seq_len=50, data_format="messages")


def test_fingerprint_follows_ids_and_masks(make_tokenizer, write):
    tokenizer = make_tokenizer()
    one = load_dataset(write("a.jsonl", PAIRS), tokenizer, max_seq_len=50)
    same = load_dataset(write("b.jsonl", PAIRS), tokenizer, max_seq_len=50)
    assert one.fingerprint == same.fingerprint
    moved = [{"prompt": row["prompt"] + " yes", "completion": row["completion"][4:]} for row in PAIRS[1:]]
    shifted = load_dataset(write("c.jsonl", moved), tokenizer, max_seq_len=50)
    assert [e.input_ids for e in shifted.examples] == [e.input_ids for e in one.examples[1:]]
    assert shifted.fingerprint != fingerprint_of(one.examples[1:])
    assert fingerprint_of(one.examples[::-1]) != one.fingerprint


def test_split(make_tokenizer, write):
    dataset = load_dataset(write("d.jsonl", CHATS), make_tokenizer(), max_seq_len=100)
    train, held_out = split(dataset, fraction=0.2, seed=3)
    assert (len(train.examples), len(held_out.examples)) == (16, 4)
    assert {e.where for e in train.examples}.isdisjoint(e.where for e in held_out.examples)
    order = [e.where for e in dataset.examples]
    assert [e.where for e in train.examples] == [w for w in order if w in {e.where for e in train.examples}]
    assert split(dataset, fraction=0.2, seed=3) == (train, held_out)
    assert split(dataset, fraction=0.2, seed=4)[1].fingerprint != held_out.fingerprint
    for fraction, sizes in ((0.001, (19, 1)), (0.999, (1, 19))):
        assert tuple(len(part.examples) for part in split(dataset, fraction=fraction, seed=0)) == sizes


def test_split_refusals(make_tokenizer, write):
    dataset = load_dataset(write("d.jsonl", CHATS[:1]), make_tokenizer(), max_seq_len=100)
    with pytest.raises(InputError, match="cannot be split"):
        split(dataset, fraction=0.5, seed=0)
    for fraction in (0, 1, -1, 2.0, float("nan")):
        with pytest.raises(InputError, match="not between 0 and 1"):
            split(dataset, fraction=fraction, seed=0)


def test_report_marks_targets_without_colour(make_tokenizer, write):
    tokenizer = make_tokenizer()
    dataset = load_dataset(write("d.jsonl", CHATS), tokenizer, max_seq_len=30)
    text = shown(dataset, tokenizer)
    assert "│ <|im_start|>assistant  " in text
    assert "│ ⟦yes <|im_end|>⟧  " in text
    assert "messages (the first row has 'messages'" in text
    assert f"{dataset.n_truncated} examples cut at 30 tokens" in text
    assert "█" in text
    assert "\x1b" not in text
    assert "\x1b[32m" in shown(dataset, tokenizer, force_terminal=True, color_system="standard")


def test_report_shows_markup_and_control_characters_as_text(make_tokenizer, write):
    tokenizer = make_tokenizer()
    rows = [{"prompt": "[bold]hello[/bold] \x1b[2J\x07", "completion": "[/nothing] \x9b yes"}]
    text = shown(load_dataset(write("d.jsonl", rows), tokenizer, max_seq_len=100), tokenizer)
    assert r"[bold]hello[/bold] \x1b[2J\x07⟦[/nothing]" in text
    assert not {"\x1b", "\x07", "\x9b"} & set(text)


def test_report_says_when_only_last_turns_train(make_tokenizer, write):
    tokenizer = make_tokenizer("qwen3")
    turns = [{"role": role, "content": "hello"} for role in ("user", "assistant", "user", "assistant")]
    dataset = load_dataset(write("d.jsonl", [{"messages": turns}]), tokenizer, max_seq_len=100)
    assert dataset.n_last_turn_only == 1
    assert "last turn only" in shown(dataset, tokenizer)


def test_long_examples_are_cut_in_the_report(make_tokenizer, write):
    tokenizer = make_tokenizer()
    dataset = load_dataset(write("d.txt", "hello " * 2000), tokenizer, max_seq_len=3000)
    assert "more tokens" in shown(dataset, tokenizer)


def test_encoding_is_quick(make_tokenizer, write):
    path = write("d.jsonl", CHATS * 50)
    begin = time.process_time()
    load_dataset(path, make_tokenizer("chatml"), max_seq_len=500)
    assert time.process_time() - begin < 5  # 1,000 rows; about 0.4 s of CPU when measured
