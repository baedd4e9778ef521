"""The configuration: every mistake told at once with its place, flags over the file, and a printed form that reads back."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lopt_edge.config.load import load_config
from lopt_edge.config.rules import no_effect_warnings
from lopt_edge.config.settings import Config, field_names
from lopt_edge.errors import InputError, InputErrors

NEEDED = {"model": "m", "data": "d.jsonl", "output": "o"}
FUZZ = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def load(tmp_path):
    """load(yaml text, **flags) -> Config, from a file run.yaml."""

    def load_text(text: str, **flags: object) -> Config:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return load_config(path, flags)

    return load_text


def made(**values: object) -> Config:
    return load_config(None, {**NEEDED, **values})


def test_three_mistakes_are_told_together_with_their_lines(load):
    text = "model: m\ndata: d\noutput: o\n\nlearning-rate: 1\nmax-seq-len: 0\nmethod: lora\nlr: 0.1\n"
    with pytest.raises(InputErrors) as caught:
        load(text)
    message = str(caught.value)
    assert len(caught.value.errors) == 3
    for part in ("3 problems", "run.yaml:5: learning_rate", "run.yaml:6: max_seq_len", "run.yaml:7: method", "'lora'"):
        assert part in message, part
    assert "greater than or equal to 2" in message
    assert "'e2e', 'frozen', 'lcsb'" in message


def test_mistakes_of_file_and_flags_are_told_together(load):
    with pytest.raises(InputErrors) as caught:
        load("model: m\nclip: -1\nlorar: 3\n", lora_r=0, output="o", nonsense=1)
    message = str(caught.value)
    assert len(caught.value.errors) == 5
    for part in ("run.yaml:2: clip", "run.yaml:3: lorar", "--lora-r", "--nonsense", "--data: is needed"):
        assert part in message, part


def test_very_many_mistakes_are_counted():
    message = str(InputErrors([InputError(f"mistake {number}") for number in range(90)]))
    assert message.startswith("90 problems") and message.endswith("- and 30 more") and len(message.splitlines()) == 62


def test_a_flag_that_overrides_a_wrong_value_heals_it(load):
    assert load("model: m\ndata: d\noutput: o\nlr: high\n", lr=0.5).lr == 0.5


def test_a_wrong_flag_over_a_right_value_is_the_flags_mistake(load):
    with pytest.raises(InputError) as caught:
        load("model: m\ndata: d\noutput: o\nlr: 0.5\n", lr=-1)
    assert "--lr: must be greater than 0" in str(caught.value)
    assert "run.yaml" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("learning_rat", ""),
        ("max_sequence_len", "max_seq_len"),
        ("lora-rnk", "lora_r"),
        ("seeds", "seed"),
        ("zzz", "--help"),
    ],
)
def test_unknown_keys_come_with_a_suggestion(load, key, suggestion):
    with pytest.raises(InputError, match="unknown setting") as caught:
        load(f"model: m\ndata: d\noutput: o\n{key}: 1\n")
    assert suggestion in str(caught.value)
    assert "run.yaml:4" in str(caught.value)


def test_hyphens_and_underscores_are_the_same(load):
    text = "model: m\ndata: d\noutput: o\nmax-seq-len: 64\ngrad_accum: 2\nlora-targets: q_proj\n"
    config = load(text)
    assert (config.max_seq_len, config.grad_accum, config.lora_targets) == (64, 2, ("q_proj",))


def test_flags_win_and_absent_flags_do_not(load):
    config = load("model: m\ndata: d\noutput: o\nlr: 0.5\nseed: 3\nkeep_best: true\n", lr=0.25, seed=None, keep_best=False)
    assert (config.lr, config.seed, config.keep_best) == (0.25, 3, False)


@pytest.mark.parametrize(("text", "value"), [("2e-4", 2e-4), ("2E-4", 2e-4), ("1e+1", 10.0), ("2.0e-4", 2e-4), ("3", 3.0)])
def test_numbers_as_people_write_them(load, text, value):
    assert load(f"model: m\ndata: d\noutput: o\nlr: {text}\n").lr == value


@pytest.mark.parametrize("name", ["1e5", "2e-4", "e", "007"])
def test_a_name_that_looks_like_a_number_stays_a_name(load, name):
    assert load(f"model: {name!r}\ndata: d\noutput: o\n").model == name


@pytest.mark.parametrize("value", ["12,20", "12, 20", " 12,20, ", (12, 20), [12, 20]])
def test_boundary_layers(value):
    assert made(boundary_layers=value).boundary_layers == (12, 20)


@pytest.mark.parametrize("text", ["12,20", "'12, 20'", "[12, 20]", "\n- 12\n- 20"])
def test_boundary_layers_in_yaml(load, text):
    assert load(f"model: m\ndata: d\noutput: o\nboundary-layers: {text}\n").boundary_layers == (12, 20)
    assert load("model: m\ndata: d\noutput: o\nboundary-layers: 12\n").boundary_layers == (12,)


def test_lora_targets():
    assert made().lora_targets == ("all-linear",)
    assert made(lora_targets="q_proj, v_proj").lora_targets == ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"boundary_layers": ""}, "at least one"),
        ({"boundary_layers": "a,b"}, "integer"),
        ({"boundary_layers": True}, "true or false"),
        ({"seed": True}, "true or false"),
        ({"lora_targets": ","}, "at least one"),
        ({"model": ""}, "at least 1 character"),
        ({"lr": float("nan")}, "finite"),
        ({"lr": float("inf")}, "finite"),
        ({"lr": 0}, "greater than 0"),
        ({"epochs": 1.5}, "integer"),
        ({"max_steps": 0}, "greater than or equal to 1"),
        ({"lora_dropout": 1.0}, "less than 1"),
        ({"eval_fraction": 1}, "less than 1"),
        ({"warmup_ratio": -0.1}, "greater than or equal to 0"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"compute_dtype": "int8"}, "'auto'"),
    ],
)
def test_values_out_of_range_name_their_flag(changes, says):
    with pytest.raises(InputError, match=says) as caught:
        made(**changes)
    assert f"--{next(iter(changes)).replace('_', '-')}" in str(caught.value)


def test_defaults_are_the_documented_ones():
    config = made()
    assert (config.method, config.num_segments, config.boundary_layers) == ("e2e", 2, None)
    assert (config.epochs, config.max_steps, config.batch_size, config.grad_accum) == (1, None, 1, 8)
    assert (config.lr, config.local_lr, config.weight_decay, config.clip, config.clip_scope) == (
        2e-4,
        2e-4,
        0,
        1,
        "segment",
    )
    assert (config.local_weight, config.schedule, config.warmup_ratio, config.max_seq_len) == (10, "cosine", 0.03, 2048)
    assert config.clip_scope == "segment"
    assert (config.lora_r, config.lora_alpha, config.lora_dropout) == (16, 32, 0)
    assert made(method="lopt").local_lr == 2e-6
    asks_for_a_boundary = (
        {"num_segments": 3},
        {"boundary_layers": 4},
        {"lr_local": 0.1},
        {"open_every": 4},
        {"pipeline": 2},
    )
    assert {made(**asked).method for asked in asks_for_a_boundary} == {"lopt"}
    assert made(pipeline=1).method == made(num_segments=None).method == "e2e"
    assert made(method="frozen", num_segments=3).method == "frozen"
    assert made(method="lopt", lr_local=0.1).local_lr == 0.1
    assert made(method="mlaan").local_lr == made().lr
    with pytest.raises(ValueError, match="frozen"):
        config.lr = 1.0


@pytest.mark.parametrize(
    "changes",
    [{}, {"boundary_layers": "3,5", "lora_targets": "q_proj,o_proj", "lr": 2e-5, "max_steps": 7, "seed": 2**62},
     {"model": "2e-4", "data": "yes", "output": "päth: #1", "eval_fraction": 0.125, "keep_best": True}],
)  # fmt: skip
def test_the_printed_form_reads_back(load, changes):
    config = made(**changes)
    text = config.as_yaml()
    assert load(text) == config
    assert list(yaml.safe_load(text)) == field_names(), "every setting, in the reader's order"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"model: [unclosed", "not valid YAML"),
        (b"- a\n- b\n", "key: value"),
        (b"just text", "key: value"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"a: *nobody", "not valid YAML"),
        (b"[" * 2000, "not valid YAML"),
        (b"? [a, b]\n: 1\n", "not valid YAML"),
        (b"model: !!python/object:os.system x", "not valid YAML"),
        (b"seed: !!int", "not valid YAML"),
        (b"seed: !!timestamp x", "not valid YAML"),
        (b"seed: 1\nseed: 2", "twice"),
        (b"max-steps: 1\nmax_steps: 2", "twice"),
    ],
)
def test_broken_files_are_told(tmp_path, content, says):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=says) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            load_config(path)
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    with pytest.raises(InputErrors, match=r"(?s)--model.*--data.*--output"):
        load_config(tmp_path / "empty.yaml")


PIECES = ["lr", "seed", ":", " ", "\n", "-", "[", "]", "{", "}", "1", "e", "&a", "*a", "'", "null", "!!int", "?", "#"]


@FUZZ
@given(text=st.text() | st.lists(st.sampled_from(PIECES)).map("".join))
def test_any_file_gives_a_config_or_input_errors(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        load_config(path, NEEDED)
    except InputError as error:
        assert str(error)


SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUE = SCALAR | st.lists(SCALAR, max_size=3) | st.dictionaries(st.text(max_size=3), SCALAR, max_size=2)


@FUZZ
@given(st.dictionaries(st.sampled_from(sorted(Config.model_fields)), VALUE, max_size=5))
def test_any_values_give_a_config_or_input_errors(values):
    try:
        config = load_config(None, {**NEEDED, **values})
    except InputError as error:
        assert str(error)
        return
    assert Config(**yaml.safe_load(config.as_yaml())) == config


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, []),
        (
            {
                "method": "lopt",
                "num_segments": 3,
                "lr_local": 0.1,
                "eval_fraction": 0.1,
                "eval_every": 2,
                "keep_best": True,
            },
            [],
        ),
        ({"method": "lopt", "num_segments": 3, "boundary_layers": "2"}, ["num_segments"]),
        ({"method": "e2e", "num_segments": 3}, ["num_segments"]),
        ({"num_segments": 3, "boundary_layers": "2"}, ["num_segments"]),
        ({"method": "e2e", "boundary_layers": "2"}, ["boundary_layers"]),
        ({"method": "e2e", "lr_local": 0.1, "local_weight": 3}, ["lr_local", "local_weight"]),
        ({"method": "frozen", "lr_local": 0.1}, ["lr_local"]),
        ({"method": "lopt", "local_weight": 3}, ["local_weight"]),
        ({"method": "lopt", "local_weight": 3, "clip_scope": "global"}, []),
        ({"method": "lopt", "local_weight": 3, "clip": 0}, []),
        ({"clip": 0, "clip_scope": "global"}, ["clip_scope"]),
        ({"max_steps": 5, "epochs": 2}, ["epochs"]),
        ({"max_steps": 5}, []),
        ({"eval_every": 5, "keep_best": True}, ["eval_every", "keep_best"]),
        ({"eval_data": "e", "eval_fraction": 0.1}, ["eval_fraction"]),
    ],
)
def test_settings_without_effect_are_said(changes, names):
    warnings = no_effect_warnings(made(**changes))
    assert [warning.split()[0] for warning in warnings] == names
    assert all("effect" in warning for warning in warnings)


def test_lambda_under_segment_clipping_names_the_right_knob():
    for method in ("lopt", "let-local"):
        assert "lr_local is the knob" in no_effect_warnings(made(method=method, local_weight=3))[0]
        assert not no_effect_warnings(made(method=method, local_weight=3, clip_scope="global"))


def test_paths_may_be_given_as_paths(tmp_path: Path):
    (tmp_path / "c.yaml").write_text("model: m\ndata: d\noutput: o\n")
    assert load_config(str(tmp_path / "c.yaml")) == load_config(tmp_path / "c.yaml")
