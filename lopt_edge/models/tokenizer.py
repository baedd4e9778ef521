"""A model folder's tokenizer: loaded, and its files checked before transformers sees them.

The rule: a broken or hostile tokenizer file is a message that names it, not a traceback and not a panic of the library.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lopt_edge.data.tokenizer_faults import tokenizer_faults
from lopt_edge.errors import InputError
from lopt_edge.models.tokenizer_sizes import check_tokenizer_sizes
from quant.headers import FolderError, read_json
from quant.untrusted import check_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; a broken or missing one is an InputError. Never runs code of the folder."""
    from transformers import AutoTokenizer

    _check_tokenizer_files(folder)
    fix = "the model folder needs tokenizer.json"
    with tokenizer_faults("the tokenizer cannot be loaded", where=str(folder), fix=fix):
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)


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
