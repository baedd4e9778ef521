"""Law 6's workbench: random settings of a run, one step of it watched tensor by tensor, and what the timeline says of it.

Not a test itself. `python -m tools.timeline_settings FIRST LAST [WORD ...]` prints settings by number, `-v` op by op;
words are families (one with experts, or added later, takes the settings of all numbers), `dropout` (on the LoRA inputs),
`odd` (odd sizes) and `packed` (several sequences in a row).
"""

from __future__ import annotations

import random
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lopt_edge.models.folder import find_model
from lopt_edge.models.four_bit import quantise_model
from lopt_edge.objectives import OBJECTIVES
from lopt_edge.plan.costs.shape import LayerShape
from lopt_edge.plan.costs.sizes import Sizes
from lopt_edge.plan.costs.timeline import Timeline, timeline
from lopt_edge.plan.facts.device_kinds import TORCH
from lopt_edge.plan.facts.families import family_of
from lopt_edge.plan.facts.model import ModelFacts
from lopt_edge.plan.schedule.effects import Kind
from lopt_edge.plan.schedule.knobs import Knobs
from lopt_edge.run.step.batches import Batch
from lopt_edge.run.tiers.feature_cache import FeatureCache
from lopt_edge.run.watch.memory_report import MeasuredOp, MemoryMeter
from tests.laws.bench import Bench, as_choices, in_a_row, make_bench, random_batch
from tools.tiny_gguf import write_gguf
from tools.tiny_models import FAMILIES, make_folder
from tools.tiny_quantised import write_quantised

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FUSED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
DELTA = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")


@dataclass(frozen=True)
class Setting:
    """A run to compare. `lengths` has an entry a micro-batch, with its sequences' lengths; `changes` are the model's."""

    family: str
    dtype: torch.dtype
    lengths: tuple[tuple[int, ...], ...]
    knobs: Knobs
    method: Any = "e2e"
    num_segments: int = 1
    changes: dict[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] | None = None
    rank: int = 4
    dropout: float = 0.0
    stored: torch.dtype = torch.float32  # of the vocabulary
    options: dict[str, Any] = field(default_factory=dict)  # the method's own
    kind: str | None = None  # of step that is watched, where a run has several
    packed: bool = False  # a micro-batch's sequences lie in one row
    device: str = "cpu"
    has_flash: bool = True  # of that device
    deterministic: bool = False
    kernels: str = TORCH
    gguf: tuple[str, ...] = ()  # the types of a GGUF file's matrices in turn, instead of a 4-bit folder
    form: str = ""  # another program's quantised form, likewise
    objective: str = ""  # of preferences; of pairs each micro-batch has an even number of sequences


NAMES = {
    "phi3": FUSED,
    "glm4": (*LINEARS[:4], *FUSED[2:]),
    "arcee": (*LINEARS[:4], *LINEARS[5:]),
    "granitemoehybrid": (*LINEARS[:4], "input_linear", "output_linear"),
}  # others have LINEARS
ADDED = ("glm4", "arcee", "granitemoehybrid")  # since the numbers that the tests chose, which draw from the others
DENSE = [name for name in FAMILIES if family_of(name).experts is None and name not in ADDED]  # of which a number draws one


def random_setting(number: int, *, dropout: bool = False, family: str = "") -> Setting:
    """The random setting of this number: the same number gives the same one. `family`: another than it draws."""
    pick = random.Random(number)
    drawn = pick.choice(DENSE)
    family = family or drawn
    n_layers = pick.choice([2, 3, 5])
    method = pick.choice(["e2e", "lopt", "frozen"])
    apply = pick.choice(["step", "step", "segment", "layer"])
    knobs = Knobs(
        weights=_some(pick, ["resident", "disk"], n_layers),
        activations=_some(pick, ["keep", "recompute", "page"], n_layers),
        saved_inputs=pick.choice(["device", "disk"]),
        states=pick.choice(["device", "disk"]),
        gradients=pick.choice(["device", "disk"]),
        optimizer=pick.choice(["adamw", "adamw", "adamw8bit"]),
        apply=apply,
        prefetch=pick.choice([0, 1, 2]),
        token_tile=random.Random(20_008 + number).choice([1024, 1024, 512, 256, 48]),  # leaves the other draws as they are
    )
    longest = pick.choice([16, 64, 200, 500, 900, 2000])
    n_micro_batches = 1 if apply == "layer" else pick.choice([1, 1, 2])
    lengths = tuple(
        tuple(pick.randint(longest // 2, longest) for _ in range(pick.choice([1, 1, 2]))) for _ in range(n_micro_batches)
    )
    heads, kv_heads = pick.choice([(4, 2), (4, 4), (8, 2), (2, 1)])
    names = LINEARS[:4] if family_of(family).experts is not None else NAMES.get(family, LINEARS)
    found = Setting(
        family,
        pick.choice([torch.float32, torch.bfloat16]),
        lengths,
        knobs,
        method,
        num_segments=1 if method == "e2e" else pick.randint(1, min(3, n_layers)),
        changes={
            "hidden_size": 64 * pick.randint(1, 8),
            "intermediate_size": 64 * pick.choice([1, 3, 8, 15, 17, 24, 32]),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": pick.choice([320, 320, 1500]),
            "sliding_window": pick.choice([8, 4096]),
        },
        targets=pick.choice([names, names, *[tuple(pick.sample(names, pick.randint(1, len(names)))) for _ in range(2)]]),
        rank=pick.choice([4, 16]),
        dropout=0.1 if dropout else 0.0,
        stored=pick.choice([torch.float32, torch.bfloat16]),
    )
    if family == "gemma4_text":  # whose last layer has no window, and whose layers without one have their own heads
        layer_types = [("sliding_attention", "full_attention")[(i + n_layers) % 2] for i in range(n_layers - 1)]
        own = {"layer_types": [*layer_types, "full_attention"], "num_global_key_value_heads": kv_heads}
        return replace(found, changes=found.changes | own)
    if family_of(family).experts is not None:
        found = _with_experts(found, random.Random(40_000 + number))
    return _with_delta(found, random.Random(30_000 + number)) if family.startswith("qwen3_5") else found


def _with_experts(found: Setting, pick: random.Random) -> Setting:
    """The setting with experts, all of which each token goes to: the most that a routing can take, which the plan holds."""
    n_experts, n_layers = pick.choice([1, 2, 4]), len(found.knobs.weights)
    changes = {
        "num_experts": n_experts,
        "num_local_experts": n_experts,
        "num_experts_per_tok": n_experts,
        "moe_intermediate_size": 64 * pick.choice([1, 3]),
        "shared_expert_intermediate_size": 64 * n_layers,
    }
    return replace(found, changes=found.changes | changes | {"mlp_only_layers": pick.choice([[], [], [n_layers - 1]])})


def _with_delta(found: Setting, pick: random.Random) -> Setting:
    """The setting with both kinds of layers, and with a matrix with LoRA in each kind."""
    n_layers, (n_key, n_value) = len(found.knobs.weights), pick.choice([(2, 4), (4, 4)])
    changes = {
        "layer_types": ["linear_attention" if i % 3 < 2 else "full_attention" for i in range(n_layers)],
        "linear_num_key_heads": n_key,
        "linear_num_value_heads": n_value,
        "linear_value_head_dim": 32 if n_value == 4 else 64,
    }
    names = (*DELTA, *LINEARS, *(("shared_expert_gate",) if family_of(found.family).experts is not None else ()))
    some = tuple(pick.sample(names, pick.randint(1, len(names))))
    in_each = some if set(some) & set(DELTA) and set(some) & set(LINEARS[:4]) else (*some, pick.choice(LINEARS[4:]))
    return replace(found, changes=found.changes | changes, targets=pick.choice([names, in_each]))


def method_setting(number: int, method: str, kind: str | None = None, **options: Any) -> Setting:
    """The random setting of this number with a method and its options."""
    found = random_setting(number)
    if options.get("boundary_update") == "fresh" and found.knobs.apply == "layer":
        found = replace(found, knobs=replace(found.knobs, apply="segment"))
    cut = method in ("lopt", "frozen")
    return replace(found, method=method, num_segments=2 if cut else 1, options=options, kind=kind)


def packed_setting(number: int, **changes: Any) -> Setting:
    """The random setting of this number with several sequences in each row; `changes` are the setting's."""
    pick, found = random.Random(40_000 + number), random_setting(number)
    longest = pick.choice([9, 60, 200, 700])
    rows = tuple(tuple(pick.randint(1, longest) for _ in range(pick.choice([1, 3, 6]))) for _ in found.lengths)
    return replace(found, lengths=((longest, *rows[0]), *rows[1:]), packed=True, **changes)


def odd_setting(number: int, *, family: str = "") -> Setting:
    """The setting with sizes that real models and data seldom have: odd widths, many or very short sequences."""
    pick = random.Random(10_000 + number)
    found = random_setting(5_000 + number, dropout=pick.random() < 0.5, family=family)
    kind = pick.choice(["widths", "short", "many", "micro-batches"])
    if kind == "widths":
        hidden = pick.choice([64, 128, 192, 384] if found.family == "phi3" else [32, 96, 160, 224, 416])
        widths = {"hidden_size": hidden, "intermediate_size": pick.choice([32, 64, 96, 160, 352, 1120])}
        return replace(found, changes=found.changes | widths)
    shapes = {"short": (2, 3, 5), "many": (1, 6, 200), "micro-batches": (4, 2, 300)}
    n_micro_batches, n_sequences, longest = shapes[kind]
    n_micro_batches = 1 if found.knobs.apply == "layer" else n_micro_batches
    # the first one has a supervised token: without any in a window the lm_head is never read, which nobody predicts
    lengths = [
        [max(5, longest), *(pick.randint(1, longest) for _ in range(n_sequences - 1))] for _ in range(n_micro_batches)
    ]
    return replace(found, lengths=tuple(map(tuple, lengths)))


def _some(pick: random.Random, choices: list[str], n_layers: int) -> tuple[str, ...]:
    """The choice of each layer: the same for all, or one for each."""
    choice = pick.choice(choices)
    return pick.choice([(choice,) * n_layers, tuple(pick.choice(choices) for _ in range(n_layers))])


@dataclass
class Comparison:
    """A step as measured and as predicted."""

    setting: Setting
    rows: list[MeasuredOp]
    predicted: Timeline

    @property
    def peak(self) -> int:
        return max(row.peak_bytes for row in self.rows)

    @property
    def ratio(self) -> float:
        """The predicted peak over the measured one."""
        return self.predicted.peak_bytes / self.peak

    @property
    def same_op(self) -> bool:
        """Whether the op of the predicted peak has the measured one, up to a thousandth."""
        at = self.predicted.rows.index(self.predicted.peak_row)
        return self.rows[at].peak_bytes >= 0.999 * self.peak

    @property
    def held_off(self) -> int:
        """The largest difference of bytes at an op's beginning."""
        pairs = zip(self.rows, self.predicted.rows, strict=True)
        return max((sum(found.held.values()) - sum(row.held.values()) for row, found in pairs), key=abs)

    def text(self) -> str:
        s = self.setting
        measured = max(self.rows, key=lambda row: row.peak_bytes)
        return (
            f"{self.ratio:.5f} held {self.held_off:+d} {'' if self.same_op else 'OTHER OP '}{s.family} {str(s.dtype)[6:]} "
            f"{s.method}/{s.num_segments} {s.lengths} {measured.text}, predicted {self.predicted.peak_row.op.text()}"
        )

    def table(self) -> str:
        """The comparison op by op, as lines of text."""
        lines = []
        for row, found in zip(self.rows, self.predicted.rows, strict=True):
            held = sum(row.held.values())
            lines.append(
                f"{row.text:34s} held {held:10d} {sum(found.held.values()) - held:+8d}   "
                f"peak {row.peak_bytes:10d} {found.peak_bytes / row.peak_bytes:.5f}"
            )
        return "\n".join(lines)


def compare(setting: Setting, root: Path) -> Comparison:
    """The comparison of two steps, run in a new folder under `root`, the second one watched."""
    folder = Path(tempfile.mkdtemp(dir=root))
    n_layers = len(setting.knobs.weights)
    source = make_folder(
        folder / "source",
        setting.family,
        dtype=setting.stored,
        num_hidden_layers=n_layers,
        max_position_embeddings=4096,
        **{name: value for name, value in setting.changes.items() if name != "num_hidden_layers"},
    )
    if setting.gguf:
        model = find_model(str(write_gguf(source, folder / "model.gguf", setting.gguf, embedding=setting.gguf[-1]))).path
    elif setting.form:
        write_quantised(source, folder / "quantised", setting.form)
        model = find_model(str(folder / "quantised")).path
    else:
        model = folder / "q"
        quantise_model(find_model(str(source)), model)
    return compare_on(setting, model, folder)


def compare_on(setting: Setting, model: Path, folder: Path) -> Comparison:
    """The comparison of two steps on a 4-bit model; `folder` takes the page files."""
    bench = make_bench(
        model,
        method=setting.method,
        num_segments=setting.num_segments,
        n_micro_batches=len(setting.lengths),
        dtype=setting.dtype,
        device=setting.device,
        knobs=setting.knobs,
        page_dir=folder,
        targets=setting.targets,
        rank=setting.rank,
        dropout=setting.dropout,
        clip=0.0 if setting.knobs.apply == "layer" else 1.0,
        kernels=setting.kernels,
        **setting.options,
    )
    vocabulary = setting.changes.get("vocab_size", 320)
    short = [
        random_batch((8,) * len(lengths), vocab=vocabulary, device=setting.device) for lengths in setting.lengths
    ]  # quick, for moments alone
    batches = [_batch(setting, lengths, seed=i, vocab=vocabulary) for i, lengths in enumerate(setting.lengths)]
    batches = [replace(batch, examples=_numbered(batches, i)) for i, batch in enumerate(batches)]
    if setting.objective:
        bench.executor.losses.objective = OBJECTIVES[setting.objective]
        short, batches = ([as_choices(batch, setting.objective) for batch in some] for some in (short, batches))
    lengths = [length for batch in batches for length in batch.lengths]
    cache = FeatureCache(_new(folder / "cache"), identity={}, lengths=lengths, width=bench.model.facts.hidden_size)
    teacher = FeatureCache(_new(folder / "teacher"), identity={}, lengths=lengths, width=bench.model.facts.hidden_size)
    teacher.write(range(len(lengths)), torch.ones(len(lengths), max(lengths), bench.model.facts.hidden_size))
    bench.executor.caches = {"boundary": cache, "teacher": teacher}
    rates = dict.fromkeys(range(9), 1e-3)
    for step, plan in enumerate(bench.plans.values(), start=1):  # all moments are there, and what a step reads
        reads = any(op.kind in (Kind.READ, Kind.WRITE) for op in plan.ops)
        bench.executor.run(plan, batches if reads else short, step=step, learning_rates=rates)
    bench = bench if setting.kind is None else bench.of_kind(setting.kind)
    meter = MemoryMeter(bench.executor)
    with meter.watching(batches):
        bench.executor.run(bench.plan, batches, step=9, learning_rates=rates)
    bench.executor.mover.close()
    return Comparison(setting, meter.rows, predicted(setting, bench.model.facts, bench, batches))


def _batch(setting: Setting, lengths: tuple[int, ...], *, seed: int, vocab: int) -> Batch:
    if not setting.packed:
        return random_batch(lengths, seed=seed, vocab=vocab, device=setting.device)
    return in_a_row([random_batch((length,), seed=seed + at, vocab=vocab) for at, length in enumerate(lengths)])


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _numbered(batches: list[Batch], index: int) -> tuple[int, ...]:
    """The examples of a micro-batch, counted through the window."""
    first = sum(len(batch.lengths) for batch in batches[:index])
    return tuple(range(first, first + len(batches[index].lengths)))


def predicted(setting: Setting, facts: ModelFacts, bench: Bench, batches: list[Batch]) -> Timeline:
    targets = setting.targets or facts.linear_names
    itemsize, dropout = setting.dtype.itemsize, setting.dropout > 0
    shape = LayerShape(facts, itemsize, setting.rank, targets, device_type=setting.device, dropout=dropout)
    shape = replace(shape, has_flash=setting.has_flash, deterministic=setting.deterministic)
    shape = replace(shape, kernels=setting.kernels)
    groups = tuple(bench.executor.optimizer.groups)
    replaced = tuple(layer for segment in bench.plan.segments for layer in segment.replaced)
    sizes = Sizes(shape, setting.knobs, vocabulary_itemsize=setting.stored.itemsize, groups=groups, replaced=replaced)
    return timeline(bench.plan, sizes, [replace(batch.size, n_real=batch.n_tokens) for batch in batches])


def main() -> None:
    words = [word for word in sys.argv[1:] if word != "-v"]
    first, last, *wanted = words
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        for number in range(int(first), int(last)):
            family = next((word for word in wanted if word in FAMILIES and word not in DENSE), "")
            odd, dropout = "odd" in wanted, "dropout" in wanted
            setting = odd_setting(number, family=family) if odd else random_setting(number, dropout=dropout, family=family)
            setting = packed_setting(number) if "packed" in wanted else setting
            if set(wanted) - {"dropout", "odd", "packed"} and setting.family not in wanted:
                continue
            found = compare(setting, Path(root))
            print(number, found.text(), flush=True)
            if "-v" in sys.argv:
                print(setting, found.table(), sep="\n")


if __name__ == "__main__":
    main()
