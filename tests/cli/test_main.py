"""The command line as a user meets it: wrong inputs give one message, exit code 2, and leave nothing behind.

Commands run in this process through the console script's `main`; the real models are tiny.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from lopt_edge.config.settings import Config
from tools.tiny_models import make_folder
from tools.tiny_runs import make_model

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "tiny-llama"
ROW = {"messages": [{"role": "user", "content": "f(x)"}, {"role": "assistant", "content": "Return x."}]}


@pytest.fixture
def run(command: Callable[..., tuple[int, str, str]]) -> Callable[..., tuple[int, str, str]]:
    return command


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text((json.dumps(ROW) + "\n") * 6)
    return path


def finetune_words(data: Path, output: Path, *more: object) -> list[object]:
    return [
        "finetune",
        "--model",
        TINY,
        "--data",
        data,
        "--output",
        output,
        "--cache-dir",
        output.parent / "cache",
        "--max-seq-len",
        64,
        "--max-steps",
        1,
        "--grad-accum",
        2,
        *more,
    ]


def test_version(run):
    code, out, _ = run("--version")
    assert code == 0
    assert out.startswith("lopt-edge ")


def test_three_mistakes_are_reported_together(run, tmp_path, data):
    config = tmp_path / "bad.yaml"
    config.write_text(f"model: {TINY}\ndata: {data}\noutput: {tmp_path / 'out'}\nlr: fast\nmax-seq-len: 0\nlora_rang: 8\n")
    code, _, err = run("finetune", config)
    assert code == 2
    assert "bad.yaml:4: lr" in err
    assert "bad.yaml:5: max_seq_len" in err
    assert "bad.yaml:6: lora_rang" in err
    assert "lora_r" in err
    assert not (tmp_path / "out").exists()


def test_bad_flags(run, tmp_path, data):
    code, _, err = run(*finetune_words(data, tmp_path / "out", "--lr", "x", "--seed", "-1", "--method", "magic"))
    assert code == 2
    assert all(flag in err for flag in ("--lr", "--seed", "--method"))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--max-seq-len", 0], "--max-seq-len"),
        (["--boundary-layers", "4,9"], "boundary"),
        (["--boundary-layers", "5,4"], "boundary"),
        (["--num-segments", 9], "8 layers"),
        (["--lora-targets", "q_proj,w_proj"], "w_proj"),
        (["--max-seq-len", 5000], "2048 positions"),
        (["--data-format", "alpaca"], "data.jsonl"),
        (["--eval-data", "missing.jsonl"], "missing.jsonl"),
        (["--device", "cuda"], "device"),
        (["--compute-dtype", "float16"], "--compute-dtype"),
        (["--init-adapter", "nowhere"], "nowhere"),
        (["--chat-template", "nowhere.jinja"], "nowhere.jinja"),
    ],
)
def test_refused_before_anything_is_written(run, tmp_path, data, flags, expected):
    if flags == ["--device", "cuda"]:
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            pytest.skip("this machine has CUDA")
    code, _, err = run(*finetune_words(data, tmp_path / "out", *flags))
    assert code == 2, err
    assert expected in err
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_broken_data_names_the_line(run, tmp_path):
    data = tmp_path / "broken.jsonl"
    data.write_text(json.dumps(ROW) + "\n{'messages': 1}\n" + json.dumps({"messages": "hello"}) + "\n")
    code, _, err = run(*finetune_words(data, tmp_path / "out"))
    assert code == 2
    assert "broken.jsonl:2" in err


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_empty_data(run, tmp_path, content):
    data = tmp_path / "empty.jsonl"
    data.write_text(content)
    code, _, err = run(*finetune_words(data, tmp_path / "out"))
    assert code == 2
    assert "empty.jsonl" in err


def test_model_folder_faults(run, tmp_path, data):
    words = ["finetune", "--data", data, "--output", tmp_path / "out", "--cache-dir", tmp_path / "cache", "--model"]
    assert run(*words, tmp_path / "nowhere")[0] == 2
    empty = tmp_path / "empty"
    empty.mkdir()
    code, _, err = run(*words, empty)
    assert code == 2
    assert "config.json" in err
    broken = make_folder(tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    code, _, err = run(*words, broken)
    assert code == 2
    assert "truncated" in err
    weights.unlink()
    code, _, err = run(*words, broken)
    assert code == 2
    assert "no weights" in err
    (broken / "pytorch_model.bin").write_bytes(b"x")
    code, _, err = run(*words, broken)
    assert code == 2
    assert "pickle" in err


def test_whole_tour(run, tmp_path, data):
    """finetune, a second finetune into the same folder, generate, export, and a model trained from the adapter."""
    output = tmp_path / "out"
    code, out, err = run(*finetune_words(data, output, "--lr", "1e-3"))
    assert code == 0, err
    assert "adapter:" in out
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    code, _, err = run(*finetune_words(data, output))
    assert code == 2
    assert "another run" in err
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    cache = ["--cache-dir", tmp_path / "cache"]
    code, out, _ = run("generate", "--model", TINY, "--adapter", output, "--prompt", "f(x)", "--max-new-tokens", 3, *cache)
    assert code == 0
    assert run("generate", "--model", TINY, "--adapter", tmp_path / "no", "--prompt", "f(x)", *cache)[0] == 2
    code, out, _ = run("export", output, "--merged", tmp_path / "merged", "--onto", "dequantized", *cache)
    assert code == 0
    assert "mean KL" in out
    assert run("export", output, "--merged", tmp_path / "merged", *cache)[0] == 2
    code, _, err = run(*finetune_words(data, tmp_path / "second", "--init-adapter", output))
    assert code == 0, err
    code, _, err = run(*finetune_words(data, tmp_path / "third", "--init-adapter", output, "--lora-r", 8))
    assert code == 2
    assert "lora_r" in err


def test_dry_run_and_print_config(run, tmp_path, data):
    code, _, err = run(*finetune_words(data, tmp_path / "out", "--dry-run"))
    assert code == 0
    assert all(re.search(rf"^{fact} ", err, re.M) for fact in ("model", "data", "memory", "time"))
    assert "(predicted)" in err and "nothing was trained or written" in err
    assert not (tmp_path / "out").exists()
    code, out, _ = run(*finetune_words(data, tmp_path / "out", "--boundary-layers", "3,6", "--print-config"))
    assert code == 0
    printed = Config(**yaml.safe_load(out))
    assert printed.boundary_layers == (3, 6)
    assert printed.as_yaml() == out


def test_print_config_alone_is_a_template(run):
    code, out, _ = run("finetune", "--print-config", "--lr", "1e-3")
    assert code == 0
    values = yaml.safe_load(out)
    assert values["model"] == values["data"] == values["output"] == "(needed)"
    assert (values["lr"], values["grad_accum"]) == (1e-3, 8)
    assert run("finetune", "--print-config", "--lr", "fast")[0] == 2


def test_quantize_and_data_check(run, tmp_path, data):
    code, out, _ = run("quantize", TINY, tmp_path / "four")
    assert code == 0
    assert (tmp_path / "four" / "model.safetensors").exists()
    assert run("quantize", TINY, tmp_path / "four")[0] == 2
    assert run("quantize", tmp_path / "four", tmp_path / "five")[0] == 2
    code, out, _ = run("data", "check", data, "--model", TINY)
    assert code == 0
    assert "Return x." in out
    code, out, _ = run("data", "check", data, "--model", TINY, "--json")
    assert code == 0
    json.loads(out)


def test_no_effect_is_said(run, tmp_path, data):
    code, _, err = run(*finetune_words(data, tmp_path / "out", "--dry-run", "--method", "e2e", "--lr-local", "1e-4"))
    assert code == 0
    assert "lr_local has no effect" in err


def test_a_failed_runs_log_does_not_block_the_folder(run, tmp_path, data):
    output = tmp_path / "out"
    output.mkdir()
    (output / "metrics.jsonl").write_text("{}\n")
    code, _, err = run(*finetune_words(data, output))
    assert code == 0, err
    assert "step" in (output / "metrics.jsonl").read_text()


def test_outputs_that_cannot_be(run, tmp_path, data):
    for output in (data / "inside-a-file", tmp_path / ("x" * 300)):
        code, _, err = run("finetune", "--model", TINY, "--data", data, "--output", output)
        assert code == 2
        assert "output" in err


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--compute-dtype", "foo"], "compute_dtype"),
        (["--device", "foo"], "device"),
        (["--temperature", "nan"], "temperature"),
        (["--seed", "99999999999999999999"], "seed"),
        (["--top-p", "0"], "top-p"),
    ],
)
def test_generate_refuses(run, tmp_path, flags, expected):
    code, _, err = run("generate", "--model", TINY, "--prompt", "x", "--cache-dir", tmp_path, *flags)
    assert code == 2
    assert expected in err


def test_mistakes_against_the_model_are_told_together(run, tmp_path, data):
    words = finetune_words(data, tmp_path / "out", "--lora-targets", "all-linear,w", "--boundary-layers", 99)
    code, _, err = run(*words)
    assert code == 2
    assert "--boundary-layers: [99]" in err
    assert "--lora-targets: w is not" in err


def test_a_file_s_mistakes_against_the_model_have_their_lines(run, tmp_path, data):
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {TINY}\ndata: {data}\noutput: {tmp_path / 'out'}\nmethod: lopt\nnum_segments: 99\n")
    code, _, err = run("finetune", path)
    assert code == 2 and f"{path}:5: num_segments: 99 is impossible" in "".join(err.splitlines())
    code, _, err = run("finetune", path, "--num-segments", 77)
    assert code == 2 and "--num-segments: 77 is impossible" in err
    code, _, err = run("plan", path, "--gpu", "rtx4090")
    assert code == 2 and f"{path}:5: num_segments" in "".join(err.splitlines())


def test_mistakes_of_every_layer_are_told_together(run, tmp_path):
    """A wrong number does not hide an option of another method, nor a missing file another one."""
    own = ("--output", tmp_path / "out")
    code, _, err = run("finetune", "--model", "m", "--data", "d", "--lora-r", 0, "--method", "frozen", "--stages", 3, *own)
    assert code == 2 and "--lora-r" in err and "--stages: belongs to method segprop" in err
    code, _, err = run("finetune", "--model", "no-model", "--data", "no-data", "--eval-data", "no-eval", *own)
    assert code == 2 and all(f"--{word}" in err for word in ("model", "data no-data", "eval-data no-eval"))
    code, _, err = run("finetune", "--model", TINY, "--data", tmp_path, *own)
    assert code == 2 and "is a folder" in err


def test_a_wrong_teacher_is_named_as_such(run, tmp_path, data):
    words = finetune_words(data, tmp_path / "out", "--method", "let", "--teacher", tmp_path / "nowhere")
    code, _, err = run(*words)
    assert code == 2 and "--teacher: no model folder" in err


def test_a_config_that_transformers_cannot_use(run, tmp_path, data):
    folder = make_model(tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "hidden_act": "foo"}))
    code, _, err = run(
        "finetune",
        "--model",
        folder,
        "--data",
        data,
        "--output",
        tmp_path / "out",
        "--max-steps",
        1,
        "--max-seq-len",
        64,
        "--cache-dir",
        tmp_path / "cache",
    )
    assert code == 2
    assert "config.json" in err
    assert "foo" in err
    assert not (tmp_path / "out").exists()
