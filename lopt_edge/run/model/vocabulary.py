"""The two vocabulary matrices (token embedding, lm_head): rows gathered by id, or read in chunks of the vocabulary.

They stay in their original precision and are the largest tensors of a small model, so they are not kept in memory on the
CPU: rows and chunks come by positioned reads from the model's file (the operating system's page cache makes a repeated
read a memory copy, and does not count as ours), into buffers that are reused. On CUDA the lm_head lies on the device.
The rule: a chunk is void once the next one is asked for. No arithmetic here.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lopt_edge.errors import InputError
from quant.files import TORCH_DTYPES, read_bytes, read_tensor, tensor_bytes
from quant.headers import TensorEntry


class Vocabulary:
    """A (vocabulary, hidden) matrix that is read from its file as needed. `resident` puts it whole on the device."""

    def __init__(self, entry: TensorEntry, *, device: torch.device, dtype: torch.dtype, resident: bool) -> None:
        self.entry, self.device, self.dtype = entry, device, dtype
        self.n_rows, self.n_columns = entry.shape
        self.stored_dtype = TORCH_DTYPES[entry.dtype]
        self.row_bytes = self.n_columns * self.stored_dtype.itemsize
        self.matrix_VD: Tensor | None = read_tensor(entry).to(device) if resident else None
        self._raw: Tensor | None = None
        self._cast: Tensor | None = None

    def rows(self, ids_N: Tensor) -> Tensor:
        """The rows (N, hidden) of these ids in the compute dtype on the device; ids are (N,) int64 on any device.

        Raises InputError for an id that has no row: in the file another tensor's data would lie there. (A resident
        matrix is indexed by torch, which checks.)
        """
        if self.matrix_VD is not None:
            return self.matrix_VD[ids_N].to(self.dtype)
        unique, inverse = torch.unique(ids_N.cpu(), return_inverse=True)
        if len(unique) and not (unique[0] >= 0 and unique[-1] < self.n_rows):  # they are sorted
            raise InputError(
                f"token id {int(unique[-1])} is beyond the model's {self.n_rows} rows",
                where="model",
                fix="use the tokenizer that belongs to the model",
            )
        raw = torch.empty(len(unique), self.n_columns, dtype=self.stored_dtype)
        data = tensor_bytes(raw)
        for i, row in enumerate(unique.tolist()):
            read_bytes(self.entry, data[i * self.row_bytes : (i + 1) * self.row_bytes], start=row * self.row_bytes)
        return raw.to(device=self.device, dtype=self.dtype)[inverse.to(self.device)]

    def chunks(self, n_rows: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, rows (<= n_rows, hidden) in the compute dtype) through the whole vocabulary, in order.

        The rows are void once the next ones are asked for.
        """
        for start in range(0, self.n_rows, n_rows):
            count = min(n_rows, self.n_rows - start)
            if self.matrix_VD is not None:
                yield start, self.matrix_VD[start : start + count].to(self.dtype)
                continue
            if self._raw is None or len(self._raw) < count:
                self._raw = torch.empty(count, self.n_columns, dtype=self.stored_dtype)
            raw = self._raw[:count]
            read_bytes(self.entry, tensor_bytes(raw), start=start * self.row_bytes)
            yield start, self._in_compute_dtype(raw)

    def tensors(self) -> list[Tensor]:
        """The tensors that are kept between calls."""
        return [tensor for tensor in (self.matrix_VD, self._raw, self._cast) if tensor is not None]

    def _in_compute_dtype(self, raw: Tensor) -> Tensor:
        if raw.dtype == self.dtype and raw.device.type == self.device.type:
            return raw
        if self._cast is None or len(self._cast) < len(raw):
            self._cast = torch.empty(len(raw), self.n_columns, dtype=self.dtype, device=self.device)
        return self._cast[: len(raw)].copy_(raw)
