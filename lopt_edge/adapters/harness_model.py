"""A generator of ours as a model of lm-evaluation-harness (EleutherAI, the extra `eval`): what its tasks ask of one.

The rules: a context has the tokens of a prompt as training has them (the tokenizer's leading ids once, and nothing behind
it), where the harness' own transformers model takes whatever the tokenizer adds; all else is counted as there, so figures
can be put side by side: blanks at a context's end go to the continuation, what is too long loses its left end, a text of
its own is scored in windows. Nobody imports this but harness.py, once it knows that the package is there.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from lopt_edge.adapters.generation import Sampling, TextGenerator, generate_ids
from lopt_edge.data import Example, collate, prompt_ids
from lopt_edge.plan.schedule.knobs import TOKEN_TILES
from lopt_edge.run.step.batches import make_batch
from lopt_edge.run.step.losses import logits

AT_ONCE = 16  # sequences in a pass
MAX_NEW_TOKENS = 256  # where a task names no limit
Pair = tuple[Any, Sequence[int], Sequence[int]]  # what the harness knows it by, context, continuation


class HarnessModel(TemplateLM):
    """A generator as the harness sees it; `max_length`: the most tokens of a sequence."""

    def __init__(self, generator: TextGenerator, *, max_length: int) -> None:
        super().__init__()
        self.generator, self.tokenizer, self.max_length = generator, generator.tokenizer, max_length

    @property
    def tokenizer_name(self) -> str:
        """The name under which the harness keeps rendered prompts."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    @property
    def eot_token_id(self) -> int:
        """The end token; without one the begin token, or 0."""
        found = (self.tokenizer.eos_token_id, self.tokenizer.bos_token_id)
        return next((one for one in found if one is not None), 0)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text; with what the tokenizer puts first unless it is not wanted."""
        if add_special_tokens is False:
            return list(self.tokenizer(string, add_special_tokens=False)["input_ids"])
        return prompt_ids(string, self.tokenizer)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the generator's template writes it."""
        assert self.generator.template is not None, "harness.py refuses a model without one"
        turns = [(turn["role"], turn["content"]) for turn in chat_history]
        return self.generator.template.render(
            self.tokenizer, turns, tools=(), add_generation_prompt=add_generation_prompt, where="a task's prompt"
        )

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text after the prefix token, in windows of the longest sequence."""
        windows = list[Pair]()
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            lead = self.prefix_token_id
            for window in get_rolling_token_windows(ids, prefix_token=lead, max_seq_len=self.max_length, context_len=1):
                windows.append((number, *make_disjoint_window(window)))
        sums = [0.0] * len(requests)
        for (number, *_), (value, _) in zip(windows, self._loglikelihood_tokens(windows), strict=True):
            sums[number] += value
        return sums

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **_: Any) -> list[tuple[float, bool]]:
        """The log-probability of each continuation, and whether each of its tokens is the likeliest."""
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        examples = {number: self._example(*request[1:]) for number, request in enumerate(requests) if request[2]}
        order = sorted(examples, key=lambda number: len(examples[number]))
        for start in range(0, len(order), AT_ONCE):
            some = order[start : start + AT_ONCE]
            for number, value in zip(some, self._scored([examples[number] for number in some]), strict=True):
                found[number] = value
        return found

    def _example(self, context: Sequence[int], continuation: Sequence[int]) -> Example:
        ids = [*context, *continuation][-self.max_length - 1 :]
        n_targets = min(len(continuation), len(ids) - 1)
        return Example(array("i", ids), bytes(len(ids) - n_targets) + b"\x01" * n_targets, "")

    @torch.no_grad()
    def _scored(self, examples: Sequence[Example]) -> Iterator[tuple[float, bool]]:
        model = self.generator.model
        batch = make_batch(collate(examples, pad_id=0), model.device)
        hidden_BTD = model.embed(batch.ids_BT)
        hidden_BTD = model.run_all(hidden_BTD, model.layer_context(hidden_BTD, batch.ids_BT))
        hidden_ND, values, likeliest = hidden_BTD.flatten(0, 1)[batch.supervised_N], list[Tensor](), list[Tensor]()
        for start in range(0, len(hidden_ND), TOKEN_TILES[0]):
            tile = slice(start, start + TOKEN_TILES[0])
            targets_N, scores_NV = batch.targets_N[tile], logits(model, hidden_ND[tile]).float().log_softmax(1)
            values.append(scores_NV.gather(1, targets_N.unsqueeze(1)).squeeze(1).double())
            likeliest.append(scores_NV.argmax(1) == targets_N)
        value_N, likeliest_N = torch.cat(values), torch.cat(likeliest)
        rows_N = batch.supervised_N // batch.ids_BT.shape[1]
        for row in range(len(examples)):
            yield float(value_N[rows_N == row].sum()), bool(likeliest_N[rows_N == row].all())

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The text after each context until one of a task's marks, greedy unless the task samples."""
        return [self._until(*request.args) for request in requests]

    def _until(self, context: str, how: dict[str, Any]) -> str:
        marks = how.get("until") or []
        marks = [marks] if isinstance(marks, str) else [mark for mark in marks if mark]
        n_new = int(how.get("max_gen_toks") or how.get("max_new_tokens") or MAX_NEW_TOKENS)
        temperature = float(how.get("temperature") or 0.0) if how.get("do_sample") else 0.0
        sampling = Sampling(n_new, temperature=temperature, top_p=float(how.get("top_p") or 1.0))
        ids, made, text = self.tok_encode(context)[-max(1, self.max_length - n_new) :], list[int](), ""
        for token in generate_ids(self.generator.model, ids, sampling, stop=[self.eot_token_id]):
            made.append(token)
            text = str(self.tokenizer.decode(made, skip_special_tokens=True))
            if any(mark in text for mark in marks):
                break
        return min((text.partition(mark)[0] for mark in marks), key=len, default=text)
