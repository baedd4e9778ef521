"""What contradicts in a Config, and what has no effect: an option of another method, a pipeline beside a budget.

The rule: a contradiction is an error that names both settings, a setting without effect is a warning; nothing that a user
gave is ignored in silence. What needs the model or the data to be judged is judged where those are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lopt_edge.config.settings import Config, field_names
from lopt_edge.errors import InputError, raise_collected
from lopt_edge.objectives import OBJECTIVES, ObjectiveOptions, objectives_with
from lopt_edge.plan.methods import METHODS, owners_of
from lopt_edge.plan.methods.method import Problem
from lopt_edge.system.file_systems import path_fault

PATHS = ("model", "tokenizer", "data", "output", "eval_data", "retention_data", "chat_template", "init_adapter",
         "cache_dir", "page_dir", "boundary_cache", "teacher", "resume", "memory_report")  # fmt: skip

READ_PATHS = ("model", "tokenizer", "data", "eval_data", "retention_data", "chat_template", "init_adapter", "teacher")


def check_methods(config: Config) -> None:
    """Check a Config that was made in Python. Raises InputError(s)."""
    raise_collected([InputError(found.what, where=found.setting, fix=found.fix) for found in method_errors(config)])


def method_errors(config: Config) -> Iterator[Problem]:
    """The problems of paths that can be none, method options of another method, and whatever contradicts each other."""
    for name in PATHS:
        if (value := getattr(config, name)) is not None and (fault := path_fault(value)) is not None:
            yield Problem(name, fault, "check the path")
    method = METHODS[config.method]
    for name in sorted(config.model_fields_set - set(method.own_options), key=field_names().index):
        owners = owners_of(name)
        if owners and getattr(config, name) != Config.model_fields[name].default:
            what = f"belongs to method {' or '.join(owners)}, this is {config.method}"
            yield Problem(name, what, f"add --method {owners[0]}, or leave {name} out")
    if config.boundary_cache and not method.caches(config):
        fix = "use --method frozen, top-layers or segprop, or lopt with --open-until, or with --local-every 0"
        yield Problem("boundary_cache", "needs early segments that never train", fix)
    elif config.boundary_cache and config.lora_dropout and config.init_adapter:
        what = "cannot be with lora_dropout where adapters lie before the boundary: dropout changes it each time"
        yield Problem("boundary_cache", what, "add --lora-dropout 0")
    others = {"lr_local": config.local_lr, "lr_head": config.head_lr}
    if config.min_lr > min([config.lr, *(rate for name, rate in others.items() if name in method.local)]):
        yield Problem("min_lr", "is above the peak learning rate", "lower it, or raise lr (and lr_local, lr_head)")
    if config.packing and config.apply == "layer":
        what = "cannot be with apply layer: a step may have several rows, and a layer's gradients are complete in the last"
        yield Problem("packing", what, "use --apply segment, or leave packing out")
    yield from _objective_errors(config)
    if config.overwrite:
        yield from _overwrite_errors(config)
    if config.pipeline > 1:
        yield from _pipeline_errors(config)
    if config.ranks > 1:
        yield from _rank_errors(config)
    yield from method.problems(config, config)


def _objective_errors(config: Config) -> Iterator[Problem]:
    """The problems of an objective: settings of another one, methods without a task loss of their own, what it cannot be
    with."""
    for name in ObjectiveOptions.model_fields:
        users, given = objectives_with(name), getattr(config, name) != Config.model_fields[name].default
        if users and given and config.objective not in users:
            what = f"belongs to objective {' or '.join(users)}, this is {config.objective}"
            yield Problem(name, what, f"add --objective {users[0]}, or leave {name} out")
    if config.objective == "sft":
        return
    objective, method = OBJECTIVES[config.objective], METHODS[config.method]
    if method.learns == "replies" or (method.learns == "no reference" and objective.reads_reference):
        fits = ", ".join(name for name, one in METHODS.items() if one.learns == "any objective")
        what = f"{config.objective} cannot be with method {config.method}: {method.why_not}"
        yield Problem("objective", what, f"use --objective sft, or one of the methods {fits}")
    if config.pipeline > 1:
        what = f"{config.objective} cannot be with pipeline: labels and references lie with one process"
        yield Problem("objective", what, "leave pipeline out")
    if config.packing and objective.paired:
        what = (
            f"cannot be with objective {config.objective}: the two replies of a pair are compared, each in a row of its own"
        )
        yield Problem("packing", what, "leave packing out")


def _overwrite_errors(config: Config) -> Iterator[Problem]:
    """The problems of a run that would remove what it reads."""
    if config.resume is not None:
        yield Problem("overwrite", "removes the run that resume goes on with", "leave one of the two out")
    output = Path(config.output).expanduser().resolve()
    for name in READ_PATHS:
        if (value := getattr(config, name)) is not None and Path(value).expanduser().resolve().is_relative_to(output):
            yield Problem("overwrite", f"removes what {name} reads in {config.output}", "choose another output folder")


def _pipeline_errors(config: Config) -> Iterator[Problem]:
    """The problems of what cannot be where a run's segments lie in several processes, whatever the method."""
    if not METHODS[config.method].pipelined:
        names = " or ".join(sorted((name for name in METHODS if METHODS[name].pipelined), reverse=True))
        what = f"belongs to method {names}: in {config.method} a gradient would cross from process to process"
        yield Problem("pipeline", what, "add --method lopt, or leave pipeline out")
        return
    n_segments = len(config.boundary_layers) + 1 if config.boundary_layers else config.num_segments
    if config.pipeline > n_segments:
        what = f"{config.pipeline} processes for {n_segments} segments: each needs one of its own"
        yield Problem("pipeline", what, f"choose at most {n_segments}, or more segments (--num-segments)")
    global_norm = config.clip_scope == "global" and config.clip > 0
    crossing = {
        "boundary": (config.boundary is not None, "the short runs of auto are runs of one process",
                     "name --boundary-layers"),
        "clip_scope": (global_norm, "the global norm needs every process' gradients",
                       "use --clip-scope segment or --clip 0"),
        "apply": (config.apply != "step", "updates come when all processes have agreed, at the step's end",
                  "use --apply step"),
        "boundary_cache": (config.boundary_cache is not None, "with the boundary cached there is nothing to send",
                           "leave one of the two out"),
        "sample_prompt": (config.sample_prompt is not None, "no process has all layers",
                          "use lopt-edge generate after the run"),
        "memory_report": (config.memory_report is not None, "tells of one process", "leave one of the two out"),
    }  # fmt: skip
    for name in ("device_memory", "host_memory", "disk_memory", "pinned_memory"):
        what = "budgets are held for one process, not yet for several"
        crossing[name] = (getattr(config, name) is not None, what, "leave one of the two out")
    for name, (found, what, fix) in crossing.items():
        if found:
            yield Problem(name, f"cannot be with pipeline: {what}", fix)


def _rank_errors(config: Config) -> Iterator[Problem]:
    """The problems of what cannot be where several processes share each step."""
    n = config.ranks
    if config.grad_accum < n and not config.packing:
        what = f"{config.grad_accum} micro-batches a step leave some of {n} ranks without any"
        size, rest = divmod(config.batch_size * config.grad_accum, n)
        same = f"--batch-size {size} --grad-accum {n} (the same step)" if size and not rest else f"--grad-accum {n}"
        yield Problem("grad_accum", what, f"use {same}")
    shared = {
        "pipeline": (config.pipeline > 1, "each process has the whole model, or a part of it", "leave one of the two out"),
        "boundary": (config.boundary is not None, "the short runs of auto are runs of one process",
                     "name --boundary-layers"),
        "apply": (config.apply != "step", "updates come when all have agreed, at the step's end", "use --apply step"),
        "boundary_cache": (config.boundary_cache is not None, "it lies with one process", "leave one of the two out"),
    }  # fmt: skip
    for name, (found, what, fix) in shared.items():
        if found:
            yield Problem(name, f"cannot be with ranks: {what}", fix)


def no_effect_warnings(config: Config) -> list[str]:
    """The settings that were given but change nothing in this combination, a sentence for each."""
    given = config.model_fields_set
    found = []
    method = METHODS[config.method]
    cut = ", ".join(name for name in METHODS if METHODS[name].cuts)
    uncut = "" if method.cuts else method.uncut or f"{config.method} is one segment (methods that cut: {cut})"
    if "num_segments" in given and (config.boundary_layers or uncut):
        found.append(f"num_segments has no effect: {uncut or 'boundary_layers replaces it'}")
    if config.choose_segments and (config.boundary_layers or uncut):
        found.append(f"choose_segments has no effect: {uncut or 'boundary_layers is given'}")
    if config.choose_micro_batch and config.batch_size * config.grad_accum == 1:
        found.append("choose_micro_batch has no effect: a step has one sequence")
    if config.packing and config.batch_size * config.grad_accum == 1:
        found.append("packing has no effect: a step has one sequence (raise grad_accum)")
    if config.packing and config.choose_micro_batch:
        found.append("choose_micro_batch has no effect: the step's sequences are packed into rows")
    if config.row_tokens and config.packing is False:
        found.append("row_tokens has no effect: packing is off")
    if "pipeline_minutes" in given and config.pipeline == config.ranks == 1:
        found.append("pipeline_minutes has no effect: pipeline and ranks are 1")
    if config.ranks > 1 and config.grad_accum % config.ranks and not config.packing:
        found.append(
            f"{config.grad_accum} micro-batches a step cannot be dealt evenly to {config.ranks} ranks: some wait for others"
        )
    if config.ranks > 1 and "closed_cache" in given:
        found.append("closed_cache has no effect: ranks keep no boundary")
    if config.boundary_layers and uncut:
        found.append(f"boundary_layers has no effect: {uncut}")
    for name in ("lr_local", "lr_head", "local_weight"):
        if name in given and name not in method.local:
            found.append(f"{name} has no effect: method {config.method} has no local loss")
    found += method.warnings(config, config)
    if config.objective != "sft" and config.init_adapter and OBJECTIVES[config.objective].reads_reference:
        found.append(
            f"init_adapter is where training begins; the reference of {config.objective} is the base without it (to "
            "compare with the adapter, merge it into the base first: lopt-edge export)"
        )
    if config.cycles > 1 and config.schedule != "cosine":
        found.append(f"cycles has no effect: the schedule is {config.schedule}")
    if config.min_lr and config.schedule == "constant":
        found.append("min_lr has no effect: the schedule is constant")
    if "clip_scope" in given and config.clip == 0:
        found.append("clip_scope has no effect: clip is 0")
    if "epochs" in given and config.max_steps is not None:
        found.append("epochs has no effect: max_steps wins")
    if not config.eval_data and not config.eval_fraction:
        found += [
            f"{name} has no effect: there is no eval_data and no eval_fraction"
            for name in ("eval_every", "keep_best", "patience")
            if getattr(config, name)
        ]
    if config.system is not None and config.sample_prompt is None:
        found.append("system has no effect: there is no sample_prompt")
    if config.patience and not config.eval_every and (config.eval_data or config.eval_fraction):
        found.append("patience has no effect: without eval_every there is one evaluation, at the end")
    if "max_skipped" in given and config.on_nan == "stop":
        found.append("max_skipped has no effect: on_nan is stop")
    if config.eval_data and config.eval_fraction:
        found.append("eval_fraction has no effect: eval_data is given")
    return found
