"""Targets, checked exactly: what the model is trained to write, decoded, for the templates of the model families."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from lopt_edge.data import (
    Conversation,
    PromptCompletion,
    TextRow,
    encode_row,
    encode_rows,
    load_template,
    marked_pieces,
    prompt_ids,
)
from lopt_edge.data.long_text import long_text_ids, text_pieces
from lopt_edge.data.notes import BOS_TYPED, END_TYPED, EOS_TYPED, INSIDE_TOKEN, Notes
from lopt_edge.errors import InputError, InputErrors

TWO_TURNS = (("user", "hello"), ("assistant", "yes, it is"), ("user", "and two?"), ("assistant", "no"))
WITH_SYSTEM = (("system", "be brief"), *TWO_TURNS)
KINDS = ["plain", "bos", "metaspace", "legacy"]


def example_of(row, tokenizer, max_seq_len=500):
    template = load_template(tokenizer)[0] if isinstance(row, Conversation) else None
    (example,) = encode_row(row, tokenizer, template, max_seq_len)
    return example


def learned(example, tokenizer):
    """The supervised runs as text."""
    return [text for text, supervised in marked_pieces(example, tokenizer) if supervised]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("template", "turns"),
    [
        ("chatml", ["yes, it is<|im_end|>", "no<|im_end|>"]),
        ("llama3", ["yes, it is<|eot_id|>", "no<|eot_id|>"]),
        ("phi3", ["yes, it is<|end|>", "no<|end|>"]),
        ("mistral", [" yes, it is<eos>", " no<eos>"]),
        ("none", [" yes, it is<eos>", " no<eos>"]),
        ("no-end", ["yes, it is", "no<eos>"]),
    ],
)
def test_every_turn_and_its_end_is_learned(make_tokenizer, kind, template, turns):
    tokenizer = make_tokenizer(template, kind)
    example = example_of(Conversation(TWO_TURNS, "d:1"), tokenizer)
    assert learned(example, tokenizer) == turns
    assert not example.last_turn_only


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("template", "messages", "turn"),
    [
        ("qwen3", TWO_TURNS, "<think>\n\n</think>\n\nno<|im_end|>"),
        ("mistral", WITH_SYSTEM, " no<eos>"),
    ],
)
def test_a_template_that_rewrites_earlier_turns_trains_the_last(make_tokenizer, kind, template, messages, turn):
    tokenizer = make_tokenizer(template, kind)
    example = example_of(Conversation(messages, "d:1"), tokenizer)
    assert learned(example, tokenizer) == [turn]
    assert example.last_turn_only


def test_one_rewritten_turn_leaves_the_last_only(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    thought = "{{ m.content if loop.last else m.content.split('</think>')[-1] }}"  # earlier thinking is stripped
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ m.content }}", thought)
    middle = (("user", "what"), ("assistant", "<think>it</think>four"))
    rewritten = example_of(Conversation((*TWO_TURNS[:2], *middle, *TWO_TURNS[2:]), "d:1"), tokenizer)
    assert rewritten.last_turn_only
    assert learned(rewritten, tokenizer) == ["no<|im_end|>"]
    kept = example_of(Conversation((*TWO_TURNS, *middle), "d:1"), tokenizer)
    assert learned(kept, tokenizer) == ["yes, it is<|im_end|>", "no<|im_end|>", "<think>it</think>four<|im_end|>"]


def test_a_single_turn_is_not_counted_as_last_turn_only(make_tokenizer):
    tokenizer = make_tokenizer("qwen3")
    assert not example_of(Conversation(TWO_TURNS[:2], "d:1"), tokenizer).last_turn_only


def test_a_template_that_is_not_prefix_preserving_is_named(make_tokenizer):
    tokenizer = make_tokenizer("broken")
    with pytest.raises(InputError, match="the model's chat template is not prefix-preserving") as caught:
        example_of(Conversation(TWO_TURNS, "d:1"), tokenizer)
    assert caught.value.where == "d:1"
    assert "--chat-template" in caught.value.fix


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", ["chatml", "llama3", "qwen3", "phi3", "mistral"])
def test_tokens_are_those_of_apply_chat_template(make_tokenizer, kind, template):
    tokenizer = make_tokenizer(template, kind)
    if template == "llama3":  # its date is fixed by us
        tokenizer.chat_template = tokenizer.chat_template.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")
    chat = [{"role": role, "content": content} for role, content in TWO_TURNS]
    expected = tokenizer.apply_chat_template(chat)["input_ids"]
    assert example_of(Conversation(TWO_TURNS, "d:1"), tokenizer).input_ids.tolist() == expected


def test_the_date_of_a_template_is_fixed(make_tokenizer):
    tokenizer = make_tokenizer("llama3")
    template, reason = load_template(tokenizer)
    assert "Today: 26 Jul 2024" in template.render(tokenizer, TWO_TURNS)
    assert "date is fixed" in reason


@pytest.mark.parametrize(
    ("messages", "n_context", "turns"),
    [
        ((*TWO_TURNS, ("user", "bye")), 0, ["yes, it is<|im_end|>", "no<|im_end|>"]),
        (TWO_TURNS, 3, ["no<|im_end|>"]),
        (TWO_TURNS, 2, ["no<|im_end|>"]),
        ((("assistant", "hi"), *TWO_TURNS[:2]), 0, ["yes, it is<|im_end|>"]),
        ((*TWO_TURNS[:2], ("assistant", "maybe")), 0, ["yes, it is<|im_end|>", "maybe<|im_end|>"]),
        ((*TWO_TURNS[:1], ("tool", "4"), TWO_TURNS[3]), 0, ["no<|im_end|>"]),
        ((("user", "yes<|im_end|>\n"), ("assistant", "yes\n\n")), 0, ["yes\n\n<|im_end|>"]),
        ((("user", "a"), ("assistant", "é 漢字 🙂")), 0, ["é 漢字 🙂<|im_end|>"]),
    ],
)
def test_which_turns_are_learned(make_tokenizer, messages, n_context, turns):
    tokenizer = make_tokenizer("chatml")
    assert learned(example_of(Conversation(messages, "d:1", n_context), tokenizer), tokenizer) == turns


def test_text_after_the_last_reply_is_cut_off(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    whole = example_of(Conversation((*TWO_TURNS, ("user", "bye")), "d:1"), tokenizer)
    assert whole == example_of(Conversation(TWO_TURNS, "d:1"), tokenizer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("prompt", "completion", "text"),
    [
        ("hello:", " yes", " yes<eos>"),
        ("hello: ", "yes", "yes<eos>"),
        ("hello\n", "yes", "yes<eos>"),
        ("def add(left", " , right)", " , right)<eos>"),
    ],
)
def test_completion_and_eos_are_learned(make_tokenizer, kind, prompt, completion, text):
    tokenizer = make_tokenizer("chatml", kind)
    example = example_of(PromptCompletion(prompt, completion, "d:1"), tokenizer)
    # A blank that the tokenizer joins to the reply (" yes") may come with it.
    assert "".join(learned(example, tokenizer)).lstrip(" ") == text.lstrip(" ")
    decoded = tokenizer.decode(example.input_ids.tolist()).removeprefix("<bos>")
    assert decoded.lstrip(" ") == prompt + completion + "<eos>"  # Metaspace puts a blank before the first word
    starts_with_bos = example.input_ids[0] == tokenizer.bos_token_id
    assert starts_with_bos == (kind != "plain")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("prompt", "completion"), [("def ", "add(left"), ("def ad", "d(left"), ("def:", " add"), ("é", " é\n")]
)
def test_prompt_and_completion_are_not_joined_in_a_token(make_tokenizer, kind, prompt, completion):
    tokenizer = make_tokenizer("chatml", kind)
    notes = Notes()
    ((example,),) = encode_rows(
        [PromptCompletion(prompt, completion, "d:1")], tokenizer, template=None, max_seq_len=50, notes=notes
    )
    assert learned(example, tokenizer) == [f"{completion}<eos>"]
    fed = prompt_ids(prompt, tokenizer)  # by generate --raw
    assert example.input_ids[: len(fed)].tolist() == fed
    assert not any(example.supervised[: len(fed)])
    joined = tokenizer(prompt + completion)["input_ids"][: len(fed)] != fed
    assert [note.what for note in notes.all()] == [INSIDE_TOKEN] * joined
    assert joined == (prompt in ("def ", "def ad")) or kind == "legacy"


def test_a_token_of_a_reply_that_takes_a_blank_from_the_template_is_a_target(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}" + (
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    example = example_of(Conversation((("user", "def"), ("assistant", "add")), "d:1"), tokenizer)
    assert learned(example, tokenizer) == [" add<|im_end|>"]  # as apply_chat_template has it


def test_typed_ends_are_not_doubled(make_tokenizer):
    tokenizer = make_tokenizer("chatml", "bos")
    notes = Notes()
    rows = [
        TextRow("<bos>yes<eos>", "d:1"),
        PromptCompletion("<bos>hello:", " yes<eos>", "d:2"),
        Conversation((("user", "hello"), ("assistant", "yes<|im_end|>")), "d:3"),
        TextRow("yes", "d:4"),
    ]
    template = load_template(tokenizer)[0]
    found = [rows[0] for rows in encode_rows(rows, tokenizer, template=template, max_seq_len=50, notes=notes)]
    texts = [tokenizer.decode(example.input_ids.tolist()) for example in found]
    turns = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    assert texts == ["<bos>yes<eos>", "<bos>hello: yes<eos>", turns, "<bos>yes<eos>"]
    assert [learned(example, tokenizer) for example in found[:3]] == [["yes<eos>"], [" yes<eos>"], ["yes<|im_end|>"]]
    said = {note.what: note.places for note in notes.all()}
    assert said == {BOS_TYPED: ("d:1", "d:2"), EOS_TYPED: ("d:1", "d:2"), END_TYPED: ("d:3",)}
    assert prompt_ids("<bos>hello:", tokenizer) == prompt_ids("hello:", tokenizer)


def test_a_tokenizer_that_appends_eos_does_not_end_a_prompt(make_tokenizer):
    tokenizer = make_tokenizer("chatml", "bos")
    template = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=[("<bos>", 0), ("<eos>", 1)])
    tokenizer.backend_tokenizer.post_processor = template
    assert tokenizer("hello")["input_ids"][-1] == tokenizer.eos_token_id
    example = example_of(PromptCompletion("hello", " yes", "d:1"), tokenizer)
    fed = prompt_ids("hello", tokenizer)
    assert fed == tokenizer("hello")["input_ids"][:-1] == example.input_ids[: len(fed)].tolist()
    assert example.input_ids.tolist().count(tokenizer.eos_token_id) == 1


def test_trimmed_offsets_do_not_leak_the_prompt(make_tokenizer):
    tokenizer = make_tokenizer("chatml", "bos")
    # The prompt's last blanks are reported at the start of the reply by a tokenizer with trim_offsets.
    text = "hello: \t  quickyes"
    assert any(start == end for start, end in tokenizer(text, return_offsets_mapping=True)["offset_mapping"][1:])
    example = example_of(PromptCompletion("hello:   ", "\tquick", "d:1"), tokenizer)
    assert learned(example, tokenizer) == ["\tquick<eos>"]


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_learned_whole_and_cut_into_windows(make_tokenizer, kind):
    tokenizer = make_tokenizer("chatml", kind)
    text = "The quick brown fox jumps over the lazy dog. " * 20
    whole = example_of(TextRow(text, "d:1"), tokenizer, max_seq_len=10_000)
    assert whole.supervised == b"\0" + b"\1" * (len(whole) - 1)
    assert whole.input_ids[-1] == tokenizer.eos_token_id
    windows = encode_row(TextRow(text, "d:1"), tokenizer, None, 16)
    assert [token for window in windows for token in window.input_ids] == whole.input_ids.tolist()
    assert all(len(window) == 16 for window in windows[:-1])
    assert all(window.supervised[0] == 0 and not window.truncated for window in windows)


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_gives_the_tokens_of_the_whole(make_tokenizer, kind):
    tokenizer = make_tokenizer("chatml", kind)
    rng = random.Random(0)
    words = ["quick", "brown", " ", "\n", "\n\n", "    def", "é", "漢", "<|im_end|>", "left,", "yes"]
    text = "".join(rng.choice(words) + rng.choice(["", " "]) for _ in range(30_000))
    pieces = list(text_pieces(text, tokenizer))
    assert "".join(pieces) == text
    assert len(pieces) == 4 or kind == "legacy"  # which puts a blank before every text: hardly a cut is harmless
    assert long_text_ids(text, tokenizer).tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    replies=st.lists(st.text(st.sampled_from("ab \n\té漢🙂.,"), min_size=1, max_size=12), min_size=1, max_size=3),
    template=st.sampled_from(["chatml", "llama3", "phi3", "none", "no-end"]),
    kind=st.sampled_from(KINDS),
)
def test_nothing_but_replies_is_learned(make_tokenizer, replies, template, kind):
    tokenizer = make_tokenizer(template, kind)
    messages = [message for reply in replies for message in (("user", "QUESTION"), ("assistant", f"R{reply}R"))]
    example = example_of(Conversation(tuple(messages), "d:1"), tokenizer)
    end = load_template(tokenizer)[0].turn_end
    runs = learned(example, tokenizer)
    expected = [f"R{reply}R{end}" for reply in replies]
    expected[-1] += "<eos>" if template == "no-end" else ""
    # The blank that a Metaspace tokenizer puts after a special token may come with a reply.
    assert [run.lstrip(" ") for run in runs] == expected


def test_long_conversations_lose_their_right_end(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    row = Conversation((("user", "hello"), ("assistant", "yes " * 50)), "d:1")
    whole = example_of(row, tokenizer)
    cut = example_of(row, tokenizer, max_seq_len=20)
    assert cut.truncated
    assert not whole.truncated
    assert cut.input_ids == whole.input_ids[:20]
    assert cut.supervised == whole.supervised[:20]
    assert encode_row(row, tokenizer, load_template(tokenizer)[0], 3) == []


def test_the_first_token_is_never_a_target(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    assert example_of(TextRow("h", "d:1"), tokenizer).supervised == b"\0\1"


def test_rows_that_a_template_refuses_are_told_together(make_tokenizer):
    tokenizer = make_tokenizer("mistral")
    bad = [Conversation((("user", "a"), ("user", "b"), ("assistant", "c")), f"d:{line}") for line in (1, 2)]
    with pytest.raises(InputErrors, match="roles must alternate") as caught:
        encode_rows(bad, tokenizer, template=load_template(tokenizer)[0], max_seq_len=50)
    assert [error.where for error in caught.value.errors] == ["d:1", "d:2"]


def test_a_tokenizer_that_cannot_encode_is_an_input_error():
    words = models.WordLevel({"<eos>": 0, "a": 1}, unk_token="<unk>")  # and no <unk>
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="<eos>")
    rows = [TextRow("a", "d:1"), TextRow("hello there", "d:2")]
    with pytest.raises(InputError, match=r"(?s)^d:1 to d:2: the tokenizer cannot encode this text .*UNK"):
        encode_rows(rows, tokenizer, template=None, max_seq_len=50)


# --- templates --------------------------------------------------------------------------------------------------------


def test_default_template_reads_as_documented(make_tokenizer):
    tokenizer = make_tokenizer("none", "bos")
    template, reason = load_template(tokenizer)
    expected = "<bos>be brief\n\nUser: hello\nAssistant: yes, it is<eos>\nUser: and two?\nAssistant: no<eos>\n"
    assert template.render(tokenizer, WITH_SYSTEM) == expected
    assert template.render(tokenizer, WITH_SYSTEM[:2], add_generation_prompt=True).endswith("User: hello\nAssistant:")
    assert "the tokenizer has none" in reason
    assert template.stop_ids(tokenizer) == (tokenizer.eos_token_id,)


NO_END_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}> {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant> {% endif %}"
)


def test_override_file_wins(make_tokenizer, write):
    tokenizer = make_tokenizer("chatml")
    template, reason = load_template(tokenizer, write("t.jinja", NO_END_TEMPLATE))
    assert "t.jinja" in reason
    assert "'<eos>' is appended" in reason
    (example,) = encode_row(Conversation(TWO_TURNS[:2], "d:1"), tokenizer, template, 500)
    assert learned(example, tokenizer) == ["yes, it is<eos>"]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ messages[7].content }}", "UndefinedError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages[0].content }}", "leaves out the assistant's reply"),
        (" \n", "empty"),
        (b"\xff", "cannot read"),
    ],
)
def test_bad_template_files(make_tokenizer, write, content, what):
    with pytest.raises(InputError, match=what):
        load_template(make_tokenizer("chatml"), write("t.jinja", content))


def test_missing_template_file_and_missing_eos(make_tokenizer, tmp_path):
    tokenizer = make_tokenizer("none")
    with pytest.raises(InputError, match="cannot read the chat template"):
        load_template(tokenizer, tmp_path / "missing.jinja")
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no end-of-sequence token"):
        load_template(tokenizer)
    with pytest.raises(InputError, match="no end-of-sequence token"):
        encode_row(TextRow("hello", "d:1"), tokenizer, None, 50)


def test_several_named_templates(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = {"default": tokenizer.chat_template, "rag": "x"}
    assert load_template(tokenizer)[0].end_token == "<|im_end|>"
    tokenizer.chat_template = {"rag": "x", "other": "y"}
    with pytest.raises(InputError, match="several chat templates"):
        load_template(tokenizer)


def test_stop_ids_hold_the_end_of_turn(make_tokenizer):
    tokenizer = make_tokenizer("llama3")
    expected = sorted([tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|eot_id|>")])
    assert list(load_template(tokenizer)[0].stop_ids(tokenizer)) == expected
