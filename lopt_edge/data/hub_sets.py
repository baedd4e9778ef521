"""Hub data sets by name: which of their files are fetched, and which rows of a split are taken.

    org/name    org/name:config    org/name[test]    org/name[train[:5%]]    org/name@revision

The rules: a data set's code is never fetched and never run: what is read are its Parquet files, its own or those that the
hub converts every data set to (the revision refs/convert/parquet), else its JSON lines, JSON or CSV files. A split is told
by the names of files and folders, as the hub does. Without a split it is `train`. Only the files of the wanted config and
split are downloaded, into huggingface_hub's own cache.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lopt_edge.errors import InputError

CONVERTED = "refs/convert/parquet"
ENDINGS = (".parquet", ".jsonl", ".ndjson", ".json", ".csv")  # the first of which there are files is read
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval"),
}
_NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+?)(?::(?P<config>[\w.-]+))?(?:\[(?P<split>[\w-]+)?(?:\[(?P<part>[^\[\]]*)\])?\])?"
    r"(?:@(?P<revision>[\w./-]+))?"
)
_EDGE = re.compile(r"(\d+)(%?)")


@dataclass(frozen=True)
class HubSet:
    """A hub data set as it was named; `first` and `last` bound its rows, as a number or a share (percent)."""

    repo: str
    config: str | None = None
    split: str = "train"
    first: tuple[int, bool] | None = None
    last: tuple[int, bool] | None = None
    revision: str | None = None

    @property
    def is_part(self) -> bool:
        """Whether only a part of the split was asked for."""
        return self.first is not None or self.last is not None

    def part_of(self, n_rows: int) -> range:
        """The rows of so many that were asked for, by number. Raises InputError where none is left."""

        def at(edge: tuple[int, bool] | None, default: int) -> int:
            if edge is None:
                return default
            number, is_percent = edge
            return n_rows * number // 100 if is_percent else number

        found = range(n_rows)[at(self.first, 0) : at(self.last, n_rows)]
        if not found:
            raise InputError(f"no row is left of {n_rows:,}", where=f"data {self.repo}", fix="widen the part in brackets")
        return found


def read_hub_name(text: str) -> HubSet | None:
    """The data set that a text names; None where it has not the form of one. Raises InputError for a wrong part."""
    found = _NAME.fullmatch(text)
    if found is None or PurePosixPath(found["repo"]).suffix.lower() in (*ENDINGS, ".txt", ".gz", ".zst"):
        return None
    first = last = None
    if found["part"] is not None:
        edges = found["part"].split(":")
        read = [None if not edge.strip() else _EDGE.fullmatch(edge.strip()) for edge in edges]
        if len(edges) != 2 or any(edge.strip() and one is None for edge, one in zip(edges, read, strict=True)):
            what = f"[{found['part']}] is no part of a split"
            raise InputError(what, where=f"data {text}", fix="write e.g. [train[:5%]] or [train[100:200]]")
        first, last = ((int(one[1]), bool(one[2])) if one is not None else None for one in read)
    return HubSet(found["repo"], found["config"], found["split"] or "train", first, last, found["revision"])


def fetched(wanted: HubSet) -> tuple[Path, ...]:
    """The files of the wanted config and split, downloaded. Raises InputError."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    refused = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError)
    tried: list[str] = []
    for revision in (wanted.revision, *([CONVERTED] if wanted.revision is None else [])):
        try:
            info = HfApi().dataset_info(wanted.repo, revision=revision)
        except refused as error:
            if revision is None:
                raise _not_from_hub(wanted.repo, error) from None
            continue
        names = [sibling.rfilename for sibling in info.siblings or []]
        tried += names
        if chosen := choose_files(names, wanted, converted=revision == CONVERTED):
            try:
                return tuple(
                    Path(hf_hub_download(wanted.repo, name, repo_type="dataset", revision=info.sha)) for name in chosen
                )
            except refused as error:
                raise _not_from_hub(wanted.repo, error) from None
    configs = sorted({name.split("/")[0] for name in tried if "/" in name and name.endswith(ENDINGS)})
    there = f"; folders there: {', '.join(configs[:8])}" if configs else ""
    config = f", config {wanted.config}" if wanted.config else ""
    raise InputError(
        f"no data files of split {wanted.split}{config} were found{there}",
        where=f"data {wanted.repo}",
        fix="name another, as org/name:config[split]; code of a data set is never run",
    )


def choose_files(names: list[str], wanted: HubSet, *, converted: bool) -> list[str]:
    """Of a repository's files those of the config and split, of the first form there is. Raises InputError for several
    configs where none is named."""
    for ending in ENDINGS:
        files = sorted(name for name in names if name.lower().endswith(ending) and not name.startswith("."))
        if wanted.config is not None:
            files = [
                name for name in files if wanted.config in PurePosixPath(name).parts[:-1] or _stem(name) == wanted.config
            ]
        elif converted:
            configs = sorted({name.split("/")[0] for name in files})
            if len(configs) > 1 and "default" not in configs:
                what = f"has several configs: {', '.join(configs[:12])}"
                raise InputError(what, where=f"data {wanted.repo}", fix=f"name one, as {wanted.repo}:{configs[0]}")
            files = [name for name in files if name.split("/")[0] == ("default" if "default" in configs else configs[0])]
        found = [name for name in files if _is_of_split(name, wanted.split)]
        if not found and wanted.split == "train" and files and not any(_names_a_split(name) for name in files):
            found = files  # no file says which split it is: all of it is train, as the hub has it
        if found:
            return found
    return []


def _stem(name: str) -> str:
    return PurePosixPath(name).name.split(".")[0]


def _words(name: str) -> set[str]:
    return {word for part in PurePosixPath(name).parts for word in re.split(r"[^A-Za-z]+", part.lower()) if word}


def _is_of_split(name: str, split: str) -> bool:
    return bool(_words(name) & set(SPLITS.get(split, (split.lower(),))))


def _names_a_split(name: str) -> bool:
    return any(_is_of_split(name, split) for split in SPLITS)


def _not_from_hub(repo: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:300]
    return InputError(
        f"is no local file, and the hub did not give it: {reason}",
        where=f"data {repo}",
        fix="check the path or the name, your access rights (gated sets need a login) and the network",
    )
