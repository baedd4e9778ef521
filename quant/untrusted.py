"""Files of a model or adapter folder that nobody vouches for: what may be opened, how large, how deep. Imports no torch.

Rules. A file is opened only if it is a regular file (a FIFO would block for ever, a device would never end) and its real
place is inside the folder. Links are followed, and where they end is what counts: in a hub snapshot
(`<repo>/snapshots/<commit>/`) every file is a link into `<repo>/blobs/`, which belongs to the download, so that is allowed
too, and nothing else is. Else a folder from an archive could have `LICENSE -> ~/.ssh/id_ed25519`, which an export copies.

JSON is read up to `MAX_JSON_BYTES` and `MAX_JSON_DEPTH` levels. Both limits bound memory: a JSON text can become 30 times
its size in Python (`{},{},...`), so at most some 950 MB, and only for as long as it is looked at. Real files are far below
(the index of an 8B model has 25 kB, its config nests 3 levels deep).

Not here: what the values mean. Nor is a folder guarded against somebody who changes it while it is being read.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 32 * 2**20
MAX_JSON_DEPTH = 64
MAX_CONFIG_BYTES = 4 * 2**20  # of a config.json (with the names of 22,000 classes it has 1 MB)
MAX_SMALL_FILE_BYTES = 64 * 2**20  # tokenizer files, templates: all but weights (Gemma 3's tokenizer.json has 33 MB)
SMALL_FILES = (".json", ".jinja", ".txt", ".model", ".bpe", ".tiktoken")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SUBFOLDERS = ("additional_chat_templates",)  # the only one that transformers reads from

# C0 and C1 controls but newline and tab; and what makes a line read otherwise than it is written (bidi overrides)
CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if code not in (9, 10)}
CONTROLS |= {code: f"\\u{code:04x}" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def printable(text: str) -> str:
    """The text as every terminal takes it: a name from a file may contain half a character or an escape sequence."""
    return text.encode("utf-8", "backslashreplace").decode().translate(CONTROLS)


def printable_name(text: str) -> str:
    """A name in one line, printable: what makes a new line or a wide gap in it is shown, too."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


class FolderError(Exception):
    """The error for a model or adapter folder that cannot be read; its text, in one line, names the file and the fault."""

    def __init__(self, text: str) -> None:
        super().__init__(printable_name(text))


class TooDeep(ValueError):
    """The error for JSON that nests deeper than the limit."""


def parse_json(text: str, *, parse_constant: Callable[[str], Any] | None = None) -> Any:
    """Parse JSON as `json.loads` does, at most `MAX_JSON_DEPTH` levels deep. Raises TooDeep, and what json.loads raises."""
    try:
        value = json.loads(text, parse_constant=parse_constant)
    except RecursionError:
        raise TooDeep(f"nested deeper than {MAX_JSON_DEPTH} levels") from None
    if text.count("[") + text.count("{") > MAX_JSON_DEPTH:  # most texts are settled by this
        check_depth(value)
    return value


def check_depth(value: Any) -> None:
    """Raise TooDeep for a value of JSON that nests deeper than the limit."""
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        items = (node.values() if isinstance(node, dict) else node for node in level if isinstance(node, (dict, list)))
        level = [child for several in items for child in several if isinstance(child, (dict, list))]
        if not level:
            return
    raise TooDeep(f"nested deeper than {MAX_JSON_DEPTH} levels")


def read_json(path: Path, *, most_bytes: int = MAX_JSON_BYTES) -> Any:
    """The value of a JSON file of a model folder. Raises FolderError for broken, too large or too deeply nested text."""
    try:
        if (n_bytes := file_bytes(path)) > most_bytes:
            raise FolderError(f"{path}: has {n_bytes} bytes, at most {most_bytes} are read as JSON")
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FolderError(f"{path}: cannot be read as JSON ({str(error)[:200]})") from None


# From these a library builds as many things as the number says, at any depth of a config.json: names of classes (10**7 of
# them took 5 GB), layers, a table of rotary frequencies. Every other size is one that the weights must have as well.
LARGEST = {"num_labels": 100_000, "num_hidden_layers": 10_000, "partial_rotary_factor": 1, "head_dim": 65_536}


def read_config(path: Path) -> Any:
    """The value of a config.json. Raises FolderError, also for a number from which something huge would be built."""
    config = read_json(path, most_bytes=MAX_CONFIG_BYTES)
    left = [config]
    while left:
        node = left.pop()
        if isinstance(node, dict):
            for key, most in LARGEST.items():
                value = node.get(key)
                if isinstance(value, int | float) and not -1 <= value <= most:  # NaN too
                    raise FolderError(f"{path}: {key} {str(value)[:40]} is out of reason (at most {most:,})")
            left += node.values()
        elif isinstance(node, list):
            left += node
    return config


def file_bytes(path: Path) -> int:
    """The size of a regular file. Raises FolderError for what is missing or of another kind."""
    try:
        found = path.stat()
    except FileNotFoundError:
        raise FolderError(f"{path}: file not found") from None
    except (OSError, ValueError) as error:  # a loop of links, no permission, a NUL in the name
        raise FolderError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not stat.S_ISREG(found.st_mode):
        raise FolderError(f"{path}: is not a regular file")
    return found.st_size


def check_folder(folder: Path) -> None:
    """Raise FolderError for a folder with a link that leads out of it, a device, FIFO or socket, or an oversized file."""
    real = Path(os.path.realpath(folder))
    roots = [real, real.parent.parent / "blobs"] if real.parent.name == "snapshots" else [real]
    for place in (folder, *(folder / name for name in SUBFOLDERS if (folder / name).is_dir())):
        try:
            entries = sorted(os.scandir(place), key=lambda entry: entry.name)
        except OSError as error:
            raise FolderError(f"{place}: cannot be read ({error.strerror})") from None
        for entry in entries:
            _check_entry(entry, roots)


def _check_entry(entry: os.DirEntry[str], roots: list[Path]) -> None:
    path = Path(entry.path)
    if entry.is_symlink():
        real = Path(os.path.realpath(entry.path))
        if not any(real.is_relative_to(root) for root in roots):
            raise FolderError(f"{path}: is a link that leads out of the folder ({real}); put the file itself there")
    if not path.exists() or entry.is_dir():  # a dangling link is a missing file, reported where the file is needed
        return
    if file_bytes(path) > MAX_SMALL_FILE_BYTES and path.suffix in (
        ".json",
        ".jinja",
        ".txt",
        ".model",
        ".bpe",
        ".tiktoken",
    ):
        raise FolderError(f"{path}: is too large; at most {MAX_SMALL_FILE_BYTES} bytes are read of such a file")


def pickles_in(folder: Path) -> list[str]:
    """The names of the pickle files of a folder, which are never opened; models first (training_args.bin is none)."""
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.name.endswith(PICKLES))
        return sorted(names, key=lambda name: "model" not in name)
    except OSError:
        return []
