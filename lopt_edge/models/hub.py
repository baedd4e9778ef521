"""Models named by a hub id: what is fetched, and the error where that is refused.

The rule: configuration, weights in safetensors and the tokenizer's files are all that is ever asked for; no code and no
pickle. A plan needs the configuration alone. Who reads the folder afterwards is folder.py.
"""

from __future__ import annotations

from pathlib import Path

from lopt_edge.errors import InputError
from lopt_edge.models.blocks import facts_in_blocks, is_grouped, planned
from lopt_edge.models.unlisted import read_facts
from lopt_edge.plan.facts.model import ModelFacts
from quant.gguf.header import SHARD
from quant.headers import FolderError, TensorEntry
from quant.sizes import DTYPE_BYTES
from quant.small_files import SMALL_NAMES
from quant.untrusted import read_config

HUB_PATTERNS = ["model*.safetensors", "model.safetensors.index.json", "config.json", *SMALL_NAMES,
                "additional_chat_templates/*.jinja"]  # fmt: skip


def _download(name: str, revision: str | None) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        path = Path(snapshot_download(name, revision=revision, allow_patterns=HUB_PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise _not_from_hub(name, error) from None
    return path, path.name  # a snapshot's folder is named by its commit


def names_gguf(name: str) -> bool:
    """Whether this is the name of a GGUF file of a hub id, as org/name:FILE.gguf."""
    repository, mark, file = name.partition(":")
    return (
        bool(mark) and repository.count("/") == 1 and file.endswith(".gguf") and not repository.startswith((".", "/", "~"))
    )


def download_gguf(name: str, revision: str | None) -> tuple[Path, str]:
    """The path of a hub id's GGUF file, and the commit; its further shards come with it. Raises InputError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, file = name.partition(":")
    shards = SHARD.sub(r"-*-of-\2.gguf", file)
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=[shards]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise _not_from_hub(name, error) from None
    if not (folder / file).is_file():
        raise InputError(f"{repository} has no file {file!r}", where="model", fix="check the file's name on the hub")
    return folder / file, folder.name


def hub_facts(name: str, *, revision: str | None = None) -> tuple[ModelFacts, int]:
    """The facts and `vocabulary_itemsize` of a hub id, by its config.json and the headers of its weights alone.

    Both are of one commit, also when the branch moves between the two requests. Raises InputError.
    """
    from huggingface_hub import get_safetensors_metadata, hf_hub_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        NotASafetensorsRepoError,
        SafetensorsParsingError,
    )

    try:
        config_path = Path(hf_hub_download(name, "config.json", revision=revision))
        config, commit = read_config(config_path), config_path.parent.name  # .../snapshots/<commit>/config.json
        headers = get_safetensors_metadata(name, revision=commit).files_metadata.values()
    except (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        NotASafetensorsRepoError,
        SafetensorsParsingError,
        FolderError,
        OSError,
    ) as error:
        raise _not_from_hub(name, error) from None
    tensors = {key: tensor for header in headers for key, tensor in header.tensors.items()}
    where = f"{name} config.json"
    if is_grouped(config):
        entries = {key: TensorEntry(key, Path(name), one.dtype, tuple(one.shape), 0, 0) for key, one in tensors.items()}
        return facts_in_blocks(config, planned(entries, config["quantization_config"], where=where), where=where), 4
    facts = read_facts(config, where=where).of_checkpoint(tensors)
    found = [tensor for key, tensor in tensors.items() if key == facts.layout.head(tied=facts.tied)]
    itemsize = DTYPE_BYTES.get(found[0].dtype) if found else 2
    if itemsize is None:
        raise InputError(
            f"the lm_head has dtype {str(found[0].dtype)[:20]!r}",
            where=name,
            fix="use the bfloat16, float16 or float32 form of the model",
        )
    return facts, itemsize


def _not_from_hub(name: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:300]
    return InputError(
        f"{name!r} is no local folder, and the hub did not give it: {reason}",
        where="model",
        fix="check the name, the revision, your access rights and the network; or give a local folder",
    )
