"""From settings to what the planner asks: the method's course, target modules, the settings that are fixed, what may vary.

What contradicts itself or cannot be with this model or device is refused here, all mistakes together; a memory setting
without effect is reported. Which of the free combinations is taken is decided in plan/search/search.py. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from lopt_edge.config.settings import Config
from lopt_edge.errors import InputError, raise_collected
from lopt_edge.plan.facts.device_kinds import AUTO, TRITON, kind_of
from lopt_edge.plan.facts.model import ModelFacts
from lopt_edge.plan.methods import METHODS, course_of
from lopt_edge.plan.methods.course import Course
from lopt_edge.plan.schedule.knobs import ACTIVATIONS, MLP_PIECES, TOKEN_TILES, WEIGHTS, Knobs, has_blocked_mlp, per_layer
from lopt_edge.plan.search.search import Candidate, Space, three_digits
from lopt_edge.planning.unlisted import check_unlisted

MOST_SEGMENTS = 8
LEAST_ROW = 16  # tokens; a longer sequence has a row of its own
Asked = TypeVar("Asked")


def deterministic_notes(config: Config, device_type: str) -> tuple[str, ...]:
    """What --deterministic does on this kind of device, and what it costs; nothing where it was not asked for."""
    if not config.deterministic:
        return ()
    if not kind_of(device_type).host_is_below:
        return ("deterministic: a CPU with the same number of threads gives the same bits anyway",)
    return (
        "deterministic: attention by the memory-efficient kernel, since flash's backward adds up in whatever order its "
        "blocks end. It is slower, by how much is not measured: the seconds here are flash's",
    )


def kernel_notes(config: Config, device_type: str) -> tuple[str, ...]:
    """What a plan without the device assumes of --kernels; nothing where the device has none of our own."""
    if config.kernels != AUTO or not kind_of(device_type).triton_capabilities:
        return ()
    return ("kernels: torch's, which take more memory; a run on this device takes our own where Triton is there",)


def check_memory_settings(config: Config, facts: ModelFacts, *, device_type: str) -> None:
    """Refuse memory settings that cannot be or contradict each other, all together (InputErrors)."""
    errors: list[InputError] = []
    for name, choices in (("weights", WEIGHTS), ("activations", ACTIVATIONS)):
        text = getattr(config, name)
        try:
            if text != "auto" and "host" in per_layer(text, choices, n_layers=facts.n_layers, where=name):
                errors += _host_without_gpu(name, device_type)
        except InputError as error:
            errors.append(error)
    for name in ("saved_inputs", "optimizer_states", "gradients"):
        errors += _host_without_gpu(name, device_type) if getattr(config, name) == "host" else []
    for name in ("host_memory", "pinned_memory"):
        if not kind_of(device_type).has_host_tier and getattr(config, name) is not None:
            errors.append(
                InputError(
                    "there is no host tier without a GPU: RAM is the device", where=name, fix="state --device-memory"
                )
            )
    if config.kernels == TRITON and not kind_of(device_type).triton_capabilities:
        what = f"our own kernels are for a GPU, not for a {kind_of(device_type).title}"
        errors.append(InputError(what, where="kernels", fix="leave it out, or use --kernels torch"))
    if config.deterministic and kind_of(device_type).host_is_below and any(kind.delta for kind in facts.kinds):
        errors.append(
            InputError(
                "a gated delta rule adds up along its tokens, for which torch has no deterministic kernel on a GPU",
                where="deterministic",
                fix="leave it out (two runs then agree within rounding), or use --device cpu",
            )
        )
    if config.apply == "layer" and config.clip:
        errors.append(
            InputError(
                "layer needs clip 0: a layer is updated before the norm of the others is known",
                where="apply",
                fix="add --clip 0, or use --apply segment",
            )
        )
    if config.apply == "layer" and config.grad_accum > 1:
        errors.append(
            InputError(
                f"layer needs grad_accum 1, not {config.grad_accum}: a layer's gradients are complete "
                "only in the last micro-batch",
                where="apply",
                fix="add --grad-accum 1",
            )
        )
    if config.apply == "segment" and config.clip and config.clip_scope == "global":
        errors.append(
            InputError(
                "segment needs clip_scope segment: the global norm is known only at the step's end",
                where="apply",
                fix="use --clip-scope segment, --clip 0 or --apply step",
            )
        )
    raise_collected(errors)


def _host_without_gpu(name: str, device_type: str) -> list[InputError]:
    if kind_of(device_type).has_host_tier:
        return []
    return [InputError("host is refused: on a machine without GPU the device is RAM", where=name, fix="use disk")]


def against_facts(config: Config, facts: ModelFacts) -> tuple[Course, tuple[str, ...], int]:
    """The method's course, target modules and longest sequence (tokens) for this model. Raises InputErrors together."""
    errors: list[InputError] = []
    course: Course | None = None
    targets: tuple[str, ...] = ()
    try:
        course = course_of(config, facts.n_layers)
        _check_replaced(course, facts)
        _check_shared_keys(config, course, facts)
        _check_ranks(config, course)
        check_unlisted(config, course, facts)
    except InputError as error:
        errors.append(error)
    try:
        targets = target_modules(facts, config.lora_targets)
    except InputError as error:
        errors.append(error)
    longest = 0
    try:
        longest = longest_sequence(facts, config.max_seq_len, is_given="max_seq_len" in config.model_fields_set)
    except InputError as error:
        errors.append(error)
    raise_collected(errors)
    assert course is not None
    return course, targets, longest


def longest_sequence(facts: ModelFacts, max_seq_len: int, *, is_given: bool) -> int:
    """The longest sequence (tokens) that this model takes. Raises InputError where more was asked for."""
    limit = facts.max_positions or max_seq_len
    if max_seq_len > limit and is_given:
        what = f"{max_seq_len} is beyond the model's {limit} positions"
        raise InputError(what, where="max_seq_len", fix=f"use at most {limit}")
    return min(max_seq_len, limit)


def target_modules(facts: ModelFacts, targets: Iterable[str]) -> tuple[str, ...]:
    """The linear layers' short names that `--lora-targets` names, in the layer's order. Raises InputError."""
    wanted = set(targets)
    unknown = sorted(wanted - {*facts.linear_names, "all-linear"})
    if unknown:
        raise InputError(
            f"{', '.join(unknown)} is not in this model",
            where="lora_targets",
            fix=f"choose all-linear or from {', '.join(facts.linear_names)}",
        )
    if "all-linear" in wanted:
        return facts.linear_names
    for kind in facts.kinds:
        names = [linear.short_name for linear in kind.linears]
        if not wanted & set(names):
            raise InputError(
                f"{', '.join(sorted(wanted))}: some layers of this model have none of these",
                where="lora_targets",
                fix=f"choose all-linear, or name one of {', '.join(names)} as well",
            )
    return tuple(name for name in facts.linear_names if name in wanted)


def _check_replaced(course: Course, facts: ModelFacts) -> None:
    """Refuse to make a layer from others that have other matrices, or one that has experts. Raises InputError."""
    if found := [i for i in course.replaced if facts.layer(i).experts is not None]:
        raise InputError(
            f"layers {', '.join(map(str, found))} have experts, which cannot be made from those beside them",
            where="replace_layers",
            fix="use another method",
        )
    odd = [i for i in course.replaced if not facts.kinds_equal(i - 1, i, i + 1)]
    if odd:
        fine = [i for i in range(1, facts.n_layers - 1) if facts.kinds_equal(i - 1, i, i + 1)]
        raise InputError(
            f"layers {', '.join(map(str, odd))} have other matrices than those beside them",
            where="replace_layers",
            fix=f"choose from {', '.join(map(str, fine))}" if fine else "use another method",
        )


def _check_shared_keys(config: Config, course: Course, facts: ModelFacts) -> None:
    """Refuse what would let a layer run without the keys and values of another layer that it attends to, or without what
    it is told of the tokens. Raises InputErrors."""
    if config.pipeline > 1 and facts.own_inputs is not None:
        what = "the layers of this model are told of each token anew, and later processes do not know the tokens"
        raise InputError(what, where="pipeline", fix="leave it out")
    if not facts.key_sources:
        return
    sources = sorted(set(facts.source_of.values()))
    named = ", ".join(map(str, sources))
    errors = []
    for kind in course.kinds:
        if any(segment.overlaps for segment in kind.segments):
            what = f"runs layers in overlapping windows, and later layers attend to keys of layers {named}"
            errors.append(InputError(f"{course.method} {what}", where="method", fix="use lopt or e2e"))
        if absent := sorted({layer for segment in kind.segments for layer in segment.absent} & set(sources)):
            what = f"{course.method} leaves out layers {', '.join(map(str, absent))}, to whose keys later layers attend"
            errors.append(InputError(what, where="method", fix="use another method"))
        if (boundary := max(kind.reads or 0, kind.writes or 0)) > sources[0]:
            what = f"a cache before layer {boundary} does not hold the keys of layers {named}, to which later layers attend"
            fix = f"leave it out, or cut at layer {sources[0]} or before (--boundary-layers)"
            errors.append(InputError(what, where="boundary_cache", fix=fix))
    raise_collected(errors[:1])


def _check_ranks(config: Config, course: Course) -> None:
    """Refuse what the kinds of step of a method need and several ranks do not have. Raises InputErrors."""
    if config.ranks == 1:
        return
    errors = []
    if any(kind.teacher for kind in course.kinds):
        what = f"{course.method} here learns from a teacher, whose features lie with one process"
        errors.append(InputError(what, where="ranks", fix="use another method or local_loss, or leave ranks out"))
    if any(kind.fresh for kind in course.kinds):
        what = "fresh cannot be with ranks: updates come when all have agreed, at the step's end"
        errors.append(InputError(what, where="boundary_update", fix="use --boundary-update stale"))
    raise_collected(errors)


def search_space(config: Config, facts: ModelFacts, device_type: str) -> Space:
    """The combinations of memory settings that a run may take, those that the user set being fixed."""
    fixed = fixed_knobs(config, facts)
    settings = {"states": "optimizer_states"}
    said = frozenset(name for name in fixed if settings.get(name, name) in config.model_fields_set)
    return Space(facts, device_type, fixed, said)


def fixed_knobs(config: Config, facts: ModelFacts) -> dict[str, Any]:
    """The memory settings that the user stated, by the names of `Knobs`."""
    n_layers = facts.n_layers
    found: dict[str, Any] = {"optimizer": config.optimizer, "apply": config.apply}
    found |= {"prefetch": config.prefetch} if "prefetch" in config.model_fields_set else {}
    sizes = {"token_tile": config.token_tile, "mlp_block": config.mlp_block, "mlp_tile": config.mlp_tile}
    found |= {name: size for name, size in sizes.items() if size is not None}
    if METHODS[config.method].resident:
        found["weights"] = ("resident",) * n_layers  # the method's problems() refuse others
    elif config.weights != "auto":
        found["weights"] = per_layer(config.weights, WEIGHTS, n_layers=n_layers, where="weights")
    if config.activations != "auto":
        found["activations"] = per_layer(config.activations, ACTIVATIONS, n_layers=n_layers, where="activations")
    tiers = {"saved_inputs": config.saved_inputs, "states": config.optimizer_states, "gradients": config.gradients}
    return found | {name: tier for name, tier in tiers.items() if tier != "auto"}


def variants(config: Config, facts: ModelFacts) -> Iterator[list[Config]]:
    """The configs that the planner may choose from, the given one alone unless it says otherwise.

    Each list is one number of segments, the fewest first: the first list in which something fits is taken. Within it the
    same sequences a step are split into micro-batches in every way (the gradients are equal up to rounding, law 5), and
    the fastest is taken.
    """
    numbers = [config.num_segments]
    if config.choose_segments and METHODS[config.method].cuts and not config.boundary_layers:
        numbers += range(config.num_segments + 1, min(MOST_SEGMENTS, facts.n_layers) + 1)
    n_sequences = config.batch_size * config.grad_accum
    splits = [config.batch_size]
    if config.choose_micro_batch:
        most = max(1, n_sequences // config.ranks)  # a micro-batch for each rank
        splits = [size for size in range(most, 0, -1) if n_sequences % size == 0]
    for number in numbers:
        changes = ({"num_segments": number, "batch_size": size, "grad_accum": n_sequences // size} for size in splits)
        yield [config.model_copy(update=change) for change in changes]


def settled(config: Config, facts: ModelFacts, ask: Callable[[Config], tuple[Asked, Candidate | None]]) -> Asked:
    """The variant to run; `ask` gives each with its best candidate. If none fits, the last one."""
    asked = None
    for group in variants(config, facts):
        found = [ask(variant) for variant in group]
        fitting = [(answer, best) for answer, best in found if best is not None]
        if fitting:
            return min(fitting, key=lambda pair: three_digits(pair[1].seconds.seconds))[0]
        asked = found[-1][0]
    assert asked is not None
    return asked


def split_to_fit(config: Config, ask: Callable[[Config], tuple[Asked, Candidate | None]]) -> tuple[Asked, str]:
    """The answer for a run under way, and a sentence if its micro-batches are split.

    It is unchanged if that fits, else the same sequences in smaller micro-batches, the largest that fit; unchanged if none
    does. With dropout, whose masks go by micro-batch, none is tried.
    """
    as_it_is, best = ask(config)
    if best is not None:
        return as_it_is, ""
    for smaller, what in smaller_micro_batches(config):
        answer, best = ask(smaller)
        if best is not None:
            return answer, (
                f"{what}, which fit; gradients stay equal up to rounding (1e-5 of their norm), so the adapter's last "
                "bits may differ"
            )
    return as_it_is, ""


def smaller_micro_batches(config: Config) -> Iterator[tuple[Config, str]]:
    """The same sequences a step in ever smaller micro-batches, each with what was done; none with dropout."""
    if config.lora_dropout:
        return
    if config.packing:
        whole = row_tokens = config.row_tokens or config.max_seq_len
        while (row_tokens := row_tokens // 2) >= LEAST_ROW:
            yield config.model_copy(update={"row_tokens": row_tokens}), f"rows of {whole} tokens are cut to {row_tokens}"
        return
    whole = config.batch_size
    for size in (n for n in range(whole - 1, 0, -1) if whole % n == 0):
        smaller = config.model_copy(update={"batch_size": size, "grad_accum": config.grad_accum * whole // size})
        yield smaller, f"micro-batches of {whole} are split into {size}"


def chosen_settings(asked: Config, settled: Config) -> Iterator[str]:
    """A sentence for each setting that the planner was let to choose, with its choice."""
    if asked.choose_micro_batch:
        yield f"micro-batches chosen: {settled.grad_accum} of {settled.batch_size}"
    if asked.choose_segments and METHODS[settled.method].cuts:
        yield f"segments chosen: {settled.num_segments}"


def memory_warnings(config: Config, knobs: Knobs, facts: ModelFacts) -> Iterator[str]:
    """One sentence for each memory setting that changes nothing in this combination."""
    tiers = {*knobs.weights, knobs.saved_inputs, knobs.states, knobs.gradients}
    moves = tiers - {"device", "resident"} or "page" in knobs.activations
    given = config.model_fields_set
    if "prefetch" in given and not moves:
        yield "prefetch has no effect: nothing is moved between tiers"
    if config.page_dir and "disk" not in tiers and "page" not in knobs.activations:
        yield "page_dir has no effect: nothing is paged to disk"
    longest = max(config.max_seq_len, config.row_tokens or 0) if config.packing else config.batch_size * config.max_seq_len
    if config.token_tile not in (None, TOKEN_TILES[0]) and longest <= min(config.token_tile, TOKEN_TILES[0]):
        yield f"token_tile has no effect: no micro-batch has more than {longest} tokens"
    if not has_blocked_mlp(facts):
        pieces = [name for name in ("mlp_block", "mlp_tile") if getattr(config, name) is not None]
        yield from (f"{name} has no effect: this model has no MLP that is computed in blocks" for name in pieces)
    elif config.mlp_tile is not None and longest <= min(config.mlp_tile, MLP_PIECES[1]):
        yield f"mlp_tile has no effect: no micro-batch has more than {longest} tokens"
    if "saved_inputs" in given and knobs.saved_inputs != "device" and "recompute" not in knobs.activations:
        yield "saved_inputs has no effect: no layer is recomputed from its saved input"
    if "gradients" in given and knobs.gradients != "device" and config.apply == "layer":
        yield "gradients has no effect: apply layer frees each layer's gradients at once"
