"""The settings in groups, as a person meets them: the panels of `finetune --help` and the tables of docs/settings.md.

The rule: every setting stands in one group, the few that a first run needs in the first one, methods last. A method's own
options are found by their owners, so a new method needs nothing here; a setting that no group names is shown under
`OTHERS`, which a test keeps empty. What a setting is and may be is settings.py's.
"""

from __future__ import annotations

from lopt_edge.config.settings import Config, field_names
from lopt_edge.objectives import ObjectiveOptions
from lopt_edge.plan.methods import owners_of

BASICS, METHODS_PANEL, OTHERS = "Basics", "Methods: how far the gradient reaches", "Others"
PANELS = {
    BASICS: ("model", "data", "output", "overwrite", "epochs", "max_steps", "max_seq_len", "lr", "eval_fraction",
             "sample_prompt", "device_memory", "dry_run"),
    "Training": ("batch_size", "grad_accum", "packing", "row_tokens", "choose_micro_batch", "schedule", "cycles",
                 "min_lr", "warmup_ratio", "weight_decay", "clip", "clip_scope", "optimizer", "seed", "device",
                 "compute_dtype", "kernels", "deterministic", "on_nan", "max_skipped",
                 "ranks"),
    "LoRA": ("lora_r", "lora_alpha", "lora_dropout", "lora_rslora", "lora_targets", "init_adapter"),
    "Model, data and evaluation": (
        "revision", "tokenizer", "cache_dir", "data_format", "columns", "ignore_columns", "chat_template", "think",
        "escape_special_tokens", "eval_data", "eval_every", "keep_best", "patience", "retention_data", "system"),
    "Preferences": tuple(ObjectiveOptions.model_fields),
    "Memory": ("host_memory", "disk_memory", "pinned_memory", "weights", "activations", "saved_inputs", "optimizer_states",
               "gradients", "apply", "prefetch", "token_tile", "mlp_block", "mlp_tile", "page_dir", "force"),
    "Checkpoints and reports": ("save_every", "save_minutes", "keep", "resume", "track", "memory_report", "push_to_hub"),
    METHODS_PANEL: ("method", "num_segments", "boundary_layers", "choose_segments", "lr_local", "lr_head", "local_weight",
                    "boundary_cache", "pipeline", "pipeline_minutes"),
}  # fmt: skip


def panel_of(name: str) -> str:
    """The group that a setting stands in; a method's own options have a group of their owners' names."""
    if owners := owners_of(name):
        return f"Method {', '.join(owners)}"
    return next((panel for panel, names in PANELS.items() if name in names), OTHERS)


def in_panels() -> list[tuple[str, list[str]]]:
    """The groups in the order in which they are shown, each with its settings."""
    found: dict[str, list[str]] = {panel: list(names) for panel, names in PANELS.items()}
    listed = {name for names in PANELS.values() for name in names}
    for name in field_names():
        if name not in listed:
            found.setdefault(panel_of(name), []).append(name)
    assert {name for names in found.values() for name in names} == set(Config.model_fields)
    return list(found.items())
