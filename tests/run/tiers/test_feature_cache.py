"""The cache of hidden states: what was written comes back rounded to bfloat16, what is torn or damaged is absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from lopt_edge.errors import InputError, RunError
from lopt_edge.run.tiers.feature_cache import MARKS_NAME, ROWS_NAME, FeatureCache

LENGTHS, WIDTH, CPU = (5, 2, 7, 1), 6, torch.device("cpu")
IDENTITY = {"model": "m", "data": "d", "boundary": 2}


def make_cache(folder: Path, **changes: object) -> FeatureCache:
    folder.mkdir(exist_ok=True)
    return FeatureCache(folder, identity=IDENTITY | changes, lengths=LENGTHS, width=WIDTH)


def rounded(rows: torch.Tensor) -> torch.Tensor:
    return rows.to(torch.bfloat16).float()


def hidden(examples: list[int], seed: int = 0) -> torch.Tensor:
    """A padded micro-batch; padding is no zero."""
    shape = len(examples), max(LENGTHS[i] for i in examples), WIDTH
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_what_was_written_comes_back_rounded(tmp_path):
    cache = make_cache(tmp_path)
    written = hidden([2, 0])
    assert not cache.has([2]) and not cache.has([0])
    cache.write([2, 0], written)
    assert cache.has([2, 0]) and not cache.has([0, 1])
    cache.close()
    cache = make_cache(tmp_path)  # another process
    assert cache.has([0, 2])
    found = cache.read([0, 2], n_tokens=8, device=CPU, dtype=torch.float32)
    assert torch.equal(found[0, :5], rounded(written[1, :5]))
    assert torch.equal(found[1, :7], rounded(written[0, :7]))
    assert not found[0, 5:].any() and not found[1, 7:].any()
    assert cache.n_bytes == 2 * WIDTH * sum(LENGTHS)


@pytest.mark.parametrize("name", [ROWS_NAME, MARKS_NAME])
@pytest.mark.parametrize("damage", ["flipped", "truncated"])
def test_a_damaged_example_is_absent_and_can_be_written_again(tmp_path, name, damage):
    cache = make_cache(tmp_path)
    cache.write([3, 0], hidden([3, 0]))
    cache.close()
    path = tmp_path / name
    content = bytearray(path.read_bytes())
    position = 2 if name == ROWS_NAME else 5
    path.write_bytes(
        content[:position]
        if damage == "truncated"
        else content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]
    )
    cache = make_cache(tmp_path)
    assert not cache.has([0])
    assert cache.has([3]) == (damage == "flipped")
    again = hidden([0], seed=1)
    cache.write([0], again)
    cache.close()
    cache = make_cache(tmp_path)
    assert cache.has([0])
    assert torch.equal(cache.read([0], n_tokens=5, device=CPU, dtype=torch.float32), rounded(again))


@pytest.mark.parametrize("change", [{"model": "x"}, {"data": "x"}, {"boundary": 3}])
def test_a_cache_of_something_else_is_refused(tmp_path, change):
    make_cache(tmp_path).close()
    with pytest.raises(InputError, match=f"another run: {next(iter(change))} was .*, is {next(iter(change.values()))}"):
        make_cache(tmp_path, **change)


def test_other_folders_are_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match=r"'thesis.tex', but no cache"):
        make_cache(tmp_path)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "identity.json").write_text("{")
    with pytest.raises(InputError, match=r"identity\.json"):
        make_cache(tmp_path / "cache")


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    cache = make_cache(tmp_path)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(RunError, match="No space left"):
        cache.write([0], hidden([0]))
    assert not cache.has([0])
