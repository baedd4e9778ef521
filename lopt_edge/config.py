"""The configuration of a fine-tuning run: one pydantic model, from a YAML file and flags (flags win).

Each knob is declared once, here, with its type, default and help; the command line is made from these fields (cli.py),
YAML keys are the field names (hyphens are accepted for underscores). Rules: all mistakes of a file and its flags are found
in one pass and shown together, each with its line in the file or its flag; an unknown key is an error with a suggestion;
a setting that has no effect is said (`no_effect_warnings`). What needs the model or the data to be judged (boundaries
beyond the depth, say) is checked where those are read. No torch here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from lopt_edge.errors import InputError, InputErrors, raise_collected
from lopt_edge.plan.methods import BOUNDARY_SETTINGS, CACHED, CUT_METHODS, DEFAULTS, OPTIONS, PIPELINED
from lopt_edge.yaml_file import read_yaml

LOCAL_PART = 100  # one part in so many of lr is what lopt's early segments get where nothing is said


class Config(BaseModel):
    """Every setting of `finetune`. Field help texts are what `lopt-edge finetune --help` shows."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str = Field(min_length=1, description="model folder, or hub id (org/name)")
    data: str = Field(min_length=1, description="training data: .jsonl .json .csv .parquet .txt")
    output: str = Field(min_length=1, description="output folder for the adapter and the logs (new or empty)")
    revision: str | None = Field(None, description="hub revision (branch, tag or commit) of the model")
    method: Literal["e2e", "lopt", "frozen", "top-layers", "lcsb", "segprop", "let", "let-local", "mlaan", "repl"] = Field(
        "e2e", description="how far the task gradient reaches (lopt where a setting of its own is given)"
    )
    num_segments: int = Field(2, ge=1, description="lopt, frozen: number of segments of equal depth (mlaan: 4 by default)")
    boundary_layers: tuple[int, ...] | None = Field(
        None, description="e.g. 12,20: each layer (from 0) begins the next segment; replaces num-segments"
    )
    boundary: Literal["auto"] | None = Field(
        None, description="lopt: auto places the boundaries by short runs on your data"
    )
    boundary_update: Literal["stale", "fresh"] = Field(
        "stale", description="lopt: update all segments together, or the early ones first and run them again"
    )
    local_loss: Literal["reconstruct", "next-token", "align"] = Field(
        "reconstruct", description="lopt: the early segments' loss"
    )
    local_every: int = Field(1, ge=0, le=100, description="lopt: train the early segments on every N-th step; 0: never")
    open_every: int = Field(0, ge=0, le=100, description="lopt: every N-th step is end to end, over the boundary; 0: none")
    train_layers: int | None = Field(None, ge=1, description="top-layers: how many of the last layers train")
    selection: Literal["cyclic", "uniform"] = Field("cyclic", description="lcsb: layers in turn, or drawn for each step")
    select_ratio: float = Field(0.5, gt=0, le=1, description="lcsb: share of the layers with a backward in a step")
    unselected: Literal["move", "rest"] = Field("move", description="lcsb: momentum moves the others, or they rest")
    teacher: str | None = Field(None, description="let, lopt's align: another model to align to (default: the base itself)")
    align_until: float = Field(0.5, gt=0, le=1, description="let: share of the run in which an early layer is aligned")
    align_weight: float = Field(0.1, gt=0, description="let: weight of the alignment at the first step")
    align_layer: int | None = Field(None, ge=0, description="let: whose output is aligned, from 0 (default: the third)")
    stages: int = Field(4, ge=1, description="segprop: stages, each with a segment of its own")
    tail_layers: int | None = Field(None, ge=1, description="segprop: final layers that train in all stages (default: 1/8)")
    stage_patience: int | None = Field(
        None, ge=1, description="segprop: a stage ends after N evaluations in a row without a lower held-out loss"
    )
    replace_layers: tuple[int, ...] | None = Field(
        None, description="repl: e.g. 3,5: layers made from those beside them (default: every third of the middle half)"
    )
    leap_layers: int = Field(4, ge=1, description="mlaan: later layers between a window and its loss, at most")
    ema_momentum: float = Field(0.99, ge=0, lt=1, description="mlaan: momentum of the averages of later layers' adapters")
    cascade_weight: float = Field(0.999, gt=0, le=1, description="mlaan: share of a loss that reaches the segment before")
    boundary_cache: str | None = Field(
        None, description="folder that keeps the boundary of each example, where early segments never train"
    )
    max_seq_len: int = Field(2048, ge=2, description="longest sequence in tokens; longer ones are truncated")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps; wins over epochs")
    epochs: int = Field(1, ge=1, description="passes over the data")
    pipeline: int = Field(1, ge=1, le=1024, description="lopt, frozen: run the segments in so many processes")
    pipeline_minutes: float = Field(30.0, gt=0, description="end the run if one of them says nothing for so long")
    choose_segments: bool = Field(False, description="let the planner take more segments where fewer do not fit")
    batch_size: int = Field(1, ge=1, description="sequences per micro-batch")
    grad_accum: int = Field(8, ge=1, description="micro-batches per optimizer step")
    choose_micro_batch: bool = Field(
        False, description="let the planner split batch_size x grad_accum into micro-batches as is fastest"
    )
    lr: float = Field(2e-4, gt=0, description="peak learning rate")
    lr_local: float | None = Field(None, gt=0, description="peak learning rate of local losses (lopt: lr / 100, else lr)")
    local_weight: float = Field(10.0, gt=0, description="weight of the local losses (lambda)")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="learning-rate schedule")
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="share of the steps that warm up")
    clip: float = Field(1.0, ge=0, description="gradient clipping norm; 0 turns it off")
    clip_scope: Literal["segment", "global"] = Field("segment", description="norm per segment, or over all parameters")
    lora_r: int = Field(16, ge=1, le=4096, description="LoRA rank")
    lora_alpha: float = Field(32.0, gt=0, description="LoRA alpha; the branch is scaled by alpha / r")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the LoRA branch's input")
    lora_targets: tuple[str, ...] = Field(("all-linear",), description="all-linear, or e.g. q_proj,v_proj")
    data_format: Literal["messages", "prompt-completion", "alpaca", "sharegpt", "text"] | None = Field(
        None, description="form of the data rows (default: detected)"
    )
    chat_template: str | None = Field(None, description="Jinja file that replaces the tokenizer's chat template")
    eval_data: str | None = Field(None, description="held-out data in any of the forms of --data")
    eval_fraction: float = Field(0.0, ge=0, lt=1, description="share of the data held out for evaluation")
    eval_every: int | None = Field(None, ge=1, description="evaluate every N steps (default: before and after)")
    keep_best: bool = Field(False, description="save the adapter of the lowest evaluation loss, not the last one")
    retention_data: str | None = Field(None, description="other held-out text, to see what the run forgets")
    sample_prompt: str | None = Field(None, description="prompt to complete before and after the run")
    init_adapter: str | None = Field(None, description="LoRA adapter folder to start from")
    cache_dir: str | None = Field(None, description="folder of quantised copies (default: ~/.cache/lopt-edge)")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of adapters, data order and dropout")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where to compute")
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype of the matrix products"
    )
    weights: str = Field("auto", description="layers' weights: resident, host or disk; by layer: disk,0-5=resident")
    activations: str = Field("auto", description="keep, recompute or page what a backward needs; by layer: page,20-23=keep")
    saved_inputs: Literal["auto", "device", "host", "disk"] = Field("auto", description="where layers' inputs wait")
    optimizer: Literal["adamw", "adamw8bit"] = Field("adamw", description="AdamW with moments in fp32 or in 8 bits")
    optimizer_states: Literal["auto", "device", "host", "disk"] = Field("auto", description="where the moments lie")
    gradients: Literal["auto", "device", "host", "disk"] = Field("auto", description="where accumulated gradients lie")
    apply: Literal["step", "segment", "layer"] = Field(
        "step", description="update all at the step's end, or each segment or layer at once (layer: clip 0, grad-accum 1)"
    )
    prefetch: int = Field(1, ge=0, le=8, description="how many layers ahead a movement begins")
    token_tile: int | None = Field(None, ge=16, le=65536, description="tokens of a loss at a time (default: chosen)")
    device_memory: str | None = Field(None, description="budget, e.g. 24GB, 8GiB, 80% of what is free")
    host_memory: str | None = Field(None, description="budget of host memory beside a GPU")
    disk_memory: str | None = Field(None, description="budget of page files")
    pinned_memory: str | None = Field(None, description="budget of page-locked host memory (default: detected)")
    page_dir: str | None = Field(None, description="folder of page files (default: beside the output)")
    save_every: int | None = Field(None, ge=1, description="write a checkpoint every N steps")
    save_minutes: float = Field(10.0, ge=0, description="write a checkpoint every M minutes, inside a step too; 0: never")
    keep: int = Field(2, ge=1, description="how many checkpoints to keep")
    resume: str | None = Field(None, description="auto: go on from the output's newest checkpoint, if any; or its folder")
    on_nan: Literal["skip", "stop"] = Field(
        "skip", description="what to do with a batch whose loss or gradient is no number"
    )
    max_skipped: int = Field(3, ge=1, description="at most so many skipped batches in a row")
    memory_report: str | None = Field(None, description="write predicted and measured bytes per op: FILE.json, FILE.svg")
    force: bool = Field(False, description="start although nothing fits the budgets, which are then not held")
    dry_run: bool = Field(False, description="stop after the checks and the plan; train nothing")

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_method(cls, values: Any) -> Any:
        if isinstance(values, dict) and "method" not in values and _asks_for_a_boundary(values):
            values = {**values, "method": "lopt"}
        if not isinstance(values, dict) or not isinstance(values.get("method"), str) or values.get("boundary_layers"):
            return values
        return {**DEFAULTS.get(values["method"], {}), **values}

    @field_validator("*", mode="before")
    @classmethod
    def _no_yes_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("must not be true or false")
        return value

    @field_validator("boundary_layers", "replace_layers", "lora_targets", mode="before")
    @classmethod
    def _split_commas(cls, value: Any) -> Any:
        if isinstance(value, str | int) and not isinstance(value, bool):
            return tuple(part.strip() for part in str(value).split(",") if part.strip())
        return value

    @field_validator("boundary_layers", "replace_layers", "lora_targets")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if value is not None and not value:
            raise ValueError("must name at least one")
        return value

    @property
    def local_lr(self) -> float:
        """LoPT's paper takes lr itself, which with LoRA does harm (README: the study)."""
        if self.lr_local is not None:
            return self.lr_local
        return self.lr / LOCAL_PART if self.method == "lopt" else self.lr

    def as_yaml(self) -> str:
        """The resolved settings, in the order of declaration."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _asks_for_a_boundary(values: Mapping[str, Any]) -> bool:
    """Whether settings are given that only a cut depth gives a meaning."""
    return any(values.get(name) for name in BOUNDARY_SETTINGS) or str(values.get("pipeline") or 1) != "1"


def file_errors(named: Mapping[str, str | None]) -> list[InputError]:
    """Of the files that settings name, those that are not there, or folders."""
    found = {name: Path(value) for name, value in named.items() if value is not None}
    return [InputError("is a folder" if path.exists() else "no such file", where=f"{name} {path}", fix="check the path")
            for name, path in found.items() if not path.exists() or path.is_dir()]  # fmt: skip


def load_config(
    path: str | Path | None = None, overrides: Mapping[str, Any] | None = None, *, placeholder: str | None = None
) -> Config:
    """A Config from a YAML file and overrides. Raises InputError(s) that name every mistake.

    `placeholder` stands for needed settings that were not given, for a config that is only printed.
    """
    values, lines = ({}, {}) if path is None else read_yaml(Path(path))
    flags = {key: value for key, value in (overrides or {}).items() if value is not None}
    errors = [_unknown_key(key, _place(key, path, lines)) for key in values if key not in Config.model_fields]
    errors += [_unknown_key(key, f"--{key.replace('_', '-')}") for key in flags if key not in Config.model_fields]
    known = {key: value for key, value in {**values, **flags}.items() if key in Config.model_fields}
    if placeholder is not None:
        needed = [name for name, field in Config.model_fields.items() if field.is_required()]
        known = {**dict.fromkeys(needed, placeholder), **known}

    def where(key: str) -> str:
        return f"--{key.replace('_', '-')}" if key in flags or key not in values else _place(key, path, lines)

    try:
        config = Config(**known)
    except ValidationError as error:
        faults = {str(fault["loc"][0]): dict(fault) for fault in error.errors()}
        errors += [_as_input_error(fault, where(key)) for key, fault in faults.items()]
        config = _healed(known, faults)
    for name, message, fix in method_errors(config):
        errors.append(InputError(message, where=where(name), fix=fix))
    raise_collected(errors)
    return config


def _healed(known: Mapping[str, Any], faults: Mapping[str, Any]) -> Config:
    """The settings without those that are wrong, so that the others can be looked at too."""
    needed = [name for name, field in Config.model_fields.items() if field.is_required()]
    sound = {key: value for key, value in known.items() if key not in faults}
    if "method" in faults:  # nothing can be said of its options
        sound = {key: value for key, value in sound.items() if key not in OPTIONS}
    return Config(**{**dict.fromkeys(needed, "(needed)"), **sound})


@contextmanager
def placed(path: str | Path | None, flags: Mapping[str, Any]) -> Iterator[None]:
    """An error about a setting that only the model or the data show gets the setting's place in the file, or its flag."""
    try:
        yield
    except InputErrors as errors:
        raise InputErrors([_placed(error, path, flags) for error in errors.errors]) from None
    except InputError as error:
        raise _placed(error, path, flags) from None


def _placed(error: InputError, path: str | Path | None, flags: Mapping[str, Any]) -> InputError:
    key = error.where.replace(":", " ").split(" ")[0]
    if key not in Config.model_fields:
        return error
    lines = {} if path is None else read_yaml(Path(path))[1]
    if flags.get(key) is not None:
        place = f"--{key.replace('_', '-')}"
    elif key in lines:
        place = _place(key, path, lines)
    else:
        return error
    return type(error)(error.what, where=place + error.where[len(key) :], fix=error.fix)


def check_methods(config: Config) -> None:
    """For a Config that was made in Python. Raises InputError(s)."""
    raise_collected([InputError(what, where=name, fix=fix) for name, what, fix in method_errors(config)])


def method_errors(config: Config) -> Iterator[tuple[str, str, str]]:
    """(setting, what is wrong, what to do) for method options that belong to another method or contradict each other."""
    given = config.model_fields_set
    for name, methods in OPTIONS.items():
        default = Config.model_fields[name].default
        if name in given and config.method not in methods and getattr(config, name) != default:
            yield (name, f"belongs to method {' or '.join(methods)}, this is {config.method}",
                   f"add --method {methods[0]}, or leave {name} out")  # fmt: skip
    trains_early = config.method == "lopt" and (config.local_every or config.open_every)
    if config.boundary_cache and (config.method not in CACHED or trains_early):
        yield ("boundary_cache", "needs early segments that never train",
               "use --method frozen, top-layers or segprop, or lopt with --local-every 0 and no --open-every")  # fmt: skip
    elif config.boundary_cache and config.lora_dropout and (config.init_adapter or config.method == "segprop"):
        yield ("boundary_cache", "cannot be with lora_dropout where adapters lie before the boundary: dropout changes it "
               "each time", "add --lora-dropout 0")  # fmt: skip
    if config.method == "segprop" and config.keep_best:
        yield "keep_best", "cannot be with segprop: its stages train other networks than the whole model", "leave it out"
    if config.teacher and config.method == "lopt" and config.local_loss != "align":
        yield "teacher", f"belongs to local_loss align, this is {config.local_loss}", "add --local-loss align"
    if config.stage_patience and not (config.eval_every and (config.eval_data or config.eval_fraction)):
        yield ("stage_patience", "needs evaluations: eval_every, and eval_data or eval_fraction",
               "add --eval-every and --eval-fraction")  # fmt: skip
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
        yield ("boundary_update", "fresh needs clip_scope segment: an early segment is updated before the norm of the "
               "others is known", "use --clip-scope segment or --clip 0")  # fmt: skip


def _repl_errors(config: Config) -> Iterator[tuple[str, str, str]]:
    if "disk" in config.weights or "host" in config.weights:
        yield ("weights", "must be resident with method repl: a replaced layer reads both layers beside it",
               "leave weights out, or use another method")  # fmt: skip
    if config.init_adapter:
        yield ("init_adapter", "cannot be with method repl: adapters of the intact model do not fit the replaced layers",
               "leave it out, or merge it first (lopt-edge export) and train the merged model")  # fmt: skip


def _pipeline_errors(config: Config) -> Iterator[tuple[str, str, str]]:
    """What cannot be where a run's segments lie in several processes."""
    if config.method not in PIPELINED:
        yield ("pipeline", f"belongs to method {' or '.join(PIPELINED)}: in {config.method} a gradient would cross from "
               "process to process", "add --method lopt, or leave pipeline out")  # fmt: skip
        return
    n_segments = len(config.boundary_layers) + 1 if config.boundary_layers else config.num_segments
    if config.pipeline > n_segments:
        yield ("pipeline", f"{config.pipeline} processes for {n_segments} segments: each needs one of its own",
               f"choose at most {n_segments}, or more segments (--num-segments)")  # fmt: skip
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
        crossing[name] = (getattr(config, name) is not None, "budgets are held for one process, not yet for several",
                          "leave one of the two out")  # fmt: skip
    for name, (found, what, fix) in crossing.items():
        if found:
            yield name, f"cannot be with pipeline: {what}", fix


def _place(key: str, path: str | Path | None, lines: dict[str, int]) -> str:
    return f"{path}:{lines[key]}: {key}" if key in lines else f"{path}: {key}"


def _unknown_key(key: str, where: str) -> InputError:
    near = difflib.get_close_matches(key, Config.model_fields, n=1)
    return InputError("unknown setting", where=where, fix=f"did you mean {near[0]!r}?" if near else "see --help")


def _as_input_error(fault: dict[str, Any], where: str) -> InputError:
    message = str(fault["msg"]).removeprefix("Value error, ").replace("Input should be", "must be")
    if fault["type"] == "missing":
        return InputError("is needed", where=where, fix=Config.model_fields[str(fault["loc"][0])].description or "")
    return InputError(f"{message} (got {str(fault['input'])[:60]!r})", where=where)


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
        found.append("local_weight has almost no effect: under per-segment clipping AdamW does not see the gradient's "
                     "scale; lr_local is the knob")  # fmt: skip
    if "clip_scope" in given and config.clip == 0:
        found.append("clip_scope has no effect: clip is 0")
    if "epochs" in given and config.max_steps is not None:
        found.append("epochs has no effect: max_steps wins")
    if not config.eval_data and not config.eval_fraction:
        found += [f"{name} has no effect: there is no eval_data and no eval_fraction"
                  for name in ("eval_every", "keep_best") if getattr(config, name)]  # fmt: skip
    if "max_skipped" in given and config.on_nan == "stop":
        found.append("max_skipped has no effect: on_nan is stop")
    if config.eval_data and config.eval_fraction:
        found.append("eval_fraction has no effect: eval_data is given")
    return found
