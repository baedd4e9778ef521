"""Builds examples/tiny-llama: a tokenizer and a 3.6M-parameter Llama, pretrained on the standard library's sources.

The examples and the tests need a model that is small enough for the repository (8 MB with its tokenizer) and yet knows
something, so that a fine-tuning run has something to improve and something to forget. It is an ordinary transformers
folder in bfloat16; every linear layer's input width is a multiple of 64, the NF4 block size.

What it reads: each train file of stdlib_corpus.py as source and as a page of docstrings, and a few ChatML documents
that ask for the signature that belongs to a docstring. Those last ones are there because the embeddings are tied and
stay frozen in fine-tuning: an <|im_end|> that was never trained could not be learnt by an adapter. The fine-tuning set
asks the opposite question (signature -> docstring), which the model has never seen as a chat.

The rule it keeps: held-out files are read for the logged loss only. There is always a usable folder: it is saved after
--first-save minutes and then every --save-every, file by file beside the old one and then renamed.

What it does not do: it is not bitwise repeatable. The learning rate follows the clock, so that a run ends after
--minutes on any machine; the committed folder is one such run: Python 3.11.7's library, one thread, 40 minutes, 3,164
updates (2.26 epochs); held-out loss 8.36 -> 3.45, train loss at the end 2.89.

Measured on one thread of a Zen core with AVX512-bf16, this model, forward and backward, tokens a second in rows of 256:
float32 2,300 and bfloat16 autocast 3,200 with the fused attention, bfloat16 autocast with eager attention 4,000 (2,900
in rows of 512). The fused CPU attention's backward is the slow part, hence eager, and rows of 512 only at the end.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from stdlib_corpus import SourceFile, doc_entries, read_files, reference_page
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END, TURN_START, TURN_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"  # ids 0, 1, 2, 3
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
VOCABULARY = 4096
BATCH_TOKENS = 2048  # one update
SHORT, LONG, LONG_FROM = 256, 512, 0.75  # row lengths in tokens; LONG from this share of the time on
PEAK_RATE, WARM_UP, BETAS, WEIGHT_DECAY, CLIP = 3e-3, 0.03, (0.9, 0.97), 0.1, 1.0
MICRO_TOKENS = 1024  # one forward: the logits (1024 x 4096 float32) stay at 16 MB
HELDOUT_TOKENS = 49_152
CHAT_ONE_IN = 3  # docstrings that also become a ChatML document


def documents(files: list[SourceFile]) -> list[str]:
    """The texts that the model reads, in a fixed order."""
    texts = []
    for file in files:
        texts += [file.text, reference_page(file)]
        for entry in list(doc_entries(file))[::CHAT_ONE_IN]:
            turns = ("user", entry.sentence), ("assistant", entry.signature)
            texts.append("".join(f"{TURN_START}{role}\n{text}{TURN_END}\n" for role, text in turns))
    return [text for text in texts if text]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, TURN_START, TURN_END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[TURN_START, TURN_END],
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def build_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=448,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=3,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation="eager")


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[torch.Tensor]:
    """The ids of each document, a tensor each, opened by END."""
    encoded = tokenizer.backend_tokenizer.encode_batch(texts)
    return [torch.tensor([0, *item.ids], dtype=torch.int32) for item in encoded]


def rows(encoded: list[torch.Tensor], length: int, generator: torch.Generator) -> torch.Tensor:
    """The packed rows (n, length + 1) of one epoch: documents in random order, cut, rows in random order."""
    order = torch.randperm(len(encoded), generator=generator).tolist()
    stream = torch.cat([encoded[index] for index in order])
    stream = stream[int(torch.randint(length, (1,), generator=generator)) :]  # other cuts in every epoch
    packed = stream[: (len(stream) - 1) // length * length + 1].unfold(0, length + 1, length)
    return packed[torch.randperm(len(packed), generator=generator)].long()


@dataclass
class Clock:
    """The seconds since the start, and as a share of the budget: what the learning rate and the row length follow."""

    budget: float  # seconds
    start: float

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    @property
    def share(self) -> float:
        return min(self.seconds / self.budget, 1.0)

    @property
    def rate(self) -> float:
        if self.share < WARM_UP:
            return PEAK_RATE * max(self.share / WARM_UP, 0.01)
        cosine = math.cos(math.pi * (self.share - WARM_UP) / (1 - WARM_UP))
        return PEAK_RATE * (0.01 + 0.99 * (1 + cosine) / 2)


def batches(encoded: list[torch.Tensor], clock: Clock, seed: int) -> Iterator[torch.Tensor]:
    """The batches of BATCH_TOKENS, epoch after epoch; a change of the row length opens a new epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        length = SHORT if clock.share < LONG_FROM else LONG
        for batch in rows(encoded, length, generator).split(BATCH_TOKENS // length):
            if length == SHORT and clock.share >= LONG_FROM:
                break
            yield batch


def loss_of(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    """The mean next-token loss of rows (n, length + 1); nothing is masked."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def update(model: LlamaForCausalLM, optimizer: torch.optim.AdamW, batch: torch.Tensor) -> float:
    total = 0.0
    for micro in batch.split(max(1, MICRO_TOKENS // batch.shape[1])):
        loss = loss_of(model, micro) * (len(micro) / len(batch))
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad()
    return total


@torch.no_grad()
def heldout_loss(model: LlamaForCausalLM, heldout: torch.Tensor) -> float:
    losses = [loss_of(model, micro).item() for micro in heldout.split(MICRO_TOKENS // SHORT)]
    return sum(losses) / len(losses)


def build_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    norms = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=BETAS)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    half = build_model().to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=[0, 2], pad_token_id=3)
    with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
        half.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        for path in sorted(Path(beside).iterdir()):
            path.chmod(0o644)
            path.replace(folder / path.name)


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, options: argparse.Namespace) -> None:
    files = read_files()
    encoded = encode(tokenizer, documents([file for file in files if not file.heldout]))
    unseen = encode(tokenizer, documents([file for file in files if file.heldout]))
    heldout = rows(unseen, SHORT, torch.Generator().manual_seed(0))[: HELDOUT_TOKENS // SHORT]
    epoch = sum(map(len, encoded))
    print(f"train {epoch:,} tokens, held-out {heldout.numel():,}; {model.num_parameters():,} parameters", flush=True)
    optimizer = build_optimizer(model)
    clock = Clock(options.minutes * 60, time.monotonic())
    next_save, mean = options.first_save * 60, 0.0
    print(f"start: held-out {heldout_loss(model, heldout):.4f}", flush=True)
    for step, batch in enumerate(batches(encoded, clock, options.seed), start=1):
        for group in optimizer.param_groups:
            group["lr"] = clock.rate
        loss = update(model, optimizer, batch)
        mean = loss if step == 1 else mean + (loss - mean) * max(1 / step, 0.02)  # about the last 50 updates
        done = clock.share >= 1
        if step % 50 == 0 or step == 1 or done:
            epochs = step * BATCH_TOKENS / epoch
            print(f"{clock.seconds:6.0f} s  step {step}  epoch {epochs:.2f}  loss {mean:.4f}", flush=True)
        if clock.seconds >= next_save or done:
            next_save += options.save_every * 60
            save(model, tokenizer, options.output)
            print(f"{clock.seconds:6.0f} s  saved; held-out {heldout_loss(model, heldout):.4f}", flush=True)
        if done:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "examples" / "tiny-llama")
    parser.add_argument("--minutes", type=float, default=40, help="training time; the learning rate ends with it")
    parser.add_argument("--first-save", type=float, default=3, help="minutes until the first usable folder")
    parser.add_argument("--save-every", type=float, default=5, help="minutes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    tokenizer = train_tokenizer(documents([file for file in read_files() if not file.heldout]))
    train(build_model(), tokenizer, options)


if __name__ == "__main__":
    main()
