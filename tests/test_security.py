"""The promises of SECURITY.md about foreign folders and files. Templates: data/test_data_sandbox.py; fuzzing:
tests/tools/test_fuzz.py.

Each attack is one that worked, or one that the promise names.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from lopt_edge.data import read_records, records
from lopt_edge.errors import InputError
from lopt_edge.models.folder import find_model, tensor_entries
from lopt_edge.models.tokenizer import load_tokenizer
from lopt_edge.models.tokenizer_sizes import check_tokenizer_sizes
from lopt_edge.run.model.lora import check_adapter_folder
from quant import untrusted
from quant.files import packed_on_disk
from quant.headers import FolderError, read_header, read_headers, read_json
from quant.untrusted import MAX_JSON_DEPTH, check_folder, parse_json, printable
from tools.tiny_models import make_folder

ADAPTER = {"peft_type": "LORA", "lora_alpha": 8, "r": 2, "bias": "none"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "model")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    save_file({"x": torch.ones(2)}, folder / "adapter_model.safetensors")
    return folder


def within(seconds: float, call: Callable[[], object]) -> object:
    """What a call gives or raises; a failure if it is not over in time (in a thread: it may be blocked for ever)."""
    found: list[object] = []

    def run() -> None:
        try:
            found.append(call())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert found, f"not over in {seconds} s"
    return found[0]


# --- links, special files, pickles ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "LICENSE", "tokenizer.json", "chat_template.jinja"])
def test_a_link_out_of_the_folder_is_refused(model, tmp_path, name):
    """An export copies LICENSE*, tokenizer* and chat_template*: a link could carry a private file along."""
    secret = tmp_path / "secret"
    secret.write_bytes((model / name).read_bytes() if (model / name).exists() else b"private")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(Path("..") / "secret")
    with pytest.raises(InputError, match=rf"{name}.*leads out of the folder"):
        find_model(str(model))
    with pytest.raises(InputError, match="leads out of the folder"):
        tensor_entries(model)
    with pytest.raises(InputError, match="leads out of the folder"):
        load_tokenizer(model)


def test_a_link_inside_the_folder_and_a_linked_folder_are_taken(model, tmp_path):
    (model / "config.json").rename(model / "real.json")
    (model / "config.json").symlink_to("real.json")
    (tmp_path / "link").symlink_to(model)
    assert find_model(str(tmp_path / "link")).facts.n_layers == 4


def test_a_hub_snapshot_links_into_its_own_blobs_only(model, tmp_path):
    repository = tmp_path / "models--org--tiny"
    snapshot = repository / "snapshots" / "0123abc"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(model.iterdir())):
        path.rename(repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    assert len(tensor_entries(find_model(str(snapshot)).path)) > 4 * 7
    (tmp_path / "LICENSE").write_text("private")
    (snapshot / "LICENSE").symlink_to(Path("..") / ".." / ".." / "LICENSE")
    with pytest.raises(InputError, match="leads out of the folder"):
        find_model(str(snapshot))


def test_a_subfolder_that_transformers_reads_is_looked_at(model, tmp_path):
    (model / "additional_chat_templates").mkdir()
    (tmp_path / "x.jinja").write_text("x")
    (model / "additional_chat_templates" / "x.jinja").symlink_to(tmp_path / "x.jinja")
    with pytest.raises(FolderError, match=r"x\.jinja.*leads out"):
        check_folder(model)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_fifo_blocks_nobody(model, name):
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    for call in (lambda: find_model(str(model)), lambda: tensor_entries(model), lambda: load_tokenizer(model)):
        assert "not a regular file" in str(within(20, call))


def test_a_fifo_in_an_adapter_folder_blocks_nobody(adapter):
    (adapter / "adapter_model.safetensors").unlink()
    os.mkfifo(adapter / "adapter_model.safetensors")
    assert "not a regular file" in str(within(20, lambda: check_adapter_folder(adapter)))


def test_a_loop_of_links_is_told(tmp_path):
    (tmp_path / "config.json").symlink_to("config.json")
    with pytest.raises(FolderError, match=r"config\.json"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("pickle", ["adapter_model.bin", "adapter_model.pt"])
def test_a_pickled_adapter_is_refused_with_the_reason(adapter, pickle):
    (adapter / "adapter_model.safetensors").rename(adapter / pickle)
    (adapter / "training_args.bin").write_bytes(b"")
    with pytest.raises(InputError, match=rf"(?s)pickle.*{pickle}.*foreign code"):
        check_adapter_folder(adapter)


# --- no code of the folder --------------------------------------------------------------------------------------------

EVIL = "import pathlib; pathlib.Path(__file__).with_name('ran').write_text('x')\nclass Evil: pass\n"


@pytest.mark.parametrize("legacy", [False, True])
def test_a_tokenizer_class_of_the_folder_is_never_imported(model, legacy):
    names = ["evil.Evil", "evil.Evil"]
    values = {"tokenizer_class": "Evil", "auto_map": names if legacy else {"AutoTokenizer": names}}
    (model / "tokenizer_config.json").write_text(json.dumps(values))
    (model / "evil.py").write_text(EVIL)
    with pytest.raises(InputError, match="tokenizer"):
        load_tokenizer(model)
    assert not list(model.parent.rglob("ran"))


def test_a_model_class_of_the_folder_is_never_imported(model):
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "evil.py").write_text(EVIL)
    from lopt_edge.run.model.classes import import_model_code

    assert import_model_code(model).__module__.startswith("transformers.")
    assert not list(model.parent.rglob("ran"))


def test_a_tokenizer_config_names_no_file_elsewhere(model, tmp_path):
    """The class would open what `tokenizer_file` or its first argument names."""
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"outside": 0}, unk_token="outside")).save(str(tmp_path / "outside.json"))
    path = model / "tokenizer_config.json"
    outside = str(tmp_path / "outside.json")
    path.write_text(json.dumps({"tokenizer_file": outside, "tokenizer_class": "PreTrainedTokenizerFast"}))
    with contextlib.suppress(InputError):
        assert "outside" not in load_tokenizer(model).get_vocab()
    path.write_text(json.dumps({"init_inputs": [outside]}))
    with pytest.raises(InputError, match="init_inputs"):
        load_tokenizer(model)


def test_a_panic_of_the_tokenizers_library_is_an_input_error(model, monkeypatch):
    import transformers

    class PanicException(BaseException):  # as pyo3 makes it
        pass

    def panic(*_: object, **__: object) -> None:
        raise PanicException("index out of bounds")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", panic)
    with pytest.raises(InputError, match="PanicException"):
        load_tokenizer(model)


# --- depth and size ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one", ['{"a":', "["])
def test_json_has_a_depth_limit(tmp_path, one):
    close = "}" if one == '{"a":' else "]"
    for depth, fits in ((MAX_JSON_DEPTH, True), (MAX_JSON_DEPTH + 1, False), (100_000, False)):
        text = one * depth + "1" + close * depth
        path, data = tmp_path / "config.json", tmp_path / "d.jsonl"
        path.write_text(text)
        data.write_text('{"a":' + one * (depth - 1) + "1" + close * (depth - 1) + "}")
        if fits:
            assert parse_json(text) == read_json(path)
            assert read_records(data)
        else:
            with pytest.raises(FolderError, match=r"config\.json.*deeper than 64"):
                read_json(path)
            with pytest.raises(InputError, match=r"d\.jsonl:1.*deeper than 64"):
                read_records(data)
    header = b'{"__metadata__": ' + b"[" * 100 + b"]" * 100 + b"}"
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(FolderError, match=r"x\.safetensors.*deeper than 64"):
        read_header(tmp_path / "x.safetensors")


def test_json_has_a_size_limit(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(untrusted.MAX_JSON_BYTES + 1)  # sparse: takes no disk
    with pytest.raises(FolderError, match=r"config\.json: has \d+ bytes"):
        read_json(path)
    (tmp_path / "x.safetensors").write_bytes((2**26).to_bytes(8, "little"))
    with (tmp_path / "x.safetensors").open("r+b") as file:
        file.truncate(2**27)
    with pytest.raises(FolderError, match="says its header has"):
        read_header(tmp_path / "x.safetensors")
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(untrusted.MAX_SMALL_FILE_BYTES + 1)
    with pytest.raises(FolderError, match=r"tokenizer\.json: is too large"):
        check_folder(tmp_path)


@pytest.mark.parametrize("value", [
    {"num_labels": 10**9}, {"text_config": {"num_labels": 10**9}}, {"a": [{"num_labels": 10.0**9}]},
    {"num_hidden_layers": 10**6}, {"rope_parameters": {"partial_rotary_factor": 1e9}}, {"head_dim": 10**9},
    {"num_labels": float("nan")}, {"partial_rotary_factor": float("inf")}, {"padding": "x" * (5 * 2**20)},
], ids=lambda value: next(iter(value)))  # fmt: skip
def test_a_config_that_would_build_something_large_is_refused(model, value):
    """transformers makes a list of a billion names of a `num_labels`; a tokenizer's class is looked up there, too."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | value))
    for call in (lambda: find_model(str(model)), lambda: load_tokenizer(model)):
        found = within(20, call)
        assert isinstance(found, InputError) and "config.json" in str(found), found
        assert "out of reason" in str(found) or "bytes are" in str(found) or "are read" in str(found)


def test_the_sizes_of_real_configs_pass(model):
    config = json.loads((model / "config.json").read_text())
    labels = {"id2label": {str(number): f"name {number}" for number in range(22_000)}, "partial_rotary_factor": 0.5}
    (model / "config.json").write_text(json.dumps(config | labels))
    assert find_model(str(model)).facts.n_layers == 4


@pytest.mark.parametrize(("name", "text"), [
    ("tokenizer.json", '{"normalizer": {"type": "Sequence", "normalizers": [' + '{"type": "NFC"},' * 100_001),
    ("tokenizer.json", '{"model": {"vocab": {' + '"a":1,' * 2_000_001),
    ("vocab.json", '{"a":1,' * 2_000_001),
    ("merges.txt", "a b\n" * 2_000_001),
    ("tokenizer_config.json", " " * (16 * 2**20 + 1)),
    ("tokenizer.model", "x" * (32 * 2**20 + 1)),
], ids=["normalizers", "vocabulary", "vocab", "merges", "config", "sentencepiece"])  # fmt: skip
def test_a_tokenizer_that_would_build_something_large_is_refused(model, name, text):
    (model / name).write_text(text)
    found = within(20, lambda: load_tokenizer(model))
    assert isinstance(found, InputError) and name in str(found) and "are read" in str(found), found


def test_the_largest_tokenizer_in_use_passes(tmp_path):
    """Its shape: Gemma 3's numbers of tokens, merges and added tokens."""
    added = '{"id": 1, "content": "<unused1>", "lstrip": false, "special": false}, ' * 6_415
    (tmp_path / "tokenizer.json").write_text(added + '"token": 1, ' * 262_145 + '["to", "ken"], ' * 514_906)
    check_tokenizer_sizes(tmp_path)


def test_a_shape_of_a_million_sides_is_refused_at_once(tmp_path):
    """Their product has a million digits; computing it took half a minute."""
    header = json.dumps({"a": {"dtype": "U8", "shape": [9] * 1_000_000, "data_offsets": [0, 1]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"x")
    assert "inconsistent" in str(within(10, lambda: read_header(path)))


def test_a_quantisation_state_that_is_one_number_allocates_nothing(tmp_path):
    """bytes(8_000_000_000) are 8 GB of zeros: the state was a scalar of 64 bits."""
    path = tmp_path / "model.safetensors"
    state = "w.weight.quant_state.bitsandbytes__nf4"
    save_file(
        {
            "w.weight": torch.zeros(4, 1, dtype=torch.uint8),
            "w.weight.absmax": torch.zeros(1),
            state: torch.tensor(8_000_000_000),
        },
        path,
    )
    with pytest.raises(FolderError, match="not a row of bytes"):
        packed_on_disk(read_headers(tmp_path), "w.weight")


@pytest.mark.parametrize("alpha", ["NaN", "Infinity", "1" + "0" * 400, "-1e300"])
def test_an_adapter_scale_out_of_reason_is_refused(adapter, alpha):
    text = json.dumps(ADAPTER).replace('"lora_alpha": 8', f'"lora_alpha": {alpha}')
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(InputError, match="lora_alpha must be below"):
        check_adapter_folder(adapter)


def test_a_folder_whose_name_has_lines_makes_no_line_of_an_error(tmp_path):
    folder = tmp_path / "a\nerror: fake\x1b[2J"
    folder.mkdir()
    with pytest.raises(InputError) as caught:
        read_records(folder / "none.jsonl")
    assert not any(line.startswith("error: fake") for line in str(caught.value).splitlines())
    assert "\x1b" not in str(caught.value)


# --- data files -------------------------------------------------------------------------------------------------------


def test_a_row_and_a_file_have_a_size_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_ROW_BYTES", 100)
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a"}\n{"text": "' + "x" * 100 + '"}\n{"text": "b"}\n')
    with pytest.raises(InputError, match=r"d\.jsonl:2: the line has more than 100 bytes"):
        read_records(path)
    path = tmp_path / "d.csv"
    path.write_text("text\na\n" + "x" * 101 + "\n")
    with pytest.raises(InputError, match=r"d\.csv:3: .*field larger than field limit"):
        read_records(path)
    monkeypatch.setattr(records, "MAX_WHOLE_BYTES", 50)
    for name in ("d.csv", "d.json", "d.txt"):
        (tmp_path / name).write_text("x" * 51)
        with pytest.raises(InputError, match=rf"{name}: 51 bytes"):
            read_records(tmp_path / name)


def test_a_file_has_a_limit_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_ROWS", 3)
    path = tmp_path / "d.jsonl"
    path.write_text("{}\n" * 3)
    assert len(read_records(path)) == 3
    path.write_text("{}\n" * 4)
    with pytest.raises(InputError, match="more than 3 rows"):
        read_records(path)


def test_a_parquet_bomb_is_stopped(tmp_path):
    """50 kB that unpack to 10 GB: one value of a dictionary, many times."""
    path = tmp_path / "d.parquet"
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 10_000, pa.int32()), pa.array(["x" * 1_000_000]))
    pq.write_table(pa.table({"text": column}), path, compression="zstd")
    assert path.stat().st_size < 200_000
    code = (
        "import sys\nfrom lopt_edge.data import read_records, records\n"
        "from lopt_edge.errors import InputError\nrecords.MAX_WHOLE_BYTES = 200_000_000\n"
        "try: read_records(sys.argv[1])\nexcept InputError as error: print(error)\n"
        "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True, timeout=300)
    assert "unpacks to" in done.stdout
    assert int(done.stdout.split()[-1]) < 1_000_000, "kilobytes"


def test_a_shared_value_inside_a_parquet_list_is_refused(tmp_path):
    path = tmp_path / "d.parquet"
    inner = pa.DictionaryArray.from_arrays(pa.array([0] * 100, pa.int32()), pa.array(["x" * 1000]))
    pq.write_table(pa.table({"text": pa.ListArray.from_arrays([0, 100], inner)}), path)
    try:
        assert read_records(path)[0].value == {"text": ["x" * 1000] * 100}  # a pyarrow that reads plain strings
    except InputError as error:
        assert "is not read" in str(error)


def test_a_categorical_column_is_read_as_its_texts(tmp_path):
    path = tmp_path / "d.parquet"
    pq.write_table(pa.table({"text": pa.array(["a", "b", "a"]).dictionary_encode()}), path)
    assert [record.value for record in read_records(path)] == [{"text": "a"}, {"text": "b"}, {"text": "a"}]


def test_the_claims_of_a_parquet_file_are_checked_first(tmp_path, monkeypatch):
    path = tmp_path / "d.parquet"
    pq.write_table(pa.table({"text": ["x" * 1000] * 10}), path)
    monkeypatch.setattr(records, "MAX_ROWS", 9)
    with pytest.raises(InputError, match="says it holds 10 rows"):
        read_records(path)
    monkeypatch.setattr(records, "MAX_ROWS", 10)
    monkeypatch.setattr(records, "MAX_WHOLE_BYTES", 100)
    with pytest.raises(InputError, match="unpacks to"):
        read_records(path)


def test_damaged_parquet_statistics_do_not_end_the_process(tmp_path):
    """pyarrow's metadata of a column calls std::terminate for these; found by tools/fuzz.py (input 20641 of seed 1)."""
    path = Path(__file__).parent / "data" / "damaged-statistics.parquet"
    code = (
        "import sys\nfrom lopt_edge.data import read_records\nfrom lopt_edge.errors import InputError\n"
        "try: read_records(sys.argv[1])\nexcept InputError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "not a readable Parquet file" in done.stdout, done.stderr


# --- what is printed --------------------------------------------------------------------------------------------------


def test_names_from_files_cannot_speak_to_the_terminal(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": "\x1b]0;owned\x07\ud800.safetensors"}}))
    with pytest.raises(FolderError) as caught:
        read_headers(tmp_path)
    assert str(caught.value) == printable(str(caught.value))
    str(caught.value).encode()
    assert "\x1b" not in str(caught.value)


def test_memory_of_json_is_bounded(tmp_path):
    """The worst text that we know takes 28 bytes a byte; in a process of its own."""
    path = tmp_path / "config.json"
    path.write_bytes(b"[" + b"{}," * 2_000_000 + b"0]")
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom quant.headers import read_json\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\nbefore = peak()\n"
        "read_json(Path(sys.argv[1]))\nprint(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True, timeout=300)
    assert int(done.stdout) < 30 * path.stat().st_size
