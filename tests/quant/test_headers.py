"""Model folders are untrusted input: whatever their bytes say, reading headers gives entries or a FolderError.

Nothing may be believed that the file's real size does not bear out, and no name may lead out of the folder.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quant.headers import INDEX_NAME, SINGLE_NAME, FolderError, SafetensorsWriter, read_header, read_headers, read_json

FUZZ = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
SMALL = st.integers(-1, 40)
# Close to a real entry, so that the fuzz reaches past the first check.
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "F5", "BF16"]) | JSON,
        "shape": st.lists(SMALL, max_size=3) | JSON,
        "data_offsets": st.tuples(SMALL, SMALL) | JSON,
    }
)


def safetensors_bytes(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, *, dtype: str = "U8", shape: list[int] | None = None) -> dict:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def read_or_refuse(path: Path) -> None:
    """Entries whose bytes are all inside the file, or a FolderError that names the file; nothing else."""
    try:
        entries = read_header(path)
    except FolderError as error:
        assert str(path) in str(error)
        return
    size = path.stat().st_size
    for found in entries.values():
        assert 8 <= found.start <= found.start + found.n_bytes <= size
        assert all(side >= 0 for side in found.shape)


@FUZZ
@given(content=st.binary(max_size=60))
def test_any_bytes(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    read_or_refuse(path)


@FUZZ
@given(header=JSON | st.dictionaries(st.text(max_size=4), ENTRY | JSON, max_size=4))
@example(header={"a": {"dtype": [], "shape": [1], "data_offsets": [0, 1]}})  # a dtype that cannot be hashed
@example(header={"a": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}})
@example(header={"\ud800": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}})
def test_any_json_header(tmp_path, header):
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_bytes(header, bytes(40)))
    read_or_refuse(path)


@FUZZ
@given(data=st.data())
def test_a_damaged_real_file(tmp_path, data):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.zeros(5, dtype=torch.uint8)}, path)
    content = bytearray(path.read_bytes())
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[position] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    read_or_refuse(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "too short"),
        (b"\x01\x02", "too short"),
        ((2**63).to_bytes(8, "little"), "header has"),
        ((50).to_bytes(8, "little") + b"{}", "header has"),
        (safetensors_bytes(b"{not json}"), "not valid JSON"),
        (safetensors_bytes(b"[" * 100_000), "not valid JSON"),
        (safetensors_bytes(b"1" * 10_000), "not valid JSON"),
        (safetensors_bytes([1, 2]), "not a JSON object"),
        (safetensors_bytes({"a": 5}), "malformed"),
        (safetensors_bytes({"a": {"dtype": "U8", "shape": [1]}}), "malformed"),
        (safetensors_bytes({"a": entry(0, 9)}, bytes(8)), "truncated"),
        (safetensors_bytes({"a": entry(0, 8, shape=[9])}, bytes(8)), "inconsistent"),
        (safetensors_bytes({"a": entry(0, 8, dtype="F32", shape=[8])}, bytes(8)), "inconsistent"),
        (safetensors_bytes({"a": entry(4, 0, shape=[4])}, bytes(8)), "inconsistent"),
        (safetensors_bytes({"a": entry(-4, 4, shape=[8])}, bytes(8)), "inconsistent"),
        (safetensors_bytes({"a": entry(0, 8, dtype="F99")}, bytes(8)), "inconsistent"),
        (safetensors_bytes({"a": entry(0, 8), "b": entry(4, 8)}, bytes(8)), "overlap"),
        (safetensors_bytes({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)), "overlap"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, content, says):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(FolderError, match=says) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def test_a_truncated_real_shard_is_refused_at_every_length(tmp_path):
    path = tmp_path / SINGLE_NAME
    save_file({"a": torch.ones(4, 4)}, path)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(FolderError):
            read_headers(tmp_path)
    path.write_bytes(content)
    assert read_headers(tmp_path)["a"].shape == (4, 4)


def test_entries_point_at_the_bytes(tmp_path):
    path = tmp_path / SINGLE_NAME
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(7, dtype=torch.int64), "empty": torch.empty(0, 4)}
    save_file(tensors, path, metadata={"format": "pt"})
    content = path.read_bytes()
    entries = read_headers(tmp_path)
    assert entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        found = entries[name]
        assert content[found.start : found.start + found.n_bytes] == tensor.numpy().tobytes()
        assert found.shape == tuple(tensor.shape)


@pytest.mark.parametrize(
    "shard",
    ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", "", "x.bin", "x.safetensors/", 5, None, ["x"],
     "..\\x.safetensors/..", "a\0b.safetensors", "x" * 5000 + ".safetensors", "\ud800.safetensors"],
)  # fmt: skip
def test_an_index_names_files_of_its_own_folder_only(tmp_path, shard):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")  # reachable for who follows ../
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(FolderError):
        read_headers(folder)


@FUZZ
@given(index=JSON | st.fixed_dictionaries({"weight_map": JSON | st.dictionaries(st.text(max_size=3), JSON, max_size=3)}))
def test_any_index(tmp_path, index):
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(FolderError):
        read_headers(tmp_path)


def test_shards_through_an_index(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(3)}, tmp_path / "two.safetensors")
    weight_map = {"a": "one.safetensors", "b": "two.safetensors"}
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    assert {name: found.path.name for name, found in read_headers(tmp_path).items()} == weight_map
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {**weight_map, "c": "two.safetensors"}}))
    with pytest.raises(FolderError, match="'c'"):
        read_headers(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(FolderError, match=r"two\.safetensors.*missing"):
        read_headers(tmp_path)


def test_pickle_weights_are_refused_by_name(tmp_path):
    with pytest.raises(FolderError, match="no weights"):
        read_headers(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(FolderError, match=r"pickle.*pytorch_model\.bin"):
        read_headers(tmp_path)


def test_a_folder_in_place_of_a_file(tmp_path):
    (tmp_path / SINGLE_NAME).mkdir()
    with pytest.raises(FolderError):
        read_headers(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"1" * 10_000])
def test_broken_json_files(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(FolderError, match=r"config\.json"):
        read_json(tmp_path / "config.json")
    with pytest.raises(FolderError, match="not found"):
        read_json(tmp_path / "other.json")


def test_the_writer_makes_what_safetensors_reads(tmp_path):
    path = tmp_path / "out.safetensors"
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(4, dtype=torch.uint8)}
    with SafetensorsWriter(path, [("a", "F32", (3, 5)), ("b", "U8", (4,))]) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor.numpy().tobytes())
        assert not path.exists(), "the file appears when it is complete"
    for name, tensor in load_file(path).items():
        assert torch.equal(tensor, tensors[name])
    assert read_header(path)["a"].start % 8 == 0


@pytest.mark.parametrize("fault", ["wrong name", "wrong size", "too few", "exception"])
def test_a_writer_that_fails_leaves_the_old_file(tmp_path, fault):
    path = tmp_path / "out.safetensors"
    path.write_bytes(b"old")
    with pytest.raises((ValueError, KeyboardInterrupt)), SafetensorsWriter(path, [("a", "U8", (4,))]) as writer:
        if fault == "exception":
            raise KeyboardInterrupt
        if fault != "too few":
            writer.write("b" if fault == "wrong name" else "a", bytes(4 if fault == "wrong name" else 5))
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["out.safetensors"]
