"""The two vocabulary matrices (token embedding, lm_head): rows gathered by id, or read in chunks of the vocabulary.

They stay in their original precision and are the largest tensors of a small model, so they are not kept in memory on the
CPU: rows and chunks come by positioned reads from the model's file (the operating system's page cache makes a repeated
read a memory copy, and does not count as ours), into buffers that are reused. On CUDA the lm_head lies on the device.
Those of a GGUF file may be in blocks (quant/gguf): read, and on a GPU kept, as blocks, and unpacked when asked for.
On a GPU what is read goes up through pinned memory (run/tiers/staging.py), so that the host waits for nothing; the rows of
a step's first tokens can be read ahead, while the step before computes.
The rule: a chunk is void once the next one is asked for. No arithmetic here.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lopt_edge.errors import InputError
from lopt_edge.run.tiers.staging import Room, Stage, brought
from quant.files import TORCH_DTYPES, read_bytes, tensor_bytes
from quant.gguf.types import BLOCK_TYPES
from quant.gguf.unpack import Scratch
from quant.gguf.weight import GgufWeight, shared_scratch
from quant.headers import TensorEntry


class Vocabulary:
    """A (vocabulary, hidden) matrix that is read from its file as needed. `resident` puts it whole on the device.

    `shared` holds what packed matrices share; `stage` is the way up to a GPU. Where the matrix is in blocks, `matrix_VD`
    has bytes for columns.
    """

    def __init__(
        self,
        entry: TensorEntry,
        *,
        device: torch.device,
        dtype: torch.dtype,
        resident: bool,
        shared: dict[object, Tensor] | None = None,
        stage: Stage | None = None,
    ) -> None:
        self.stage = stage
        self._ahead: tuple[Tensor, Room, Room] | None = None  # ids, their rows, and which of these each id has
        self.entry, self.device, self.dtype = entry, device, dtype
        self.n_rows, self.n_columns = entry.shape
        self.row_bytes = entry.n_bytes // self.n_rows
        self.type = None if entry.dtype in TORCH_DTYPES else BLOCK_TYPES[entry.dtype]
        self.stored_dtype = torch.uint8 if self.type else TORCH_DTYPES[entry.dtype]
        self._scratch = Scratch(shared_scratch(device, {} if shared is None else shared)) if self.type else None
        self.matrix_VD: Tensor | None = self._read(0, self._empty(self.n_rows)).to(device) if resident else None
        self._raw: Tensor | None = None
        self._cast: Tensor | None = None

    def rows(self, ids_N: Tensor, *, host_ids_N: Tensor | None = None) -> Tensor:
        """The rows (N, hidden) of these ids in the compute dtype on the device; ids are (N,) int64 on any device.

        `host_ids_N` are the same ids on the host, if they are there: a GPU's host waits for its own. Raises InputError for
        an id that has no row: in the file another tensor's data would lie there. (A resident matrix is indexed by torch,
        which checks.)
        """
        if self.matrix_VD is not None:
            found = self.matrix_VD[ids_N.to(self.device)]
            return found.to(self.dtype) if self.type is None else self._unpack(found)
        host_ids_N = ids_N.cpu() if host_ids_N is None else host_ids_N
        if self.stage is None:
            unique, inverse = self._places(host_ids_N)
            raw = self._gather(unique, self._empty(len(unique)))
            if self.type is None:
                return raw.to(device=self.device, dtype=self.dtype)[inverse.to(self.device)]
            return self._unpack(raw.to(self.device))[inverse.to(self.device)]
        rows, inverse_room = self._take_ahead(host_ids_N) or self._staged(self.stage, host_ids_N)
        found = self.stage.send(rows)
        return (found if self.type is None else self._unpack(found))[self.stage.send(inverse_room)]

    def read_ahead(self, ids_N: Tensor) -> None:
        """Read the rows of these ids (on the host) now, for a call of `rows` with the same tensor that will come."""
        if self.stage is not None and self.matrix_VD is None:
            self._drop_ahead()
            self._ahead = (ids_N, *self._staged(self.stage, ids_N))

    def _take_ahead(self, ids_N: Tensor) -> tuple[Room, Room] | None:
        """What was read ahead, if it is of these ids."""
        if self._ahead is None:
            return None
        known_N, *rooms = self._ahead
        if known_N.data_ptr() != ids_N.data_ptr() or len(known_N) != len(ids_N):  # it is held: no other tensor is there
            return None
        self._ahead = None
        return rooms[0], rooms[1]

    def _drop_ahead(self) -> None:
        if self._ahead is not None and self.stage is not None:
            for room in self._ahead[1:]:
                self.stage.drop(room)
        self._ahead = None

    def _staged(self, stage: Stage, ids_N: Tensor) -> tuple[Room, Room]:
        """The rows of these ids, each once, and which of them each id has, on their way up."""
        unique, inverse = self._places(ids_N)
        rows = self._room(stage, len(unique))
        self._gather(unique, rows.host)
        return self._in_compute_dtype_there(stage, rows), stage.put(inverse)

    def _places(self, ids_N: Tensor) -> tuple[list[int], Tensor]:
        """The ids, each once and in order, and which of them each one is. Raises InputError for one without a row."""
        found, inverse = torch.unique(ids_N, return_inverse=True)
        unique: list[int] = found.tolist()
        if unique and not (unique[0] >= 0 and unique[-1] < self.n_rows):  # they are sorted
            raise InputError(
                f"token id {unique[-1]} is beyond the model's {self.n_rows} rows",
                where="model",
                fix="use the tokenizer that belongs to the model",
            )
        return unique, inverse

    def _gather(self, unique: list[int], raw: Tensor) -> Tensor:
        """Fill `raw` with the rows of these ids."""
        for i, row in enumerate(unique):
            self._read(row, raw[i : i + 1])
        return raw

    def chunks(self, n_rows: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, rows (<= n_rows, hidden) in the compute dtype) through the whole vocabulary, in order.

        The rows are void once the next ones are asked for.
        """
        for start in range(0, self.n_rows, n_rows):
            count = min(n_rows, self.n_rows - start)
            if self.matrix_VD is not None:
                yield start, self._in_compute_dtype(self.matrix_VD[start : start + count])
                continue
            if self.stage is not None:
                room = self._room(self.stage, count)
                self._read(start, room.host)
                yield start, self._up(self.stage, self._in_compute_dtype_there(self.stage, room), out=self._cast_of(count))
                continue
            if self._raw is None or len(self._raw) < count:
                self._raw = self._empty(count)
            yield start, self._in_compute_dtype(self._read(start, self._raw[:count]))

    def rows_from(self, first: int, count: int) -> Tensor:
        """`count` rows from `first` on (count, hidden) in the compute dtype, in a tensor of their own."""
        if self.matrix_VD is None:
            raw = self._read(first, self._empty(count))
            raw = brought(self.stage, raw, self.device, dtype=self.dtype if self.type is None else None)
            return raw if self.type is None else self._unpack(raw)
        raw = self.matrix_VD[first : first + count]
        return raw.to(self.dtype) if self.type is None else self._unpack(raw)

    def _room(self, stage: Stage, n_rows: int) -> Room:
        """Room for so many rows as they are stored."""
        return stage.room((n_rows, self.row_bytes // self.stored_dtype.itemsize), self.stored_dtype)

    def _in_compute_dtype_there(self, stage: Stage, room: Room) -> Room:
        """The rows of a room in the compute dtype, unless they are in blocks; the host casts what is stored otherwise."""
        if self.type is not None or self.stored_dtype == self.dtype:
            return room
        cast = stage.put(room.host, dtype=self.dtype)
        stage.drop(room)
        return cast

    def _up(self, stage: Stage, room: Room, *, out: Tensor) -> Tensor:
        """The values of a room's rows on the device, in `out`."""
        return stage.send(room, out=out) if self.type is None else self._unpack(stage.send(room), out)

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
        cast = self._cast_of(len(raw))
        return cast.copy_(raw) if self.type is None else self._unpack(raw.to(self.device), cast)

    def _cast_of(self, count: int) -> Tensor:
        """Room on the device for a chunk's rows in the compute dtype, kept for the next one."""
        if self._cast is None or len(self._cast) < count:
            self._cast = torch.empty(count, self.n_columns, dtype=self.dtype, device=self.device)
        return self._cast[:count]
