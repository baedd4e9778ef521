"""Rows and chunks of a vocabulary matrix behind a file equal the tensor, whether it is held in memory or read by pieces."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from lopt_edge.errors import InputError
from lopt_edge.run.model.vocabulary import Vocabulary
from quant.headers import FolderError, read_header

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_vocabulary(folder, matrix: torch.Tensor, *, dtype: torch.dtype, resident: bool) -> Vocabulary:
    path = folder / "x.safetensors"
    save_file({"other": torch.ones(3), "matrix": matrix}, path)
    return Vocabulary(read_header(path)["matrix"], device=torch.device("cpu"), dtype=dtype, resident=resident)


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_rows_and_chunks_equal_the_tensor(tmp_path, stored, dtype, resident):
    matrix = torch.randn(53, 24, generator=torch.Generator().manual_seed(0)).to(stored)
    vocabulary = make_vocabulary(tmp_path, matrix, dtype=dtype, resident=resident)
    assert (vocabulary.n_rows, vocabulary.n_columns) == (53, 24)
    ids = torch.tensor([5, 0, 52, 5, 5, 17])
    rows = vocabulary.rows(ids)
    assert rows.dtype == dtype
    assert torch.equal(rows, matrix[ids].to(dtype))
    assert vocabulary.rows(ids[:0]).shape == (0, 24)
    for n_rows in (1, 10, 53, 100):
        seen = 0
        for start, chunk in vocabulary.chunks(n_rows):  # a chunk is void once the next one is asked for
            assert start == seen
            assert chunk.dtype == dtype
            assert torch.equal(chunk, matrix[start : start + n_rows].to(dtype))
            seen += len(chunk)
        assert seen == 53


def test_rows_stay_valid_while_chunks_are_read(tmp_path):
    matrix = torch.randn(20, 8)
    vocabulary = make_vocabulary(tmp_path, matrix, dtype=torch.float32, resident=False)
    rows = vocabulary.rows(torch.tensor([3, 4]))
    list(vocabulary.chunks(7))
    assert torch.equal(rows, matrix[3:5])


def test_what_is_not_resident_is_not_held(tmp_path):
    vocabulary = make_vocabulary(tmp_path, torch.randn(1000, 8), dtype=torch.bfloat16, resident=False)
    list(vocabulary.chunks(10))
    vocabulary.rows(torch.arange(5))
    held = [value for value in vars(vocabulary).values() if isinstance(value, torch.Tensor)]
    assert sum(tensor.nbytes for tensor in held) == 10 * 8 * (4 + 2)  # one chunk as stored, one in the compute dtype


def test_a_file_that_shrinks_is_told(tmp_path):
    vocabulary = make_vocabulary(tmp_path, torch.randn(20, 8), dtype=torch.float32, resident=False)
    path = tmp_path / "x.safetensors"
    path.write_bytes(path.read_bytes()[:-16])
    with pytest.raises(FolderError, match="'matrix'"):
        vocabulary.rows(torch.tensor([19]))
    with pytest.raises(FolderError, match="'matrix'"):
        list(vocabulary.chunks(20))


@pytest.mark.parametrize("bad", [53, -1])
def test_an_id_without_a_row_is_refused(tmp_path, bad):
    """Behind the last row lie the bytes of another tensor; they must never pass as an embedding."""
    vocabulary = make_vocabulary(tmp_path, torch.randn(53, 24), dtype=torch.float32, resident=False)
    with pytest.raises(InputError, match="rows"):
        vocabulary.rows(torch.tensor([3, bad]))
