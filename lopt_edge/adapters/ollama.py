"""A folder for Ollama: the adapter as GGUF, and a Modelfile that puts it on the base that it was trained on.

FROM names the GGUF file of the run (of a base that was a folder, the merged model is written instead), ADAPTER the
adapter, TEMPLATE the chat template in Ollama's syntax, PARAMETER stop the tokens that were trained as ends. A Jinja
template cannot be translated in general. The rule: it is rendered over a conversation with and without a system message
and compared, character for character, with what each known form gives; the one that agrees is written, and where none
does the export is refused with that reason, since a wrong template makes a good model speak garbage.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from lopt_edge.adapters.base import BaseOptions, base_of, run_of
from lopt_edge.adapters.gguf_export import Written, export_gguf, export_gguf_adapter
from lopt_edge.adapters.merged_files import END_KEY, end_token_ids
from lopt_edge.data import ChatTemplate, load_template
from lopt_edge.errors import InputError
from lopt_edge.models.gguf import gguf_in
from lopt_edge.models.tokenizer import load_tokenizer
from lopt_edge.system.files import write_text
from quant.folders import new_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lopt_edge.data.rows import AnyMessage


@dataclass(frozen=True)
class Form:
    """A known chat format: what it puts around a turn, before a reply, and how Ollama says the same."""

    turns: dict[str, str]  # by role, with {} for the text
    reply: str
    ollama: str

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """A conversation as this form has it, up to where the reply begins."""
        return "".join(self.turns[role].replace("{}", text) for role, text in messages) + self.reply


def _form(before: str, after: str, *, names: dict[str, str]) -> Form:
    """The form of formats that name the role in a header of each turn."""
    turns = {role: before.replace("ROLE", name) + "{}" + after for role, name in names.items()}
    head = {role: before.replace("ROLE", name) for role, name in names.items()}
    loop = (
        '{{- range .Messages }}{{ if eq .Role "system" }}%s{{ .Content }}%s{{ else if eq .Role "user" }}%s{{ .Content }}%s'
    )
    loop += '{{ else if eq .Role "assistant" }}%s{{ .Content }}%s{{ end }}{{ end }}%s'
    filled = loop % (head["system"], after, head["user"], after, head["assistant"], after, head["assistant"])
    return Form(turns, head["assistant"], filled)


PLAIN = {role: role for role in ("system", "user", "assistant")}
FORMS = {
    "ChatML": _form("<|im_start|>ROLE\n", "<|im_end|>\n", names=PLAIN),
    "Llama 3": _form("<|start_header_id|>ROLE<|end_header_id|>\n\n", "<|eot_id|>", names=PLAIN),
    "Phi 3": _form("<|ROLE|>\n", "<|end|>\n", names=PLAIN),
    "Zephyr": _form("<|ROLE|>\n", "</s>\n", names=PLAIN),
    "Granite": _form("<|start_of_role|>ROLE<|end_of_role|>", "<|end_of_text|>\n", names=PLAIN),
}
TALK = (("user", "One {x}"), ("assistant", "Two"), ("user", "Three"))
SYSTEM = ("system", "Be brief")


def form_of(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> tuple[str, Form, str]:
    """The known form that a template is, by name, and the system message that it puts where none is given.

    Raises InputError where it is none of them.
    """
    bos = tokenizer.bos_token if isinstance(tokenizer.bos_token, str) else ""

    def rendered(*messages: tuple[str, str]) -> str:
        given: list[AnyMessage] = [*messages]
        text = template.render(tokenizer, given, add_generation_prompt=True, where="the chat template")
        return text.removeprefix(bos) if bos and not bos.startswith("<|im_start") else text

    with_system, without = rendered(SYSTEM, *TALK), rendered(*TALK)
    for name, form in FORMS.items():
        if form.render((SYSTEM, *TALK)) != with_system:
            continue
        if form.render(TALK) == without:
            return name, form, ""
        before, _, after = form.turns["system"].partition("{}")
        default = without.removeprefix(before).split(after)[0]
        if form.render((("system", default), *TALK)) == without:
            return name, form, default
    raise InputError(
        f"its chat template is none of those that are known in Ollama's syntax ({', '.join(FORMS)})",
        where="--ollama",
        fix="write the TEMPLATE of a Modelfile by hand; export --gguf and --gguf-adapter write the files for it",
    )


def export_ollama(adapter: str | Path, folder: str | Path, *, kind: str = "f16", **base: Unpack[BaseOptions]) -> Written:
    """Write a folder (new) with a Modelfile and what it needs. Raises InputError, RunError."""
    adapter, target = Path(adapter), Path(folder)
    if target.exists():
        raise InputError("exists already", where=str(target), fix="choose a new folder for --ollama")
    say = base.get("say", warnings.warn)
    source = base_of(adapter, model=base.get("model"), revision=base.get("revision"), say=say)
    has_tokenizer = (adapter / "tokenizer_config.json").exists()
    tokenizer = load_tokenizer(adapter if has_tokenizer else source.path, say=say)
    template, _ = load_template(tokenizer)
    if template is None:
        raise InputError("has no chat template", where="--ollama", fix="export --gguf-adapter writes the adapter alone")
    _, form, default = form_of(template, tokenizer)
    kept = run_of(adapter).get(END_KEY)
    ends = kept if isinstance(kept, list) else end_token_ids(template, tokenizer)
    header = gguf_in(source.path)
    with new_folder(target) as partial:
        if header is None:
            written = export_gguf(adapter, partial / "model.gguf", kind=kind, **base)
            lines = ["FROM ./model.gguf"]
        else:
            written = export_gguf_adapter(adapter, partial / "adapter.gguf", **base)
            lines = [f"FROM {header.paths[0]}", "ADAPTER ./adapter.gguf"]
        lines.append(f'TEMPLATE """{form.ollama}"""')
        lines += [f'SYSTEM """{default}"""'] if default else []
        lines += [f'PARAMETER stop "{tokenizer.convert_ids_to_tokens(number)}"' for number in ends if type(number) is int]
        write_text(partial / "Modelfile", "\n".join(lines) + "\n")
    name = adapter.resolve().name
    commands = f"ollama create {name} -f {target / 'Modelfile'} && ollama run {name}"
    return Written(target, written.n_bytes, f"a Modelfile with {written.what}; then: {commands}")
