"""The settings of a fine-tuning run: one pydantic model, `Config`.

Each setting is declared once, here or as an option in its method's file (plan/methods), with its type, default and help.
The command line is made from these fields (cli/options.py), YAML keys are the field names. Rules: a Config is frozen; what
one value may be is said by its field, what several contradict by rules.py, and a file with its flags is read by load.py,
which shows all mistakes together. What needs the model or the data (boundaries beyond the depth, say) is checked where
those are read. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import yaml
from pydantic import ConfigDict, Field, ValidationError, ValidationInfo, create_model, field_validator, model_validator

from lopt_edge.config.faults import SettingsError, faults_of
from lopt_edge.objectives import OBJECTIVES, ObjectiveOptions
from lopt_edge.plan.facts.device_kinds import AUTO, DEVICE_TYPES
from lopt_edge.plan.methods import METHODS, option_classes
from lopt_edge.plan.methods.method import Options

if TYPE_CHECKING:  # a method's own options are read in its own file, so the others are typed without them
    DeviceName = str
    MethodName = str
    MethodOptions = Options
else:
    DeviceName = Literal[(AUTO, *DEVICE_TYPES)]
    MethodName = Literal[tuple(METHODS)]
    MethodOptions = create_model("MethodOptions", __base__=option_classes())


class Config(ObjectiveOptions, MethodOptions):
    """The settings of `finetune`, all of them. Field help texts are what `lopt-edge finetune --help` shows."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str = Field(min_length=1, description="model folder, GGUF file, or hub id (org/name, org/name:FILE.gguf)")
    data: str = Field(min_length=1, description="training data: files, folders, hub data sets; a.jsonl:0.7,org/name:0.3")
    output: str = Field(min_length=1, description="output folder for the adapter and the logs (new or empty)")
    overwrite: bool = Field(False, description="replace an earlier run in the output folder; other files there stay")
    tokenizer: str | None = Field(None, description="folder with the tokenizer of a GGUF file, instead of the file's own")
    push_to_hub: str | None = Field(None, description="org/name on the hub that gets the adapter at the end")
    revision: str | None = Field(None, description="hub revision (branch, tag or commit) of the model")
    method: MethodName = Field(
        "e2e", description="how far the task gradient reaches (lopt where a setting of its own is given)"
    )
    boundary: Literal["auto"] | None = Field(
        None, description="lopt: auto places the boundaries by short runs on your data"
    )
    teacher: str | None = Field(None, description="let, lopt's align: another model to align to (default: the base itself)")
    boundary_cache: str | None = Field(
        None, description="folder that keeps the boundary of each example, where early segments never train"
    )
    max_seq_len: int = Field(2048, ge=2, description="longest sequence in tokens; longer ones are truncated")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps; wins over epochs")
    epochs: int = Field(1, ge=1, description="passes over the data")
    pipeline: int = Field(1, ge=1, le=1024, description="lopt, frozen: run the segments in so many processes")
    pipeline_minutes: float = Field(
        30.0, gt=0, description="end the run if a process (of a pipeline, or a rank) says nothing for so long"
    )
    ranks: int = Field(
        1, ge=1, le=256, description="share each step among so many processes (torchrun and accelerate launch say it)"
    )
    choose_segments: bool = Field(False, description="let the planner take more segments where fewer do not fit")
    batch_size: int = Field(1, ge=1, description="sequences (of dpo, orpo, simpo: pairs) per micro-batch")
    grad_accum: int = Field(8, ge=1, description="micro-batches per optimizer step")
    packing: bool | None = Field(
        None, description="lay a step's short sequences into rows, one after the other (default: where that is faster)"
    )
    row_tokens: int | None = Field(
        None, ge=2, description="packing: most tokens of a row (default: chosen, up to max_seq_len)"
    )
    choose_micro_batch: bool = Field(
        False, description="let the planner split batch_size x grad_accum into micro-batches as is fastest"
    )
    lr: float = Field(2e-4, gt=0, description="peak learning rate (default of other objectives: 5e-6, orpo 8e-6)")
    lr_local: float | None = Field(None, gt=0, description="peak learning rate of local losses (lopt: lr / 100, else lr)")
    lr_head: float | None = Field(None, gt=0, description="peak learning rate of lopt's aux heads (default: lr)")
    local_weight: float = Field(10.0, gt=0, description="weight of the local losses (lambda)")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="learning-rate schedule")
    cycles: int = Field(1, ge=1, le=1000, description="cosine: how often it begins again at the peak (warm restarts)")
    min_lr: float = Field(0.0, ge=0, description="lowest learning rate that the schedule falls to")
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="share of the steps that warm up")
    clip: float = Field(1.0, ge=0, description="gradient clipping norm; 0 turns it off")
    clip_scope: Literal["segment", "global"] = Field("segment", description="norm per segment, or over all parameters")
    lora_r: int = Field(16, ge=1, le=4096, description="LoRA rank")
    lora_alpha: float = Field(32.0, gt=0, description="LoRA alpha; the branch is scaled by alpha / r")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the LoRA branch's input")
    lora_rslora: bool = Field(False, description="scale the branch by alpha / sqrt(r) (rank-stabilised LoRA)")
    lora_targets: tuple[str, ...] = Field(("all-linear",), description="all-linear, or e.g. q_proj,v_proj")
    data_format: (
        Literal["messages", "prompt-completion", "alpaca", "sharegpt", "text", "preference", "unpaired-preference"] | None
    ) = Field(None, description="form of the data rows (default: detected)")
    ignore_columns: tuple[str, ...] | None = Field(
        None, description="fields of rows and messages to leave out, e.g. chosen,notes"
    )
    columns: tuple[str, ...] | None = Field(
        None, description="our names of fields for the data's own, e.g. prompt=question,completion=answer"
    )
    chat_template: str | None = Field(None, description="Jinja file that replaces the tokenizer's chat template")
    think: Literal["keep", "strip", "last"] | None = Field(
        None, description="thoughts: keep all, strip all, or the last reply's only (default: as the template does)"
    )
    escape_special_tokens: bool = Field(False, description="encode control tokens typed in the data as plain text")
    eval_data: str | None = Field(None, description="held-out data in any of the forms of --data")
    eval_fraction: float = Field(0.0, ge=0, lt=1, description="share of the data held out for evaluation")
    eval_every: int | None = Field(None, ge=1, description="evaluate every N steps (default: before and after)")
    keep_best: bool = Field(False, description="save the adapter of the lowest evaluation loss, not the last one")
    patience: int | None = Field(
        None, ge=1, description="end the run after N evaluations in a row without a lower held-out loss"
    )
    retention_data: str | None = Field(None, description="other held-out text, to see what the run forgets")
    sample_prompt: str | None = Field(None, description="prompt to complete before and after the run")
    system: str | None = Field(None, description="system message before the sample prompt")
    init_adapter: str | None = Field(None, description="LoRA adapter folder to start from")
    cache_dir: str | None = Field(None, description="folder of quantised copies (default: ~/.cache/lopt-edge)")
    device: DeviceName = Field(AUTO, description="where to compute")
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype of the matrix products"
    )
    kernels: Literal["auto", "torch", "triton"] = Field(
        "auto", description="whose norms, rotary positions, gates and vocabulary softmax: torch's, or our own on a GPU"
    )
    deterministic: bool = Field(
        False, description="on a GPU: kernels that give the same bits each time (attention gets slower)"
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
    mlp_block: int | None = Field(
        None, ge=256, le=1 << 20, multiple_of=256, description="features of an MLP computed at a time (default: chosen)"
    )
    mlp_tile: int | None = Field(None, ge=16, le=65536, description="tokens of an MLP computed at a time (default: chosen)")
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
    track: tuple[str, ...] | None = Field(
        None, description="trackers: tensorboard, trackio, wandb, mlflow, ... (pip install 'lopt-edge[track]')"
    )
    memory_report: str | None = Field(None, description="write predicted and measured bytes per op: FILE.json, FILE.svg")
    force: bool = Field(False, description="start although nothing fits the budgets, which are then not held")
    dry_run: bool = Field(False, description="stop after the checks and the plan; train nothing")

    def __init__(self, **values: Any) -> None:
        """Check the settings. Raises InputErrors that name every mistake, a typo's setting among them."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise SettingsError(faults_of(error), type(self).model_fields) from None

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={getattr(self, name)!r}" for name in field_names() if name in self.model_fields_set)
        return f"Config({given})"

    __str__ = __repr__

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_method(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if "method" not in values and (meant := _meant_by(values)) is not None:
            values = {**values, "method": meant}
        if "lr" not in values and (objective := OBJECTIVES.get(str(values.get("objective")))) is not None:
            values = {**values, "lr": objective.rate}
        method = METHODS.get(values["method"]) if isinstance(values.get("method"), str) else None
        if method is None or values.get("boundary_layers"):
            return values
        return {**method.defaults, **values}

    @field_validator("*", mode="before")
    @classmethod
    def _no_yes_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and not may_be_bool(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError("must not be true or false")
        return value

    @field_validator("packing", mode="before")
    @classmethod
    def _auto_is_none(cls, value: Any) -> Any:
        return None if value == "auto" else value

    @field_validator("data", "eval_data", "retention_data", mode="before")
    @classmethod
    def _join_sources(cls, value: Any) -> Any:
        return ",".join(map(str, value)) if isinstance(value, list | tuple) else value

    @field_validator("columns", mode="before")
    @classmethod
    def _mapping_as_pairs(cls, value: Any) -> Any:
        return tuple(f"{ours}={theirs}" for ours, theirs in value.items()) if isinstance(value, dict) else value

    @field_validator("*", mode="before")
    @classmethod
    def _split_commas(cls, value: Any, info: ValidationInfo) -> Any:
        listed = "tuple" in str(cls.model_fields[str(info.field_name)].annotation)
        if listed and isinstance(value, str | int) and not isinstance(value, bool):
            return tuple(part.strip() for part in str(value).split(",") if part.strip())
        return value

    @field_validator("*")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if value == ():
            raise ValueError("must name at least one")
        return value

    @property
    def local_lr(self) -> float:
        """The local losses' peak learning rate: as given, or lr over what the method says (docs/methods.md: the study)."""
        return self.lr / METHODS[self.method].local_part if self.lr_local is None else self.lr_local

    @property
    def head_lr(self) -> float:
        """The aux heads' peak learning rate: as given, or lr. They are thrown away, so nothing is spoilt by a large one."""
        return self.lr if self.lr_head is None else self.lr_head

    def as_yaml(self) -> str:
        """The resolved settings as YAML, in the order of `field_names`."""
        values = self.model_dump(mode="json")
        return yaml.safe_dump({name: values[name] for name in field_names()}, sort_keys=False, allow_unicode=True)


def may_be_bool(annotation: Any) -> bool:
    """Whether a setting of this type is a switch (None: it is not said)."""
    return annotation is bool or bool in get_args(annotation)


def field_names() -> list[str]:
    """The settings in a reader's order: model, data, output and method, the methods' options, then the others."""
    own = list(Config.__annotations__)
    place = own.index("method") + 1
    return [*own[:place], *(name for name in Config.model_fields if name not in own), *own[place:]]


def _meant_by(values: Mapping[str, Any]) -> str | None:
    """The method that settings mean which only it gives a meaning, where none is named."""
    several = str(values.get("pipeline") or 1) != "1"
    for name, method in METHODS.items():
        if any(values.get(setting) for setting in method.meant_by) or (method.meant_by and several):
            return name
    return None


def page_folder(config: Config) -> Path:
    """The folder of page files: beside the output, or where the user says."""
    return Path(config.page_dir).expanduser() if config.page_dir else Path(f"{config.output}.pages")
