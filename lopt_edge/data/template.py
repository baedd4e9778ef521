"""The chat template: how a conversation becomes one text.

Three sources, in this order: the file that `--chat-template` names, the tokenizer's own template, and for a base model
without one this default (`<bos>` only if the tokenizer adds one; `<eos>` is the tokenizer's own, so that no token has
to be added to the vocabulary):

    <bos>The system message, if any.

    User: a question
    Assistant: the reply<eos>
    User: ...

Rules. Rendering goes through `sandbox`, because the template comes from a model's author: it cannot reach Python, and its
work, size and time have limits; whatever it raises becomes an `InputError`. The text is that of `apply_chat_template`:
the template writes every special token itself, so the tokens of training are those of chatting. Calls of `strftime_now`
are answered with one fixed date, else a run that is resumed tomorrow would see other tokens than today.

At load, one probe conversation is rendered. It shows a broken template before any row is read, and it tells what ends
an assistant turn (`<|im_end|>`, `</s>`, ...): that text is a target, so that a model learns to stop. A template that
ends a turn without any special token gets the tokenizer's eos after the last turn (`encode` appends it). A second probe, of
a tool call, tells how the template wants calls: arguments as an object or as text, content beside a call empty or absent.

Not here: which characters of the text are targets (`turns`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateSyntaxError

from lopt_edge.data import sandbox
from lopt_edge.data.rows import AnyMessage, Message, as_messages
from lopt_edge.data.tool_calls import text_of_arguments
from lopt_edge.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE_REPLY = "lopt-edge-probe"
PROBE_TOOL, PROBE_VALUE = "lopt_edge_tool", "lopt-edge-value"
PROBE_CALL = {"id": "probe0001", "type": "function", "function": {"name": PROBE_TOOL, "arguments": {"key": PROBE_VALUE}}}

DEFAULT_BODY = (
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content }}{{ '\\n\\n' }}"
    "{% elif message.role == 'assistant' %}{{ 'Assistant: ' + message.content + eos_token + '\\n' }}"
    "{% else %}{{ message.role | capitalize + ': ' + message.content + '\\n' }}{% endif %}"
    "{% endfor %}"
    # No space after the colon: it belongs to the reply's first token (" Yes" is one token in most vocabularies).
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


@dataclass(frozen=True)
class CallForm:
    """How a template wants tool calls: arguments as JSON text (else an object), content absent (else an empty text)."""

    arguments_as_text: bool
    content_absent: bool


@dataclass(frozen=True)
class ChatTemplate:
    """A jinja template with what ends its assistant turns."""

    source: str
    where: str  # the file, or "the model's chat template": what an error names
    turn_tail: str = ""  # all that follows the content of a last assistant message
    turn_end: str = ""  # the part of it that is a target: up to and with the end token
    end_token: str | None = None  # None: no special token ends a turn, so eos is appended to the last
    call_form: CallForm | None = None  # None: the template renders no tool calls

    def render(
        self,
        tokenizer: PreTrainedTokenizerBase,
        messages: Sequence[AnyMessage],
        *,
        tools: Sequence[dict[str, Any]] = (),
        add_generation_prompt: bool = False,
        where: str = "",
    ) -> str:
        """The conversation as one text, special tokens included. Raises InputError for what the template does not take."""
        chat = [_as_dict(message, self.call_form, where=where) for message in as_messages(messages)]
        tokens = {
            name: [*map(str, token)] if isinstance(token, list) else str(token)
            for name, token in tokenizer.special_tokens_map.items()
        }
        try:
            return sandbox.render(
                self.source, chat, tools=tools, add_generation_prompt=add_generation_prompt, special_tokens=tokens
            )
        except Exception as error:  # the template is foreign code: it may raise anything
            fix = "change the row to what the template takes, or give another one with --chat-template"
            line = f" (line {error.lineno})" if isinstance(error, TemplateSyntaxError) else ""
            what = f"{self.where} cannot render this{line}: {type(error).__name__}: {_first_of(error)}"
            raise InputError(what, where=where or self.where, fix=fix) from error

    def stop_ids(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
        """The tokens after which a reply is over: eos and the template's own end token."""
        ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(self.end_token) if self.end_token else None}
        return tuple(sorted(end for end in ends if end is not None))


def load_template(
    tokenizer: PreTrainedTokenizerBase, override_path: str | Path | None = None, *, for_tools: bool = False
) -> tuple[ChatTemplate, str]:
    """The template for this tokenizer, and why this one.

    Of several templates in a tokenizer the one for tools is taken where the conversations have some (`for_tools`).
    """
    if override_path is not None:
        template = ChatTemplate(_read_template(Path(override_path)), where=f"the chat template {override_path}")
        reason = f"from the file {override_path}"
    elif tokenizer.chat_template:
        template = ChatTemplate(_own_template(tokenizer, for_tools=for_tools), where="the model's chat template")
        reason = "the tokenizer's own"
    else:
        template = ChatTemplate(_default_source(tokenizer), where="the default chat template")
        reason = "the simple default (User: / Assistant:), because the tokenizer has none"
    template = replace(template, call_form=_call_form(template, tokenizer))
    template = _probed(template, tokenizer)
    if template.end_token is None:
        _require_eos(tokenizer)
        reason += f"; no special token ends its turns, so {tokenizer.eos_token!r} is appended to the last reply"
    if "strftime_now" in template.source:
        reason += f"; its date is fixed to {sandbox.FIXED_DATE:%d %b %Y}"
    return template, reason


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer itself puts before a text (usually bos, or nothing)."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return list(full[:start])
    return []


def _first_of(error: Exception) -> str:
    """The first characters of what an error says; one of Python's own may fail to say it (half a character in it)."""
    return str(error)[:300].encode("utf-8", "backslashreplace").decode()


def _read_template(path: Path) -> str:
    fix = "give a text file that holds one jinja chat template"
    try:
        if not path.is_file():
            raise OSError(0, "no such file" if not path.exists() else "not a regular file")
        with path.open("rb") as file:
            source = file.read(sandbox.MAX_SOURCE_BYTES + 4).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read the chat template ({reason})", where=str(path), fix=fix) from error
    if not source.strip():
        raise InputError("the chat template is empty", where=str(path), fix=fix)
    return source


def _own_template(tokenizer: PreTrainedTokenizerBase, *, for_tools: bool) -> str:
    try:
        return tokenizer.get_chat_template(tools=[{}] if for_tools else None)
    except ValueError as error:  # several named templates, none of them called "default"
        fix = "write the one to use to a file and give it with --chat-template"
        raise InputError(f"the model has several chat templates: {error}", where="tokenizer", fix=fix) from error


def _default_source(tokenizer: PreTrainedTokenizerBase) -> str:
    _require_eos(tokenizer)
    lead = "".join(tokenizer.convert_ids_to_tokens(leading_ids(tokenizer)))
    return "{{ " + json.dumps(lead) + " }}" + DEFAULT_BODY


def _require_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.eos_token:
        fix = "set eos_token in tokenizer_config.json; without it the model cannot learn to stop"
        raise InputError("the tokenizer has no end-of-sequence token", where="tokenizer", fix=fix)


def _probed(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """The template with what follows an assistant's content, read off a rendered probe."""
    text = template.render(tokenizer, [("user", "probe"), ("assistant", PROBE_REPLY)])
    head, found, tail = text.rpartition(PROBE_REPLY)
    if not found or not head:
        fix = "give a template that renders a user and an assistant message"
        raise InputError(f"{template.where} leaves out the assistant's reply", where=template.where, fix=fix)
    tokens = {token for token in (*tokenizer.get_added_vocab(), tokenizer.eos_token) if token and token.strip()}
    # The earliest special token of the tail; at one place the longest. Phi-3 writes "<|end|>\n<|endoftext|>".
    places = [(tail.index(token), -len(token), token) for token in tokens if token in tail]
    if not places:
        return replace(template, turn_tail=tail, turn_end=tail.rstrip())
    start, _, token = min(places)
    return replace(template, turn_tail=tail, turn_end=tail[: start + len(token)], end_token=token)


# --- what a template is given -----------------------------------------------------------------------------------------


def _as_dict(message: Message, form: CallForm | None, *, where: str) -> dict[str, Any]:
    """A message by the keys that templates read. Raises InputError for calls that this template does not render."""
    found: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.thought:  # Qwen and DeepSeek read the first, gpt-oss the second, others the third
        found |= dict.fromkeys(("reasoning_content", "thinking", "reasoning"), message.thought)
    if message.tool_calls:
        if form is None:
            fix = "give a template that does with --chat-template, or write the call into the content"
            raise InputError(f"{message.field}: the chat template renders no tool calls", where=where, fix=fix)
        found["tool_calls"] = text_of_arguments(message.tool_calls) if form.arguments_as_text else [*message.tool_calls]
        if not message.content and form.content_absent:
            found["content"] = None
    found |= {"name": message.name} if message.name is not None else {}
    return found | ({"tool_call_id": message.call_id} if message.call_id is not None else {})


def _call_form(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> CallForm | None:
    """The first form of a tool call that shows in the text with its name and its argument."""
    call = Message("assistant", "", tool_calls=(PROBE_CALL,))
    probe = (Message("user", "probe"), call, Message("tool", PROBE_REPLY, name=PROBE_TOOL, call_id="probe0001"))
    for form in (CallForm(as_text, absent) for as_text in (False, True) for absent in (False, True)):
        for messages in (probe[:2], probe):  # some render a call only once its result is there
            try:
                text = replace(template, call_form=form).render(tokenizer, messages)
            except InputError:
                continue
            if (
                PROBE_TOOL in text and PROBE_VALUE in text and f'\\"{PROBE_VALUE}' not in text
            ):  # text put into JSON once more
                return form
    return None
