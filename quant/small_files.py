"""The files of a model folder beside its weights and its config: their names, and copies of them. Imports no torch.

The rule: what is fetched or copied is named here, file by file. A pattern such as `tokenizer*` would take code along
(`tokenizer.py`), which nothing of ours runs but whoever gets the folder might.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

TOKENIZER_NAMES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
                   "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "tekken.json")  # fmt: skip
TEMPLATE_NAMES = ("chat_template.jinja", "chat_template.json")
GENERATION_NAME = "generation_config.json"
PROCESSOR_NAMES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")  # multimodal
LICENCE_NAMES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING", "NOTICE", "NOTICE.txt", "NOTICE.md",
                 "USE_POLICY.md")  # fmt: skip
SMALL_NAMES = (*TOKENIZER_NAMES, *TEMPLATE_NAMES, GENERATION_NAME, *PROCESSOR_NAMES, *LICENCE_NAMES)


def copy_small_files(source: Path, target: Path, *, names: Sequence[str] = SMALL_NAMES) -> None:
    """Copy those of these files that `source` has, byte for byte, each synced and renamed into place. Raises OSError."""
    for name in names:
        if (source / name).is_file():
            partial = target / f"{name}.partial"
            with (source / name).open("rb") as read, partial.open("wb") as written:
                shutil.copyfileobj(read, written)
                written.flush()
                os.fsync(written.fileno())
            partial.replace(target / name)
