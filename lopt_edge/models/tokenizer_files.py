"""The tokenizer's files in a folder that we write: those of the base, byte for byte, and the template that was used.

A tokenizer that is loaded and saved again takes on the form of the transformers that saved it (4.57 cannot read what 5
writes) and of the class that it chose. The rules: a base with a tokenizer.json is copied, not saved again; if its own
template was not the one in use, the used one takes its place, in every file that has one; a folder without a config.json
(an adapter's) names the class that takes tokenizer.json as it stands, where another name would bring a pipeline of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopt_edge.errors import InputError
from lopt_edge.models.tokenizer import TOKENIZER_NAME
from lopt_edge.system.files import write_json, write_text
from quant.headers import FolderError, read_json
from quant.small_files import TEMPLATE_NAMES, TOKENIZER_NAMES, copy_small_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG_NAME, TEMPLATE_NAME = "tokenizer_config.json", "chat_template.jinja"
AS_IT_STANDS = ("PreTrainedTokenizerFast", "TokenizersBackend")  # classes that take tokenizer.json so


def write_tokenizer_files(
    target: Path,
    *,
    base: Path,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    has_config: bool,
) -> None:
    """Write the files of `base`, whose tokenizer this is, with `template` (None: its own); `has_config`: a model's folder.

    Raises OSError, RunError, and InputError for a tokenizer_config.json that cannot be read.
    """
    own = own_template(tokenizer)
    if (base / TOKENIZER_NAME).is_file():
        copy_small_files(base, target, names=(*TOKENIZER_NAMES, *TEMPLATE_NAMES))
    else:
        tokenizer.save_pretrained(str(target))
    config = _config(target)
    changes: dict[str, Any] = {}
    if template is not None and template != own:
        write_text(target / TEMPLATE_NAME, template)
        (target / "chat_template.json").unlink(missing_ok=True)
        changes |= {"chat_template": template} if "chat_template" in config else {}
    if not has_config and type(tokenizer).__name__ in AS_IT_STANDS and config.get("tokenizer_class") not in AS_IT_STANDS:
        changes["tokenizer_class"] = AS_IT_STANDS[0]
    if changes:
        write_json(target / CONFIG_NAME, config | changes)


def own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template that the tokenizer came with; None without one, and for several without a default."""
    try:
        return tokenizer.get_chat_template() if tokenizer.chat_template else None
    except ValueError:
        return None


def template_in(folder: Path) -> str | None:
    """The chat template that lies in an adapter's folder, if it has one. Raises InputError if it cannot be read."""
    path = folder / TEMPLATE_NAME
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InputError(f"cannot be read ({error})", where=str(path)) from None
    found = _config(folder).get("chat_template")
    return found if isinstance(found, str) else None


def _config(folder: Path) -> dict[str, Any]:
    try:
        values = read_json(folder / CONFIG_NAME) if (folder / CONFIG_NAME).exists() else {}
    except FolderError as error:
        raise InputError(str(error), where=str(folder)) from None
    return values if isinstance(values, dict) else {}
