"""An adapter folder, or its merged model, on the hub: created if it is not there, then one commit.

The rules: files go by name, those that others need and no other (no log, no checkpoint, no run.json, whose settings
hold paths of this machine); nothing is pushed of a run that is not finished. The token is whatever huggingface_hub
finds in its usual places; it is never read here, printed or written.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lopt_edge.errors import InputError, RunError
from lopt_edge.run.model.adapter_config import ADAPTER_NAME, REPLACED_NAME
from quant.headers import INDEX_NAME, FolderError, read_json
from quant.small_files import SMALL_NAMES
from quant.untrusted import check_folder

CARD_NAME = "README.md"
ADAPTER_FILES = ("adapter_config.json", ADAPTER_NAME, CARD_NAME, REPLACED_NAME, *SMALL_NAMES)
MODEL_FILES = ("config.json", INDEX_NAME, CARD_NAME, "export.json", *SMALL_NAMES)
WEIGHTS = "model*.safetensors"
TOKEN = re.compile(r"hf_[A-Za-z0-9]{6,}")


def check_name(name: str, *, where: str) -> None:
    """Raise InputError for what can be no repository of the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not re-exported

    try:
        if name.count("/") != 1:
            raise HFValidationError("it must be org/name")
        validate_repo_id(name)
    except HFValidationError as error:
        what = f"{name[:80]!r} can be no repository of the hub ({' '.join(str(error).split())[:200]})"
        raise InputError(what, where=where, fix="give org/name") from None


def check_token() -> None:
    """Raise InputError where huggingface_hub finds no token."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise InputError("no token for the hub", where="push", fix="hf auth login, or set HF_TOKEN")


def push(
    output: str | Path,
    repository: str,
    *,
    private: bool = False,
    merged: str | Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> str:
    """Push the adapter in `output`, or the folder of its merged model, and return where it is.

    Raises InputError, RunError.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    check_name(repository, where="repository")
    folder = Path(output if merged is None else merged)
    names = _files(folder, is_model=merged is not None)
    check_token()
    if base := _local_base(folder):
        what = f"adapter_config.json names a base on this machine ({base}), which others will not find"
        say(f"{what}; its name on the hub may be put there (base_model_name_or_path)")
    what = "the adapter" if merged is None else "the merged model"
    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True, repo_type="model")
        found = api.upload_folder(
            repo_id=repository, folder_path=folder, allow_patterns=names, commit_message=f"{what} (lopt-edge)"
        )
    except HfHubHTTPError as error:
        status = None if error.response is None else error.response.status_code
        reason = _safe(error)
        if status in (401, 403):
            fix = "check the token's rights for this repository: hf auth login"
            raise InputError(f"the hub refuses ({status}): {reason}", where=repository, fix=fix) from None
        raise RunError(f"the hub did not take it: {reason}", where=repository, fix="try again later") from None
    except (OSError, ValueError) as error:  # no connection; a file that went while it was read
        fix = "check the network, and try again"
        raise RunError(f"could not be pushed: {_safe(error)}", where=repository, fix=fix) from None
    return str(found.commit_url if hasattr(found, "commit_url") else found)


def _files(folder: Path, *, is_model: bool) -> list[str]:
    """The names of the files to push. Raises InputError for a folder that holds no result."""
    wanted = MODEL_FILES if is_model else ADAPTER_FILES
    try:
        check_folder(folder)
        names = [name for name in wanted if (folder / name).is_file()]
        names += sorted(path.name for path in folder.glob(WEIGHTS)) if is_model else []
    except FolderError as error:
        raise InputError(str(error), where="push") from None
    missing = "config.json" if is_model else ADAPTER_NAME
    if missing not in names or (is_model and not list(folder.glob(WEIGHTS))):
        what = f"holds no {'merged model' if is_model else 'adapter'} ({missing} is missing)"
        raise InputError(what, where=str(folder), fix="name the output folder of a finished run; --merged: an export")
    return names


def _local_base(folder: Path) -> str | None:
    """The base that an adapter's config names, where that is a path of this machine."""
    path = folder / "adapter_config.json"
    try:
        config: Any = read_json(path) if path.is_file() else {}
    except FolderError:
        return None
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    return base if isinstance(base, str) and base.startswith(("/", ".", "~")) else None


def _safe(error: Exception) -> str:
    """What an error says, in one line and without anything that looks like a token."""
    return TOKEN.sub("hf_...", " ".join(str(error).split())[:300])
