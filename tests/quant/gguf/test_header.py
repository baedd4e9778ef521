"""GGUF headers: what the `gguf` package writes is read; what is truncated, hostile or unknown is a sentence, before memory
is taken."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest

from quant.gguf.header import LongArray, is_gguf, read_arrays, read_gguf_header
from quant.headers import FolderError

DATA = np.arange(8 * 32, dtype=np.float32).reshape(8, 32)


def write(path: Path, **metadata: object) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_array("words", ["one", "two", "drei"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_bool("yes", True)
    writer.add_float32("eps", 1e-5)
    for key, value in metadata.items():
        writer.add_uint32(key.replace("_", "."), value)
    writer.add_tensor("a.weight", DATA)
    writer.add_tensor("b.weight", gguf.quantize(DATA, gguf.GGMLQuantizationType.Q8_0), raw_dtype=8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def raw(*parts: bytes, n_tensors: int = 0, n_keys: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys) + b"".join(parts)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def tensor(name="a", sides=(32, 8), kind=0, offset=0) -> bytes:
    return text(name) + struct.pack(f"<I{len(sides)}QIQ", len(sides), *sides, kind, offset)


def test_what_gguf_writes_is_read(tmp_path):
    path = write(tmp_path / "x.gguf")
    header = read_gguf_header(path)
    assert is_gguf(path) and not is_gguf(Path(__file__)) and not is_gguf(tmp_path / "none")
    assert header.metadata["general.architecture"] == "llama" and header.metadata["llama.block_count"] == 2
    assert header.metadata["numbers"] == [1, 2, 3] and header.metadata["yes"] is True
    assert header.metadata["words"] == LongArray(8, 3)
    assert read_arrays(path, ["words"]) == {"words": ["one", "two", "drei"]}
    first, second = header.entries["a.weight"], header.entries["b.weight"]
    assert (first.dtype, first.shape, second.dtype, second.shape) == ("F32", (8, 32), "Q8_0", (8, 32))
    data = path.read_bytes()
    assert data[first.start :][: first.n_bytes] == DATA.tobytes() and second.n_bytes == 8 * 34
    assert {tensor.name: tensor.data_offset for tensor in gguf.GGUFReader(path).tensors} == {
        name: entry.start for name, entry in header.entries.items()
    }


def test_shards_are_one_model(tmp_path):
    first, second = (tmp_path / f"x-0000{n}-of-00002.gguf" for n in (1, 2))
    write(first, split_count=2)
    with pytest.raises(FolderError, match="file not found"):
        read_gguf_header(first)
    write(second)
    with pytest.raises(FolderError, match="an earlier shard has"):
        read_gguf_header(first)
    second.write_bytes(raw(tensor("c.weight"), b"\0" * 4096, n_tensors=1))
    assert {*read_gguf_header(first).entries} == {"a.weight", "b.weight", "c.weight"}
    write(second, split_count=2)
    with pytest.raises(FolderError, match="not the first"):
        read_gguf_header(second)
    with pytest.raises(FolderError, match="does not end in"):
        read_gguf_header(first.rename(tmp_path / "x.gguf"))


PAD = b"\0" * 8192
HOSTILE = {
    "no GGUF file": b"GGML" + PAD,
    "version 1": raw(version=1),
    "big-endian": raw(version=3 << 24),
    "truncated: its header": raw(n_keys=1)[:20],
    "out of reason": raw(n_tensors=2**60),
    "a key has": raw(struct.pack("<Q", 2**62), n_keys=1),
    "no UTF-8": raw(struct.pack("<Q", 1) + b"\xff", PAD, n_keys=1),
    "unknown type 77": raw(text("k") + struct.pack("<I", 77), n_keys=1),
    "elements of the unknown type 9": raw(text("k") + struct.pack("<IIQ", 9, 9, 1), PAD, n_keys=1),
    "says that it has 4611686018427387904 elements": raw(text("k") + struct.pack("<IIQ", 9, 0, 2**62), PAD, n_keys=1),
    "says that it has 9000 elements": raw(text("k") + struct.pack("<IIQ", 9, 8, 9000), PAD, n_keys=1),
    "a string of 'k' has": raw(text("k") + struct.pack("<IIQQ", 9, 8, 1, 2**50), PAD, n_keys=1),
    "key 'k' twice": raw((text("k") + struct.pack("<IB", 0, 1)) * 2, n_keys=2),
    "general.alignment 3": raw(text("general.alignment") + struct.pack("<II", 4, 3), n_keys=1),
    "has 200 dimensions": raw(text("a") + struct.pack("<I", 200), PAD, n_tensors=1),
    "type IQ2_XXS": raw(tensor(kind=16), PAD, n_tensors=1),
    "type number 99": raw(tensor(kind=99), PAD, n_tensors=1),
    "Q4_K blocks cannot have": raw(tensor(kind=12), PAD, n_tensors=1),
    "F32 blocks cannot have": raw(tensor(sides=(2**40, 2**40)), PAD, n_tensors=1),
    "which F32 blocks": raw(tensor(sides=(32, 0)), PAD, n_tensors=1),
    "ends at byte": raw(tensor(sides=(32, 1000)), PAD, n_tensors=1),
    "no multiple of 32": raw(tensor(offset=7), PAD, n_tensors=1),
    "inside the file": raw(tensor(offset=2**62), PAD, n_tensors=1),
    "overlap": raw(tensor("a"), tensor("b", offset=512), PAD, n_tensors=2),
    "has tensor 'a' twice": raw(tensor("a"), tensor("a", offset=2048), PAD, n_tensors=2),
}


@pytest.mark.parametrize("sentence", HOSTILE)
def test_hostile_files_are_a_sentence_before_memory_is_taken(tmp_path, sentence):
    path = tmp_path / "x.gguf"
    path.write_bytes(HOSTILE[sentence])
    tracemalloc.start()
    with pytest.raises(FolderError, match=sentence) as error:
        read_gguf_header(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert str(path) in str(error.value)


def test_every_cut_of_a_file_is_a_sentence(tmp_path):
    whole = write(tmp_path / "x.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for n_bytes in range(0, len(whole) - 31, 13):  # the last block may be padding
        cut.write_bytes(whole[:n_bytes])
        with pytest.raises(FolderError):
            read_gguf_header(cut)
