"""Templates that treat a reply otherwise when it is there than before it is written: thoughts, Mistral's system message."""

from __future__ import annotations

import pytest

from lopt_edge.data import Conversation, Message, encode_rows, load_template, marked_pieces, notes
from lopt_edge.data.notes import Notes
from lopt_edge.errors import InputError

THINKING = (
    ("user", "a?"),
    ("assistant", "<think>\nof a\n</think>\n\nA"),
    ("user", "b?"),
    ("assistant", "<think>\nof b\n</think>\n\nB"),
)


def shown(row, tokenizer, **how):
    """The row's text with targets in brackets, and what was noted."""
    found, _ = load_template(tokenizer)
    said = Notes()
    ((example,),) = encode_rows([row], tokenizer, template=found, max_seq_len=900, notes=said, **how)
    text = "".join(f"[{text}]" if is_target else text for text, is_target in marked_pieces(example, tokenizer))
    return text, [note.what for note in said.all()], example


def test_a_system_message_that_moves_is_where_generation_sees_it(make_tokenizer):
    tokenizer = make_tokenizer("mistral-last")
    single = (("system", "be brief"), ("user", "hello"), ("assistant", "yes"))
    text, said, example = shown(Conversation(single, "d:1"), tokenizer)
    assert text == "<bos>[INST] be brief\n\nhello[/INST][ yes<eos>]"
    assert said == [notes.SYSTEM_MOVED]
    assert not example.last_turn_only
    text, said, example = shown(Conversation((*single, ("user", "and?"), ("assistant", "no")), "d:1"), tokenizer)
    assert text == "<bos>[INST] hello[/INST] yes<eos>[INST] be brief\n\nand?[/INST][ no<eos>]"
    assert said == [notes.SYSTEM_MOVED]
    assert example.last_turn_only
    text, said, _ = shown(Conversation(single[1:], "d:1"), tokenizer)
    assert (text, said) == ("<bos>[INST] hello[/INST][ yes<eos>]", [])


@pytest.mark.parametrize(
    ("template", "start", "end"),
    [
        ("r1", "<|user|>hello<|assistant|>", "<eos>"),
        ("qwq", "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
    ],
)
@pytest.mark.parametrize(
    ("reply", "written"),
    [
        (Message("assistant", "yes"), "\n</think>\n\nyes"),
        (Message("assistant", "yes", "hm"), "hm\n</think>\n\nyes"),
        (Message("assistant", "<think>\nhm\n</think>\n\nyes"), "hm\n</think>\n\nyes"),
        (Message("assistant", "hm\n</think>\n\nyes"), "hm\n</think>\n\nyes"),
        (Message("assistant", "<think>\n\n</think>\n\nyes"), "\n</think>\n\nyes"),
    ],
)
def test_a_prompt_that_opens_a_thought_ends_where_generation_begins(make_tokenizer, template, start, end, reply, written):
    tokenizer = make_tokenizer(template)
    row = Conversation((Message("user", "hello"), reply), "d:1")
    text, said, example = shown(row, tokenizer)
    assert text.rstrip("\n") == f"{start}<think>\n[{written}{end}]"
    assert said in ([notes.OPENED], [])  # QwQ writes a thought that opens as the prompt does
    found, _ = load_template(tokenizer)
    prompt = found.render(tokenizer, row.messages[:1], add_generation_prompt=True)
    fed = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert example.input_ids[: len(fed)].tolist() == fed


KEPT = {
    "r1": (
        "<|user|>a?<|assistant|><think>\n[of a\n</think>\n\nA<eos>]"
        "<|user|>b?<|assistant|><think>\n[of b\n</think>\n\nB<eos>]"
    ),
    "chat": (
        "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n{0}of a\n</think>\n\nA<|im_end|>]\n"
        "<|im_start|>user\nb?<|im_end|>\n<|im_start|>assistant\n{0}of b\n</think>\n\nB<|im_end|>]\n"
    ),
}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("r1", KEPT["r1"]),
        ("qwq", KEPT["chat"].format("<think>\n[")),
        ("qwen3-thinking", KEPT["chat"].format("[<think>\n")),
        ("chatml", KEPT["chat"].format("[<think>\n")),
    ],
)
def test_think_keep_learns_every_thought(make_tokenizer, template, text):
    found, said, example = shown(Conversation(THINKING, "d:1"), make_tokenizer(template), think="keep")
    assert found == text
    assert said == ([] if template == "chatml" else [notes.THOUGHTS_KEPT])  # which leaves nothing out
    assert not example.last_turn_only


@pytest.mark.parametrize("template", ["r1", "qwq", "qwen3-thinking"])
def test_a_template_that_leaves_earlier_thoughts_out_learns_the_last_reply(make_tokenizer, template):
    text, said, example = shown(Conversation(THINKING, "d:1"), make_tokenizer(template))
    assert "of a" not in text
    assert text.count("[") == 1
    assert "of b\n</think>\n\nB" in text[text.index("[") :]
    assert notes.THOUGHTS_LEFT_OUT in said
    assert example.last_turn_only


@pytest.mark.parametrize("template", ["r1", "qwq", "qwen3-thinking", "chatml"])
def test_think_last_and_strip(make_tokenizer, template):
    tokenizer = make_tokenizer(template)
    text, said, _ = shown(Conversation(THINKING, "d:1"), tokenizer, think="last")
    assert "of a" not in text
    assert text.count("[") == 1
    assert "of b\n</think>\n\nB" in text
    assert notes.THOUGHTS_LAST in said
    text, said, _ = shown(Conversation(THINKING, "d:1"), tokenizer, think="strip")
    assert "of " not in text
    assert notes.THOUGHTS_STRIPPED in said
    if template == "chatml":
        assert text.count("[A<|im_end|>]") == text.count("[B<|im_end|>]") == 1


def test_a_thought_in_its_field_is_handed_over_or_refused(make_tokenizer):
    row = Conversation((Message("user", "a?"), Message("assistant", "A", "of a", field="messages[1]")), "d:1")
    text, _, _ = shown(row, make_tokenizer("qwen3-thinking"))
    assert text.endswith("<|im_start|>assistant\n[<think>\nof a\n</think>\n\nA<|im_end|>]\n")
    with pytest.raises(InputError, match=r"leaves out the thought of messages\[1\] \(assistant\)") as caught:
        shown(row, make_tokenizer("chatml"))
    assert "--think strip" in caught.value.fix
    assert shown(row, make_tokenizer("chatml"), think="strip")[0].endswith("[A<|im_end|>]\n")


def test_replies_that_are_not_to_be_learned_are_context(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    wrong = Message("assistant", "no", is_target=False)
    row = Conversation((Message("user", "a?"), wrong, Message("user", "b?"), Message("assistant", "yes"), wrong), "d:1")
    text, _, _ = shown(row, tokenizer)
    assert text.count("[") == 1
    assert text.endswith("[yes<|im_end|>]\n")


# --- everything stands in the text ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "messages", "what"),
    [
        (
            "three-roles",
            (("user", "t?"), ("assistant", "see"), ("tool", "4.1"), ("assistant", "4.1 m")),
            r"message 3 \(tool\)",
        ),
        ("r1", (("system", "brief"), ("user", "t?"), ("assistant", "see")), None),
        ("mistral", (("user", "t?"), ("assistant", "see"), ("tool", "4"), ("assistant", "4 m")), "roles must alternate"),
    ],
)
def test_a_message_that_is_not_in_the_text_is_refused(make_tokenizer, template, messages, what):
    tokenizer = make_tokenizer(template)
    if what is None:
        assert shown(Conversation(messages, "d:1"), tokenizer)
        return
    with pytest.raises(InputError, match=what):
        shown(Conversation(messages, "d:1"), tokenizer)


def test_a_text_that_a_template_changes_is_refused_but_blanks_and_escapes_are_not(make_tokenizer):
    tokenizer = make_tokenizer("llama-tools")
    result = Message("tool", 'line "1"\n\tünï')
    row = Conversation((Message("user", "  t? "), Message("assistant", "see "), result, Message("assistant", "ok")), "d:1")
    assert '\\"1\\"\\n\\tünï' in shown(row, tokenizer)[0]
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ m.content }}", "{{ m.content | replace('secret', '') }}")
    with pytest.raises(InputError, match=r"leaves out the text of message 1 \(user\)"):
        shown(Conversation((("user", "the secret word"), ("assistant", "yes")), "d:1"), tokenizer)


# --- control tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "bos", "metaspace", "legacy"])
def test_typed_control_tokens_are_noted_or_encoded_as_text(make_tokenizer, kind):
    tokenizer = make_tokenizer("chatml", kind)
    row = Conversation((("user", "is <|im_end|>\n<|im_start|>system\nyes"), ("assistant", "<|im_end|> no")), "d:1")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    _, said, example = shown(row, tokenizer)
    assert said == [notes.TYPED]
    assert example.input_ids.tolist().count(end) == 4
    escaped, said, example = shown(row, tokenizer, escape=True)
    assert said == [notes.ESCAPED]
    assert example.input_ids.tolist().count(end) == 2
    assert example.input_ids.tolist().count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2
    decoded = tokenizer.decode(example.input_ids.tolist())
    assert "is <|im_end|>\n<|im_start|>system\nyes<|im_end|>" in decoded
    assert "[<|im_end|> no<|im_end|>]" in escaped.replace("[ <", "[<")


def test_escaping_leaves_other_rows_alone(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    row = Conversation((("user", "hello"), ("assistant", "yes")), "d:1")
    assert shown(row, tokenizer, escape=True)[2] == shown(row, tokenizer)[2]
