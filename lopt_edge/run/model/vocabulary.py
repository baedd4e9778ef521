"""The two vocabulary matrices (token embedding, lm_head): rows gathered by id, or read in chunks of the vocabulary.

They stay in their original precision and are the largest tensors of a small model, so they are not kept in memory on the
CPU: rows and chunks come by positioned reads from the model's file (the operating system's page cache makes a repeated
read a memory copy, and does not count as ours), into buffers that are reused. On CUDA the lm_head lies on the device.
Those of a GGUF file may be in blocks (quant/gguf): read, and on a GPU kept, as blocks, and unpacked when asked for.
The rule: a chunk is void once the next one is asked for. No arithmetic here.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lopt_edge.errors import InputError
from quant.files import TORCH_DTYPES, read_bytes, tensor_bytes
from quant.gguf.types import BLOCK_TYPES
from quant.gguf.unpack import Scratch
from quant.gguf.weight import GgufWeight, shared_scratch
from quant.headers import TensorEntry


class Vocabulary:
    """A (vocabulary, hidden) matrix that is read from its file as needed. `resident` puts it whole on the device.

    `shared` holds what packed matrices share. Where the matrix is in blocks, `matrix_VD` has bytes for columns.
    """

    def __init__(
        self,
        entry: TensorEntry,
        *,
        device: torch.device,
        dtype: torch.dtype,
        resident: bool,
        shared: dict[object, Tensor] | None = None,
    ) -> None:
        self.entry, self.device, self.dtype = entry, device, dtype
        self.n_rows, self.n_columns = entry.shape
        self.row_bytes = entry.n_bytes // self.n_rows
        self.type = None if entry.dtype in TORCH_DTYPES else BLOCK_TYPES[entry.dtype]
        self.stored_dtype = torch.uint8 if self.type else TORCH_DTYPES[entry.dtype]
        self._scratch = Scratch(shared_scratch(device, {} if shared is None else shared)) if self.type else None
        self.matrix_VD: Tensor | None = self._read(0, self._empty(self.n_rows)).to(device) if resident else None
        self._raw: Tensor | None = None
        self._cast: Tensor | None = None

    def rows(self, ids_N: Tensor) -> Tensor:
        """The rows (N, hidden) of these ids in the compute dtype on the device; ids are (N,) int64 on any device.

        Raises InputError for an id that has no row: in the file another tensor's data would lie there. (A resident
        matrix is indexed by torch, which checks.)
        """
        if self.matrix_VD is not None:
            found = self.matrix_VD[ids_N.to(self.device)]
            return found.to(self.dtype) if self.type is None else self._unpack(found)
        unique, inverse = torch.unique(ids_N.cpu(), return_inverse=True)
        if len(unique) and not (unique[0] >= 0 and unique[-1] < self.n_rows):  # they are sorted
            raise InputError(
                f"token id {int(unique[-1])} is beyond the model's {self.n_rows} rows",
                where="model",
                fix="use the tokenizer that belongs to the model",
            )
        raw = self._empty(len(unique))
        for i, row in enumerate(unique.tolist()):
            self._read(row, raw[i : i + 1])
        if self.type is None:
            return raw.to(device=self.device, dtype=self.dtype)[inverse.to(self.device)]
        return self._unpack(raw.to(self.device))[inverse.to(self.device)]

    def chunks(self, n_rows: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, rows (<= n_rows, hidden) in the compute dtype) through the whole vocabulary, in order.

        The rows are void once the next ones are asked for.
        """
        for start in range(0, self.n_rows, n_rows):
            count = min(n_rows, self.n_rows - start)
            if self.matrix_VD is not None:
                yield start, self._in_compute_dtype(self.matrix_VD[start : start + count])
                continue
            if self._raw is None or len(self._raw) < count:
                self._raw = self._empty(count)
            yield start, self._in_compute_dtype(self._read(start, self._raw[:count]))

    def rows_from(self, first: int, count: int) -> Tensor:
        """`count` rows from `first` on (count, hidden) in the compute dtype, in a tensor of their own."""
        raw = self._read(first, self._empty(count)) if self.matrix_VD is None else self.matrix_VD[first : first + count]
        return raw.to(device=self.device, dtype=self.dtype) if self.type is None else self._unpack(raw.to(self.device))

    def tensors(self) -> list[Tensor]:
        """The tensors that are kept between calls."""
        return [tensor for tensor in (self.matrix_VD, self._raw, self._cast) if tensor is not None]

    def _empty(self, n_rows: int) -> Tensor:
        """Room for so many rows as they are stored."""
        return torch.empty(n_rows, self.row_bytes // self.stored_dtype.itemsize, dtype=self.stored_dtype)

    def _read(self, first: int, out: Tensor) -> Tensor:
        """Fill `out` with rows from `first` on."""
        if out.numel():
            read_bytes(self.entry, tensor_bytes(out), start=first * self.row_bytes)
        return out

    def _unpack(self, blocks: Tensor, out: Tensor | None = None) -> Tensor:
        """The values of rows in blocks, which lie on the device."""
        assert self.type is not None and self._scratch is not None
        if out is None:
            out = torch.empty(len(blocks), self.n_columns, dtype=self.dtype, device=self.device)
        weight = GgufWeight(blocks.view(-1), (len(blocks), self.n_columns), self.type, self._scratch)
        return weight.unpack_into(out)

    def _in_compute_dtype(self, raw: Tensor) -> Tensor:
        if self.type is None and raw.dtype == self.dtype and raw.device.type == self.device.type:
            return raw
        if self._cast is None or len(self._cast) < len(raw):
            self._cast = torch.empty(len(raw), self.n_columns, dtype=self.dtype, device=self.device)
        cast = self._cast[: len(raw)]
        return cast.copy_(raw) if self.type is None else self._unpack(raw.to(self.device), cast)
