"""How large the files of a tokenizer may be, and how much may be built of them, before a library reads them.

The rule: what is counted is the bytes alone (no value is made of them), so the check takes no memory to speak of. The
libraries make a record of each object of tokenizer.json (of a list of normalizers 35 bytes a byte: a file of 120 MiB took
3.5 GB) and several of each entry of a vocabulary. Real files are far below: Gemma 3, the largest in use, has 33 MB, 6,400
objects (its added tokens) and 1.3 million items (262,144 tokens, 514,906 merges). An escape in a string makes no object, so
a brace or comma that counts is there as a byte.
"""

from __future__ import annotations

from pathlib import Path

from lopt_edge.errors import InputError
from quant.headers import FolderError
from quant.untrusted import file_bytes, read_config

MAX_ITEMS, MAX_OBJECTS = 2_000_000, 100_000
MAX_MODEL_BYTES = 32 * 2**20  # of a SentencePiece model (XLM-V's, of 901,629 tokens, has 18 MB)
MAX_TOKENIZER_CONFIG_BYTES = 16 * 2**20  # Gemma 3's has 1.2 MB
AT_ONCE = 1 << 20
JSON_NAMES = ("tokenizer.json", "vocab.json", "added_tokens.json", "special_tokens_map.json")
LINE_NAMES = ("merges.txt", "vocab.txt", "vocab.bpe", "tokenizer.tiktoken")


def check_tokenizer_sizes(folder: Path) -> None:
    """Refuse tokenizer files of which something out of reason would be built. Raises InputError, FolderError."""
    for name in JSON_NAMES:
        _check_counts(folder / name, {b",": MAX_ITEMS, b"{": MAX_OBJECTS})
    for name in LINE_NAMES:
        _check_counts(folder / name, {b"\n": MAX_ITEMS})
    for name, most in (("tokenizer_config.json", MAX_TOKENIZER_CONFIG_BYTES), ("tokenizer.model", MAX_MODEL_BYTES)):
        path = folder / name
        if path.exists() and (n_bytes := file_bytes(path)) > most:
            raise _refusal(path, f"has {n_bytes:,} bytes, at most {most:,} are read")
    if (path := folder / "config.json").exists():  # transformers looks there for the tokenizer's class
        read_config(path)


def _check_counts(path: Path, most: dict[bytes, int]) -> None:
    if not path.exists() or file_bytes(path) == 0:
        return
    found = dict.fromkeys(most, 0)
    try:
        with path.open("rb", buffering=0) as file:
            while part := file.read(AT_ONCE):
                for sign in most:
                    found[sign] += part.count(sign)
    except OSError as error:
        raise FolderError(f"{path}: cannot be read ({error.strerror})") from None
    for sign, limit in most.items():
        if found[sign] > limit:
            what = {b",": "items", b"{": "objects", b"\n": "lines"}[sign]
            raise _refusal(path, f"holds {found[sign]:,} {what}, at most {limit:,} are read")


def _refusal(path: Path, what: str) -> InputError:
    return InputError(what, where=str(path), fix="use the tokenizer of the original model")
