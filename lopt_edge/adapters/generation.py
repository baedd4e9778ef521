"""Text from a 4-bit model with or without an adapter, layer by layer, with a key-value cache.

Greedy by default (temperature 0), else sampling with a seed. The rule: the same units and adapters as in training, so
what a run prints as a sample is what it trained. Speed is not its aim: a fast server loads the adapter or the merged model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lopt_edge.adapters.base import base_of
from lopt_edge.data import ChatTemplate, load_template, prompt_ids
from lopt_edge.data.rows import AnyMessage
from lopt_edge.errors import InputError
from lopt_edge.models.four_bit import four_bit_folder
from lopt_edge.models.tokenizer import load_tokenizer
from lopt_edge.run.device import choose_device, choose_dtype
from lopt_edge.run.model.load import Model, load_model
from lopt_edge.run.model.lora import load_adapters
from lopt_edge.run.model.replaced import apply_replaced
from lopt_edge.run.step.losses import logits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampling:
    """The choice of tokens: temperature 0 is greedy, `top_p` keeps the most likely ones of that mass. Raises InputError."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        sound = self.max_new_tokens >= 1 and 0 <= self.temperature < 1e6 and 0 < self.top_p <= 1
        if not sound or not 0 <= self.seed < 2**63:
            raise InputError(
                "max-new-tokens must be at least 1, temperature at least 0, top-p above 0 and at most 1, "
                "seed from 0 to 2^63 - 1",
                where="generate",
            )


class TextGenerator:
    """A model with its tokenizer and template, ready to complete conversations."""

    def __init__(self, model: Model, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None) -> None:
        self.model, self.tokenizer, self.template = model, tokenizer, template

    def __call__(
        self, prompt: str, *, system: str | None = None, on_text: Callable[[str], None] | None = None, **how: Any
    ) -> str:
        """The completion of one user prompt; `how`: max_new_tokens, temperature, top_p, seed."""
        sampling = Sampling(**how)
        if self.template is None:
            return self.continue_text(prompt, sampling, on_text=on_text)
        return self.reply(asked(prompt, system), sampling, on_text=on_text)

    def __repr__(self) -> str:
        facts = self.model.facts
        return f"TextGenerator({facts.architecture}, {facts.n_layers} layers, on {self.model.device})"

    def reply(
        self,
        messages: Sequence[AnyMessage],
        sampling: Sampling,
        *,
        tools: Sequence[dict[str, Any]] = (),
        on_text: Callable[[str], None] | None = None,
    ) -> str:
        """The assistant's next turn; `on_text` receives it piece by piece."""
        if self.template is None:
            raise ValueError("this generator has no chat template")
        prompt = self.template.render(self.tokenizer, messages, tools=tools, add_generation_prompt=True, where="the prompt")
        # as in training, the template alone says what comes before the first turn
        return self._complete(self.tokenizer(prompt, add_special_tokens=False)["input_ids"], sampling, on_text)

    def continue_text(self, prompt: str, sampling: Sampling, *, on_text: Callable[[str], None] | None = None) -> str:
        """The text after `prompt`, without a chat template: for models trained on prompt/completion or plain text.

        The prompt's ids are those of training. Raises InputError for an empty prompt.
        """
        if not prompt:
            raise InputError("is empty: there is nothing to continue", where="prompt", fix="give a text")
        return self._complete(prompt_ids(prompt, self.tokenizer), sampling, on_text)

    def _complete(self, ids: Sequence[int], sampling: Sampling, on_text: Callable[[str], None] | None) -> str:
        eos = self.tokenizer.eos_token_id
        stop = self.template.stop_ids(self.tokenizer) if self.template else [eos] if eos is not None else []
        made: list[int] = []
        shown = ""
        for token in generate_ids(self.model, ids, sampling, stop=stop):
            made.append(token)
            text = self._text(made)
            if on_text is not None and not text.endswith("\N{REPLACEMENT CHARACTER}"):  # inside a UTF-8 character
                on_text(text[len(shown) :])
                shown = text
        return self._text(made).strip()

    def _text(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str)  # a list of them for a list of lists only
        return text


def asked(prompt: str, system: str | None = None) -> list[AnyMessage]:
    """The conversation of a user's prompt, after a system message if there is one."""
    return [*([("system", system)] if system else []), ("user", prompt)]


@torch.no_grad()
def generate_ids(model: Model, prompt: Sequence[int], sampling: Sampling, *, stop: Sequence[int]) -> Iterator[int]:
    """New token ids after `prompt`, until a stop id, the limit, or the consumer's end."""
    from transformers import DynamicCache

    generator = torch.Generator().manual_seed(sampling.seed)
    cache: Any = DynamicCache(config=model.config)
    ids, start = list(prompt), 0
    for _ in range(sampling.max_new_tokens):
        ids_BT = torch.tensor([ids], device=model.device)
        hidden_BTD = model.embed(ids_BT)
        frame = model.layer_context(hidden_BTD, ids_BT, cache=cache, start=start)
        hidden_BTD = model.run_all(hidden_BTD, frame, cache=cache)
        token = _choose(logits(model, hidden_BTD[0, -1:])[0].cpu(), sampling, generator)
        if token in stop:
            return
        yield token
        start, ids = start + len(ids), [token]


def _choose(scores_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    if sampling.temperature < 1e-5:  # what is closer to 0 would overflow the division
        return int(scores_V.argmax())
    shares_V, order_V = (scores_V / sampling.temperature).softmax(0).sort(descending=True)
    outside_V = shares_V.cumsum(0) - shares_V >= sampling.top_p
    return int(order_V[torch.multinomial(shares_V.masked_fill(outside_V, 0.0), 1, generator=generator)])


def load_generator(
    model: str | None = None,
    adapter: str | None = None,
    *,
    revision: str | None = None,
    cache_dir: str | None = None,
    device: str = "auto",
    compute_dtype: str = "auto",
    chat_template: str | None = None,
    say: Callable[[str], None] = warnings.warn,
) -> TextGenerator:
    """A generator from a model (folder or hub id; quantised into the cache if need be) and an adapter, if one is named.

    The model may be left out beside an adapter, whose config names it; `say` hears what is odd about either. Raises
    InputError for what is missing or does not fit.
    """
    chosen, _ = choose_device(device)
    dtype, _ = choose_dtype(compute_dtype, chosen)
    source = base_of(adapter, model=model, revision=revision, say=say)
    has_tokenizer = adapter is not None and (Path(adapter) / "tokenizer_config.json").exists()
    tokenizer = load_tokenizer(Path(adapter) if adapter is not None and has_tokenizer else source.path, say=say)
    folder, _ = four_bit_folder(source, cache_dir=cache_dir)
    loaded = load_model(folder, source.facts, device=chosen, dtype=dtype)
    if adapter is not None:
        apply_replaced(loaded, Path(adapter))
        load_adapters(loaded, Path(adapter))
    return TextGenerator(loaded, tokenizer, load_template(tokenizer, chat_template)[0])


def load(model: str | None = None, adapter: str | None = None, **loading: Any) -> TextGenerator:
    """A generator that keeps the model: call it with a prompt as often as you like.

    `loading`: revision, cache_dir, device, compute_dtype, chat_template. The model may be left out beside an adapter.
    """
    return load_generator(model, adapter, **loading)


def generate(
    model: str | None,
    prompt: str,
    *,
    adapter: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    **loading: Any,
) -> str:
    """The completion of one user prompt, after a system message if one is given.

    `loading`: revision, cache_dir, device, compute_dtype, chat_template.

    With an adapter the model may be None: the one that the adapter's config names. Raises InputError for a missing model or
    adapter and for settings out of range.
    """
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    return load_generator(model, adapter, **loading).reply(asked(prompt, system), sampling)
