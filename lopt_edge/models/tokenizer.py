"""A model folder's tokenizer: loaded, and its files checked before transformers sees them.

The rules: a broken or hostile tokenizer file is a message that names it, not a traceback and not a panic of the library.
The tokens are those of tokenizer.json. transformers 5 chooses a class by the config's model_type and the tokenizer's own
word, and most classes take the vocabulary from that file but bring their own way to cut texts: a Qwen2 model with another
pipeline in its file (DeepSeek's distills, say) gets tokens that it was not trained on, and nothing is said. So the two
pipelines are compared, and where they differ the file is loaded as it stands.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopt_edge.data.tokenizer_faults import tokenizer_faults
from lopt_edge.errors import InputError
from lopt_edge.models.gguf_tokenizer import make_tokenizer
from lopt_edge.models.tokenizer_sizes import check_tokenizer_sizes
from quant.headers import FolderError, read_json
from quant.untrusted import check_folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

TOKENIZER_NAME = "tokenizer.json"
# What byte-pair, word-piece and unigram models are told beside their vocabulary, where it changes tokens. A flag that is
# not there, false or empty is off.
FLAGS = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback",
         "ignore_merges", "max_input_chars_per_word")  # fmt: skip
PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    " a leading space",
    "trailing spaces   ",
    "two  spaces   three\tand a tab",
    "one\ntwo\n\nthree\r\nfour\n",
    "12345 3.14159 2026-11-28 1,000,000",
    "isn't it what they'll say? I'D we've",
    "I'M NOT; DON'T",
    "def area(width, height):\n    return width * height  # px\n",
    '<div class="x">&amp;</div> {"key": [1, 2]}',
    "snake_case camelCase kebab-case e-mail@example.org https://example.org/?q=1",
    "naïve café, Straße, ÆØÅ, ĳ, ǅ, İstanbul",
    "cafe\u0301 e\u0308 n\u0303 \u1100\u1161\u11a8",
    "ﬁne ﬂag ① ² ½ Ⅳ ＡＢＣ １２３ ｶﾀｶﾅ",
    "日本語の文章です。漢字とカナ",
    "中文没有空格，句号。",
    "한국어 문장입니다",
    "Привет, мир",
    "שלום עולם",
    "مرحبا بالعالم ١٢٣",
    "नमस्ते दुनिया १२३",
    "ภาษาไทย",
    "🙂👩‍💻🇩🇪 emoji",
    "\u00a0non-breaking\u2003em\u200bzero",
    "∑ x² ≤ ∞ → √2 €5 £6",
    "… — – “quoted” ‘single’",
    "!!!??? --- === ***\n\n\n",
    "\x00\x1b\x7f",
)


def load_tokenizer(folder: Path, *, say: Callable[[str], None] = warnings.warn) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; a broken or missing one is an InputError. Never runs code of the folder.

    Where the folder stands for a GGUF file, its tokenizer is made first.
    `say` hears it if transformers' class for this folder gives other tokens than its tokenizer.json.
    """
    from transformers import AutoTokenizer

    make_tokenizer(folder)
    _check_tokenizer_files(folder)
    fix = "the model folder needs tokenizer.json"
    with tokenizer_faults("the tokenizer cannot be loaded", where=str(folder), fix=fix):
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        if _is_the_files(tokenizer, folder / TOKENIZER_NAME):
            return tokenizer
        seen = _seen(tokenizer)
        del tokenizer  # before the vocabulary is in memory once more
        return _as_the_file_says(folder, seen, say)


def _is_the_files(tokenizer: Any, path: Path) -> bool:
    """Whether the tokenizer cuts texts as tokenizer.json says, or there is no such file."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    if type(tokenizer) is PreTrainedTokenizerFast or not path.is_file():  # that class takes the file as it stands
        return True
    values = json.loads(path.read_text(encoding="utf-8"))
    values["added_tokens"] = []
    if values["model"].get("type") not in (None, "Unigram"):  # a unigram model cannot be empty; old files name no type
        values["model"] |= {"vocab": {}, "merges": []} if "merges" in values["model"] else {"vocab": {}}
    of_file = Tokenizer.from_str(json.dumps(values))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return isinstance(backend, Tokenizer) and _pipeline(backend) == _pipeline(of_file)


def _pipeline(tokenizer: Tokenizer) -> dict[str, Any]:
    """What decides the tokens of a text beside the vocabulary and its merges."""
    model = tokenizer.model
    flags = {name: getattr(model, name, None) or None for name in FLAGS}
    return {
        "model": type(model).__name__,
        **flags,
        "normalizer": _state(tokenizer.normalizer),
        "pre_tokenizer": _state(tokenizer.pre_tokenizer),
    }


def _state(part: Any) -> Any:
    """The settings of a normaliser or pre-tokeniser, but for what only moves offsets."""

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: kept(inner) for key, inner in value.items() if key != "trim_offsets"}
        return [kept(inner) for inner in value] if isinstance(value, list) else value

    return None if part is None else kept(json.loads(part.__getstate__()))


@dataclass(frozen=True)
class _Seen:
    """What is kept of transformers' own choice: the class, its special tokens, the ids that it gives to the probe texts."""

    name: str
    special: dict[str, str]
    ids: dict[str, list[int]]
    marked: dict[str, str]  # text -> the special token in it


def _seen(tokenizer: Any) -> _Seen:
    special = {key: str(token) for key, token in tokenizer.special_tokens_map.items()}
    # Llama's class of transformers 5 puts no blank before a word after a special token, Llama 2's files do
    marked = {f"{token}one{token} two": token for token in special.values()}
    ids = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in (*PROBES, *marked)}
    return _Seen(type(tokenizer).__name__, special, ids, marked)


def _as_the_file_says(folder: Path, seen: _Seen, say: Callable[[str], None]) -> PreTrainedTokenizerBase:
    """The tokenizer of tokenizer.json itself, with the special tokens that the class would have had."""
    from transformers import PreTrainedTokenizerFast

    ours: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(str(folder))
    vocabulary = ours.get_vocab()  # a class' default that is no token of this model would be a new one
    for key, token in seen.special.items():
        if key not in ours.special_tokens_map and token in vocabulary:
            setattr(ours, key, token)
    probes = [*PROBES, *(text for text, token in seen.marked.items() if token in vocabulary)]
    wrong = [text for text in probes if ours(text, add_special_tokens=False)["input_ids"] != seen.ids[text]]
    if wrong:
        say(
            f"{folder}: transformers would cut texts otherwise than this folder's {TOKENIZER_NAME} says (as {seen.name}; "
            f"{len(wrong)} of {len(probes)} probe texts, e.g. {wrong[0]!r}). The tokens of {TOKENIZER_NAME} are used; "
            "programs with transformers 5 should load it with PreTrainedTokenizerFast, not AutoTokenizer"
        )
    return ours


def _check_tokenizer_files(folder: Path) -> None:
    """Refuse links out of the folder, sizes out of reason, and a config whose arguments a tokenizer would open."""
    path = folder / "tokenizer_config.json"
    try:
        check_folder(folder)
        check_tokenizer_sizes(folder)
        config = read_json(path) if path.exists() else {}
    except FolderError as error:
        raise InputError(str(error), where=str(folder), fix="download or copy the folder again") from None
    if not isinstance(config, dict) or config.get("init_inputs"):
        what = "has init_inputs, which lopt-edge does not take" if isinstance(config, dict) else "is not a JSON object"
        raise InputError(what, where=str(path), fix="save the tokenizer again with transformers 5")
