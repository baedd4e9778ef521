"""What contradicts in a Config, and what has no effect: an option of another method, a pipeline beside a budget.

The rule: a contradiction is an error that names both settings, a setting without effect is a warning; nothing that a user
gave is ignored in silence. What needs the model or the data to be judged is judged where those are read.
"""

from __future__ import annotations

from collections.abc import Iterator

from lopt_edge.config.settings import Config
from lopt_edge.errors import InputError, raise_collected
from lopt_edge.plan.methods import CACHED, CUT_METHODS, OPTIONS, PIPELINED


def check_methods(config: Config) -> None:
    """For a Config that was made in Python. Raises InputError(s)."""
    raise_collected([InputError(what, where=name, fix=fix) for name, what, fix in method_errors(config)])


def method_errors(config: Config) -> Iterator[tuple[str, str, str]]:
    """(setting, what is wrong, what to do) for method options that belong to another method or contradict each other."""
    given = config.model_fields_set
    for name, methods in OPTIONS.items():
        default = Config.model_fields[name].default
        if name in given and config.method not in methods and getattr(config, name) != default:
            yield (
                name,
                f"belongs to method {' or '.join(methods)}, this is {config.method}",
                f"add --method {methods[0]}, or leave {name} out",
            )
    trains_early = config.method == "lopt" and (config.local_every or config.open_every)
    if config.boundary_cache and (config.method not in CACHED or trains_early):
        yield (
            "boundary_cache",
            "needs early segments that never train",
            "use --method frozen, top-layers or segprop, or lopt with --local-every 0 and no --open-every",
        )
    elif config.boundary_cache and config.lora_dropout and (config.init_adapter or config.method == "segprop"):
        yield (
            "boundary_cache",
            "cannot be with lora_dropout where adapters lie before the boundary: dropout changes it each time",
            "add --lora-dropout 0",
        )
    if config.method == "segprop" and config.keep_best:
        yield "keep_best", "cannot be with segprop: its stages train other networks than the whole model", "leave it out"
    if config.teacher and config.method == "lopt" and config.local_loss != "align":
        yield "teacher", f"belongs to local_loss align, this is {config.local_loss}", "add --local-loss align"
    if config.stage_patience and not (config.eval_every and (config.eval_data or config.eval_fraction)):
        yield (
            "stage_patience",
            "needs evaluations: eval_every, and eval_data or eval_fraction",
            "add --eval-every and --eval-fraction",
        )
    if config.method == "top-layers" and config.train_layers is None:
        yield "train_layers", "is needed by method top-layers", "say how many of the last layers train"
    if config.method == "repl":
        yield from _repl_errors(config)
    if config.method == "mlaan" and config.apply != "step":
        yield "apply", "mlaan needs step: a segment that was updated would run again in the next window", "leave apply out"
    if config.pipeline > 1:
        yield from _pipeline_errors(config)
    if config.method != "lopt":
        return
    if config.boundary and (config.boundary_layers or "num_segments" in given):
        yield "boundary", "auto chooses the boundaries, which are given too", "leave out boundary_layers and num_segments"
    if config.boundary and config.boundary_cache:
        yield "boundary", "auto needs early segments that train", "leave out boundary_cache"
    if config.open_every == 1:
        yield "open_every", "1 opens the boundary on every step: that is end to end", "use --method e2e, or 2 and more"
    if config.boundary_update == "fresh" and config.clip and config.clip_scope == "global":
        yield (
            "boundary_update",
            "fresh needs clip_scope segment: an early segment is updated before the norm of the others is known",
            "use --clip-scope segment or --clip 0",
        )


def _repl_errors(config: Config) -> Iterator[tuple[str, str, str]]:
    if "disk" in config.weights or "host" in config.weights:
        yield (
            "weights",
            "must be resident with method repl: a replaced layer reads both layers beside it",
            "leave weights out, or use another method",
        )
    if config.init_adapter:
        yield (
            "init_adapter",
            "cannot be with method repl: adapters of the intact model do not fit the replaced layers",
            "leave it out, or merge it first (lopt-edge export) and train the merged model",
        )


def _pipeline_errors(config: Config) -> Iterator[tuple[str, str, str]]:
    """What cannot be where a run's segments lie in several processes."""
    if config.method not in PIPELINED:
        yield (
            "pipeline",
            f"belongs to method {' or '.join(PIPELINED)}: in {config.method} a gradient would cross from "
            "process to process",
            "add --method lopt, or leave pipeline out",
        )
        return
    n_segments = len(config.boundary_layers) + 1 if config.boundary_layers else config.num_segments
    if config.pipeline > n_segments:
        yield (
            "pipeline",
            f"{config.pipeline} processes for {n_segments} segments: each needs one of its own",
            f"choose at most {n_segments}, or more segments (--num-segments)",
        )
    crossing = {
        "local_loss": (config.local_loss == "align", "a teacher's features lie with one process", "use another local_loss"),
        "boundary": (config.boundary is not None, "the short runs of auto are runs of one process",
                     "name --boundary-layers"),
        "open_every": (config.open_every > 0, "in an open step a gradient crosses the boundary", "leave open_every out"),
        "boundary_update": (config.boundary_update == "fresh", "fresh makes each process wait for the update of the one "
                            "before", "use --boundary-update stale"),
        "clip_scope": (config.clip_scope == "global" and config.clip > 0, "the global norm needs every process' gradients",
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
        crossing[name] = (
            getattr(config, name) is not None,
            "budgets are held for one process, not yet for several",
            "leave one of the two out",
        )
    for name, (found, what, fix) in crossing.items():
        if found:
            yield name, f"cannot be with pipeline: {what}", fix


def no_effect_warnings(config: Config) -> list[str]:
    """One sentence for each setting that was given but changes nothing in this combination."""
    given = config.model_fields_set
    found = []
    cut = ", ".join(CUT_METHODS)
    uncut = "" if config.method in CUT_METHODS else f"{config.method} is one segment (methods that cut: {cut})"
    uncut = "top-layers cuts at train_layers" if config.method == "top-layers" else uncut
    if "num_segments" in given and (config.boundary_layers or uncut):
        found.append(f"num_segments has no effect: {uncut or 'boundary_layers replaces it'}")
    if config.choose_segments and (config.boundary_layers or uncut):
        found.append(f"choose_segments has no effect: {uncut or 'boundary_layers is given'}")
    if config.choose_micro_batch and config.batch_size * config.grad_accum == 1:
        found.append("choose_micro_batch has no effect: a step has one sequence")
    if "pipeline_minutes" in given and config.pipeline == 1:
        found.append("pipeline_minutes has no effect: pipeline is 1")
    if config.boundary_layers and uncut:
        found.append(f"boundary_layers has no effect: {uncut}")
    if config.method == "mlaan":
        found += ["local_weight has no effect: cascade_weight weighs mlaan's losses"] * ("local_weight" in given)
    elif config.method != "lopt":
        names = [name for name in ("lr_local", "local_weight") if name in given]
        names = names[1:] if config.method == "let-local" and "lr_local" in names else names
        found += [f"{name} has no effect: method {config.method} has no local loss" for name in names]
    elif not config.local_every:
        local = ("lr_local", "local_weight", "local_loss", "boundary_update", "teacher")
        found += [f"{name} has no effect: local_every is 0" for name in local if name in given]
    elif "local_weight" in given and config.clip > 0 and config.clip_scope == "segment":
        found.append(
            "local_weight has almost no effect: under per-segment clipping AdamW does not see the gradient's "
            "scale; lr_local is the knob"
        )
    if "clip_scope" in given and config.clip == 0:
        found.append("clip_scope has no effect: clip is 0")
    if "epochs" in given and config.max_steps is not None:
        found.append("epochs has no effect: max_steps wins")
    if not config.eval_data and not config.eval_fraction:
        found += [
            f"{name} has no effect: there is no eval_data and no eval_fraction"
            for name in ("eval_every", "keep_best")
            if getattr(config, name)
        ]
    if "max_skipped" in given and config.on_nan == "stop":
        found.append("max_skipped has no effect: on_nan is stop")
    if config.eval_data and config.eval_fraction:
        found.append("eval_fraction has no effect: eval_data is given")
    return found
