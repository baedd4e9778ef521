"""How many closed questions a model answers: `python -m lopt_edge.comparison.closed_questions`.

A row has a prompt and one right answer (a capital, say) that training did not teach; the model knows it if its greedy
completion begins with the answer. That is so exactly where every token of the answer is the likeliest one after those
before it, so one forward pass over prompt and answer tells, and many questions are asked at once. What ends a reply is no
part of an answer. The base is asked once, the adapter of each run after it: the difference is what was forgotten.

Not here: answers in other words, and knowledge that training teaches.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lopt_edge.comparison.exact_match import questions
from lopt_edge.config.load import load_config
from lopt_edge.errors import InputError
from lopt_edge.system.files import write_json

if TYPE_CHECKING:
    from lopt_edge.adapters.generation import TextGenerator
    from lopt_edge.data import Dataset

AT_ONCE = 16  # questions in a pass
OF_BASE = "base"


def check_questions(path: str) -> None:
    """Refuse a file without prompts and answers, before anything runs. Raises InputError(s)."""
    if not questions(path, sys.maxsize, None):
        raise InputError("has no rows", where=path, fix="give prompts and completions")


def count_answers(folder: Path, path: str, *, of_base: bool) -> dict[str, object]:
    """The count of right answers by a run's adapter, or by the base that it was trained on."""
    from lopt_edge.adapters.generation import load_generator
    from lopt_edge.adapters.perplexity import read_for

    config = load_config(folder / "config.yaml")
    generator = load_generator(
        config.model,
        None if of_base else str(folder),
        revision=config.revision,
        cache_dir=config.cache_dir,
        device=config.device,
        compute_dtype=config.compute_dtype,
        chat_template=config.chat_template,
    )
    dataset = read_for(generator, path)
    return {"data": path, "rows": len(dataset.examples), "right": sum(answered(generator, dataset))}


def answered(generator: TextGenerator, dataset: Dataset) -> Iterator[bool]:
    """Whether each question is answered, the shortest ones first."""
    import torch

    from lopt_edge.data import collate
    from lopt_edge.run.step.batches import make_batch
    from lopt_edge.run.step.losses import logits

    model, examples = generator.model, sorted(dataset.examples, key=len)
    eos = generator.tokenizer.eos_token_id
    ends = generator.template.stop_ids(generator.tokenizer) if generator.template else [eos] if eos is not None else []
    for start in range(0, len(examples), AT_ONCE):
        some = examples[start : start + AT_ONCE]
        batch = make_batch(collate(some, pad_id=0), model.device)
        with torch.no_grad():
            hidden_BTD = model.embed(batch.ids_BT)
            hidden_BTD = model.run_all(hidden_BTD, model.layer_context(hidden_BTD, batch.ids_BT))
            chosen_N = logits(model, hidden_BTD.flatten(0, 1)[batch.supervised_N]).argmax(dim=-1)
        fits = (chosen_N == batch.targets_N) | torch.isin(batch.targets_N, torch.tensor(list(ends), device=model.device))
        rows = batch.supervised_N // batch.ids_BT.shape[1]
        yield from (bool(fits[rows == row].all()) for row in range(len(some)))


def main(words: Sequence[str]) -> None:
    """Count the answers; the words are RUN-FOLDER QUESTIONS RESULT.json [base]."""
    folder, path, target, *rest = words
    found = count_answers(Path(folder), path, of_base=rest == [OF_BASE])
    write_json(Path(target), found)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(f"error: {error}")
