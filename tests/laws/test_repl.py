"""Method repl's laws. A replaced layer's gradients (adapter, mixing coefficients) are those of dense weights in one graph;
predicted bytes are the tracked ones (law 6, as test_timeline.py asks); a resumed run equals an uninterrupted one (law 7);
the exported model gives our logits in plain transformers (law 8: no adapter can).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lopt_edge import export, finetune
from lopt_edge.adapters.generation import load_generator
from lopt_edge.cli import main as cli
from lopt_edge.errors import InputError, Interrupted
from lopt_edge.plan.schedule.knobs import Knobs
from lopt_edge.plan.schedule.ops import parse_plan
from lopt_edge.plan.schedule.validate import PlanError, validate
from lopt_edge.run.model.lora import ADAPTER_NAME
from lopt_edge.run.model.replaced import REPLACED_NAME, apply_replaced, mixtures
from lopt_edge.run.step.losses import task_loss
from quant.linear import PackedLinear, UnpackBuffer, dropout_mask
from quant.mixed import Mixture, fit
from quant.nf4 import pack, unpack_into
from tests.laws.bench import Bench, make_bench, random_batch
from tests.laws.test_families import our_logits
from tests.laws.test_timeline import check
from tests.plan.plans import make_course
from tools.timeline_settings import Setting
from tools.tiny_runs import log_of, make_config, make_model

BATCH = random_batch((11, 7), seed=1)
IDS = torch.randint(3, 300, (2, 17), generator=torch.Generator().manual_seed(0))


class _Dense:
    """The definition itself: W = a W1 + b W2 as whole matrices that autograd sees, and the LoRA branch."""

    def __init__(self, mixture: Mixture) -> None:
        neighbours = (mixture.before, mixture.after)
        self.first, self.second = (unpack_into(one.weight, torch.empty(one.weight.shape)) for one in neighbours)
        self.mix = mixture.mix

    def apply(self, layer: PackedLinear, x: Tensor) -> Tensor:
        weight = self.mix[0] * self.first + self.mix[1] * self.second
        y = nn.functional.linear(x, weight, layer.bias)
        if layer.lora_a is None or layer.lora_b is None:
            return y
        key = layer.dropout_key()
        flat = x.flatten(0, 1)
        seen = flat if key is None else flat * dropout_mask(flat, rate=layer.dropout_rate, key=key)
        return y + (layer.scale * (seen @ layer.lora_a) @ layer.lora_b).view_as(y)


def dense_gradients(bench: Bench, names: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """All layers in one graph, the replaced ones dense."""
    model = bench.model
    for layer in range(model.facts.n_layers):
        for name, mixture in list(mixtures(model, layer)):
            model.layers[layer].get_submodule(name).synthesis = _Dense(mixture)
    model.clock.step, model.clock.micro_batch, model.clock.active = 1, 0, True
    hidden = model.embed(BATCH.ids_BT)
    frame = model.layer_context(hidden)
    for layer in range(model.facts.n_layers):
        hidden = model.run_layer(layer, hidden, frame)
    loss = task_loss(model, hidden.flatten(0, 1)[BATCH.supervised_N], BATCH.targets_N)
    (loss * (1.0 / len(BATCH.targets_N))).backward()
    model.clock.active = False
    return {name: parameter.grad for name, parameter in names.items()}


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {}), ("qwen2", {"targets": ("q_proj", "down_proj")}), ("llama", {"dropout": 0.3}), ("phi3", {})],
    ids=["llama", "biases and some targets", "dropout", "fused projections"],
)
def test_gradients_are_those_of_dense_weights_in_one_graph(four_bit, family, options):
    bench = make_bench(four_bit(family, num_hidden_layers=6), method="repl", replace_layers=(2, 4), **options)
    names = bench.names()
    n_linears = len(bench.model.facts.kinds[0].linears)
    mixes = {name for name, parameter in names.items() if parameter.shape == (2,)}
    assert len(mixes) == 2 * n_linears
    ours = bench.gradients([BATCH])
    theirs = dense_gradients(bench, names)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert gradient.abs().max() > 0, f"{name} is zero: the test would prove nothing"
        assert (gradient - theirs[name]).norm() <= 1e-4 * theirs[name].norm(), name


@pytest.mark.parametrize("at_once", [1 << 20, 5 * 128], ids=["one block", "blocks of rows"])
def test_a_mixture_in_blocks_and_its_fit(monkeypatch, at_once):
    monkeypatch.setattr("quant.sizes.MIXED_ELEMENTS", at_once)
    torch.manual_seed(0)
    buffer = UnpackBuffer()
    first, second, own = (PackedLinear(128, 96, buffer=buffer) for _ in range(3))
    first.weight, second.weight = pack(torch.randn(96, 128)), pack(torch.randn(96, 128))
    dense = [unpack_into(one.weight, torch.empty(96, 128)) for one in (first, second)]
    own.weight = pack(0.8 * dense[0] - 0.3 * dense[1] + 0.1 * torch.randn(96, 128))
    matrix = unpack_into(own.weight, torch.empty(96, 128))
    a, b, left = fit(own, first, second)
    wanted = torch.linalg.lstsq(torch.stack([one.flatten() for one in dense], 1), matrix.flatten()).solution
    torch.testing.assert_close(torch.tensor([a, b]), wanted, rtol=1e-5, atol=1e-6)
    rest = (matrix - a * dense[0] - b * dense[1]).norm() / matrix.norm()
    assert 0.05 < left < 0.3 and left == pytest.approx(rest.item(), rel=1e-3)
    assert fit(own, own, own)[:2] == pytest.approx((0.5, 0.5), abs=1e-4), "one direction: the shortest solution"
    mix = nn.Parameter(torch.tensor([a, b]))
    own.weight, own.synthesis = None, Mixture(first, second, mix)
    x, g = torch.randn(2, 5, 128, requires_grad=True), torch.randn(2, 5, 96)
    own(x).backward(g)
    ours, x.grad = [x.grad, mix.grad], None
    mix.grad = None
    y = _Dense(own.synthesis).apply(own, x)
    y.backward(g)
    torch.testing.assert_close(own(x), y, rtol=1e-5, atol=1e-4)
    for found, right in zip(ours, (x.grad, mix.grad), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


def knobs(n_layers: int, **changes: Any) -> Knobs:
    return Knobs(**{"weights": ("resident",) * n_layers, "activations": ("recompute",) * n_layers, **changes})


SIZES = {"hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
SETTINGS = {
    "kept": Setting("llama", torch.float32, ((200, 90),), knobs(5, activations=("keep",) * 5), "repl", changes=SIZES),
    "recomputed": Setting(
        "qwen2",
        torch.float32,
        ((300,), (120,)),
        knobs(5, saved_inputs="disk", gradients="disk"),
        "repl",
        changes=SIZES,
        targets=("q_proj", "up_proj"),
    ),
    "paged": Setting(
        "llama",
        torch.bfloat16,
        ((150, 150),),
        knobs(5, activations=("page",) * 5, states="disk"),
        "repl",
        changes=SIZES | {"intermediate_size": 1600},
        stored=torch.bfloat16,
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_predicted_bytes_are_the_tracked_ones(tmp_path, name):
    check(SETTINGS[name], tmp_path)


def test_replaced_layers_hold_no_packed_weights(four_bit):
    folder = four_bit("llama", num_hidden_layers=6)
    whole, less = (make_bench(folder, method=method).model.weights for method in ("e2e", "repl"))
    assert less.placement.keys() == less.resident.keys() == set(range(6)) - {1, 4}
    assert sum(t.nbytes for t in less.tensors()) * 6 == sum(t.nbytes for t in whole.tensors()) * 4


def test_the_plan_says_what_is_read_and_the_validator_holds_it(four_bit):
    bench = make_bench(four_bit("llama", num_hidden_layers=6), method="repl", replace_layers=(2, 4))
    plan = bench.plan
    assert "segment 0 layers=0-5 loss=task replaced=2,4\n" in plan.text()
    assert parse_plan(plan.text()) == plan and plan.reads(2) == (1, 3) and plan.reads(3) == (3,)
    for broken, message in (("replaced=2,3", "no two neighbours"), ("replaced=5", "no two neighbours")):
        with pytest.raises(PlanError, match=message):
            validate(parse_plan(plan.text().replace("replaced=2,4", broken)))
    with pytest.raises(PlanError, match=r"rule \(1\): layer 3 is not on the device"):
        validate(parse_plan(plan.text().replace("unit layer 3 resident", "unit layer 3 disk")))


def test_which_layers_are_replaced():
    def replaced(n_layers: int, **options: Any) -> tuple[int, ...]:
        return make_course("repl", n_layers=n_layers, **options).replaced

    assert [replaced(n) for n in (3, 4, 8, 16, 28)] == [(1,), (1,), (2, 5), (4, 7, 10), (7, 10, 13, 16, 19)]
    assert replaced(8, replace_layers="5,2") == (2, 5)
    assert [kind.name for kind in make_course("repl", n_layers=8).kinds] == [""]


# whole runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=5)


@pytest.fixture(scope="module")
def run(model, tmp_path_factory) -> Any:
    """A finished run, whose adapter and coefficients differ from where they began."""
    config = make_config(model, tmp_path_factory.mktemp("run"), method="repl", max_steps=3, eval_fraction=0.3)
    finetune(config)
    return config


def difference(left: Tensor, right: Tensor) -> float:
    return ((left - right).norm() / right.norm()).item()


def our_model(config: Any) -> Any:
    return load_generator(
        config.model, config.output, cache_dir=config.cache_dir, device="cpu", compute_dtype="float32"
    ).model


@pytest.mark.usefixtures("warm_children")
def test_the_exported_model_gives_our_logits(run, tmp_path):
    mine = our_logits(our_model(run), IDS)
    merged = export(run.output, merged=tmp_path / "merged", onto="dequantized", dtype="float32", cache_dir=run.cache_dir)
    assert merged.divergence.relative_error < 1e-4
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert difference(mine, theirs(IDS, use_cache=False).logits) <= 1e-4
        intact = AutoModelForCausalLM.from_pretrained(run.model)(IDS, use_cache=False).logits
    assert difference(mine, intact) > 0.1
    export(run.output, merged=tmp_path / "original", cache_dir=run.cache_dir)
    dtypes = {tensor.dtype for tensor in AutoModelForCausalLM.from_pretrained(tmp_path / "original").state_dict().values()}
    assert dtypes == {torch.bfloat16}


def test_the_run_tells_the_jump_and_what_closed_it(run):
    told = json.loads((Path(run.output) / "run.json").read_text())
    found, evaluation = told["replacement"], told["evaluation"]
    assert found["layers"] == [1] and set(found["unexplained"]["1"]) == {
        linear["name"] for kind in told["model"]["kinds"] for linear in kind["linears"]
    }
    assert all(0.9 < share <= 1 for share in found["unexplained"]["1"].values()), "random weights explain nothing"
    jump = evaluation["before"]["eval_loss"] - found["intact"]["eval_loss"]
    assert found["jump"]["eval_loss"] == jump != 0
    card = (Path(run.output) / "README.md").read_text()
    assert "does not give this model" in card and "lopt-edge export" in card and "PeftModel" not in card


def test_the_intact_loss_is_that_of_e2e_before_training(run, model, tmp_path):
    config = make_config(model, tmp_path, method="e2e", max_steps=1, eval_fraction=0.3)
    wanted = finetune(config).evaluation["before"]["eval_loss"]
    told = json.loads((Path(run.output) / "run.json").read_text())
    assert told["replacement"]["intact"]["eval_loss"] == pytest.approx(wanted, rel=1e-6)


def test_a_resumed_run_equals_an_uninterrupted_one(model, tmp_path, stop_in):
    settings = {"method": "repl", "max_steps": 4, "n_rows": 15, "eval_fraction": 0.2, "eval_every": 1, "keep_best": True}
    whole, stopped = (make_config(model, tmp_path, output=name, **settings) for name in ("whole", "stopped"))
    finetune(whole)
    stop_in(3, 0)
    with pytest.raises(Interrupted):
        finetune(stopped.model_copy(update={"activations": "page", "optimizer_states": "disk"}))
    finetune(stopped.model_copy(update={"resume": "auto", "activations": "keep"}))
    for name in (ADAPTER_NAME, REPLACED_NAME):
        assert (Path(stopped.output) / name).read_bytes() == (Path(whole.output) / name).read_bytes(), name
    assert log_of(stopped) == log_of(whole)
    told = [json.loads((Path(config.output) / "run.json").read_text())["replacement"] for config in (whole, stopped)]
    assert told[0] == told[1]


BAD = {
    "another method's": ({"method": "e2e", "replace_layers": "1"}, "belongs to method repl"),
    "streamed weights": ({"method": "repl", "weights": "resident,0-1=disk"}, "must be resident"),
    "beyond the depth": ({"method": "repl", "replace_layers": "9"}, "has one on both sides"),
    "the first": ({"method": "repl", "replace_layers": "0"}, "has one on both sides"),
    "the last": ({"method": "repl", "replace_layers": "4"}, "has one on both sides"),
    "adjacent": ({"method": "repl", "replace_layers": "2,1"}, "cannot be made from each other"),
    "no number": ({"method": "repl", "replace_layers": "x"}, "replace"),
    "an adapter to start from": ({"method": "repl", "init_adapter": "{run}"}, "cannot be with method repl"),
    "a replaced one for others": ({"method": "e2e", "init_adapter": "{run}"}, "replaced layers"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(run, tmp_path, monkeypatch, capsys, name):
    settings, message = BAD[name]
    flags = {"model": run.model, "data": run.data, "output": str(tmp_path / "out"), **settings}
    words = [f"--{key.replace('_', '-')}={value.replace('{run}', run.output)}" for key, value in flags.items()]
    monkeypatch.setattr("sys.argv", ["lopt-edge", "finetune", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


DAMAGED = {
    "format": lambda one: {"format": 2, "layers": {"1": one}},
    "first layer": lambda one: {"format": 1, "layers": {"0": one}},
    "adjacent": lambda one: {"format": 1, "layers": {"1": one, "2": one}},
    "no linears": lambda one: {"format": 1, "layers": {"1": {}}},
    "no layers": lambda one: {"format": 1, "layers": {}},
    "a list": lambda one: [],
    "three numbers": lambda one: {"format": 1, "layers": {"1": {name: [0.1, 0.2, 0.3] for name in one}}},
    "not finite": lambda one: {"format": 1, "layers": {"1": {name: [float("nan"), 0.2] for name in one}}},
    "too large": lambda one: {"format": 1, "layers": {"1": {name: [10**400, 0.2] for name in one}}},
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_coefficients_are_refused(run, tmp_path, name):
    found = json.loads((Path(run.output) / REPLACED_NAME).read_text())
    (tmp_path / REPLACED_NAME).write_text(json.dumps(DAMAGED[name](found["layers"]["1"])))
    with pytest.raises(InputError, match=REPLACED_NAME):
        apply_replaced(our_model(run), tmp_path)
