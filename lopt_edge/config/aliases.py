"""What other tools call our settings, so that who comes from one is understood or told.

Two tables. `ALIASES`: names that mean exactly one of ours, so they are read as it, in YAML and as flags (an alias beside
the setting itself is refused: which of the two was meant?). `ADVICE`: names that mean nothing here, or not quite the same;
they are refused with what to write instead. A name in neither table gets the nearest known one (load.py). A test holds
that no name here is one of our own.

The names are those of transformers' TrainingArguments, peft, TRL, Axolotl, LLaMA-Factory, Unsloth and mlx-lm.
"""

from __future__ import annotations

ALIASES = {
    "model_name_or_path": "model", "base_model": "model", "model_name": "model", "model_id": "model",
    "train_file": "data", "train_data": "data", "dataset_path": "data",
    "output_dir": "output", "adapter_path": "output",
    "overwrite_output_dir": "overwrite",
    "model_revision": "revision", "base_model_revision": "revision",
    "learning_rate": "lr",
    "lr_scheduler_type": "schedule", "lr_scheduler": "schedule",
    "max_grad_norm": "clip",
    "num_train_epochs": "epochs", "num_epochs": "epochs", "n_epochs": "epochs",
    "iters": "max_steps", "num_steps": "max_steps",
    "gradient_accumulation_steps": "grad_accum", "grad_accumulation_steps": "grad_accum",
    "per_device_train_batch_size": "batch_size", "micro_batch_size": "batch_size",
    "max_seq_length": "max_seq_len", "max_length": "max_seq_len", "sequence_len": "max_seq_len",
    "cutoff_len": "max_seq_len",
    "lora_rank": "lora_r", "rank": "lora_r",
    "lora_target": "lora_targets", "lora_target_modules": "lora_targets", "target_modules": "lora_targets",
    "sample_packing": "packing", "pack_sequences": "packing",
    "val_size": "eval_fraction",
    "eval_steps": "eval_every",
    "save_steps": "save_every", "save_total_limit": "keep",
    "random_seed": "seed",
    "resume_from_checkpoint": "resume",
    "load_best_model_at_end": "keep_best",
    "use_rslora": "lora_rslora", "peft_use_rslora": "lora_rslora",
    "cosine_cycles": "cycles",
    "report_to": "track",
    "early_stopping_patience": "patience",
    "rl": "objective",
    "rl_beta": "beta", "dpo_beta": "beta", "pref_beta": "beta",
    "orpo_alpha": "orpo_lambda",
    "kto_desirable_weight": "desirable_weight", "kto_undesirable_weight": "undesirable_weight",
}  # fmt: skip

ALWAYS_QLORA = "leave it out: the base is always in 4 bits, and a LoRA adapter is what is trained"
THE_PLANNER = "leave it out: the planner chooses what is kept, recomputed or moved (--activations, --weights say it)"
THE_DTYPE = "use compute_dtype (float32, bfloat16, float16; auto takes the best that the device has)"
ADVICE = {
    "train": "leave it out: finetune always trains; lopt-edge plan or --dry-run do not",
    "do_train": "leave it out: finetune always trains",
    "do_eval": "leave it out: eval_data or eval_fraction say that there is an evaluation",
    "evaluation_strategy": "use eval_every N (evaluation before and after is the default)",
    "eval_strategy": "use eval_every N (evaluation before and after is the default)",
    "save_strategy": "use save_every N or save_minutes M",
    "dataset": "use data with a file or a hub data set (org/name)",
    "dataset_name": "use data with a file or a hub data set (org/name)",
    "datasets": "use data with a list of files or hub data sets",
    "test_datasets": "use eval_data",
    "val_set_size": "use eval_fraction, a share such as 0.05",
    "template": "leave it out: the tokenizer's own is used; chat_template names a Jinja file instead",
    "load_in_4bit": ALWAYS_QLORA, "load_in_8bit": ALWAYS_QLORA, "quantization_bit": ALWAYS_QLORA,
    "quantization_method": ALWAYS_QLORA, "adapter": ALWAYS_QLORA, "finetuning_type": ALWAYS_QLORA,
    "fine_tune_type": ALWAYS_QLORA, "full_finetuning": ALWAYS_QLORA, "use_peft": ALWAYS_QLORA,
    "stage": "leave it out for supervised fine-tuning; use objective dpo, orpo, simpo or kto for preferences",
    "pref_loss": "use objective: dpo is the sigmoid loss, orpo and simpo are their own",
    "gradient_checkpointing": THE_PLANNER, "grad_checkpoint": THE_PLANNER, "use_gradient_checkpointing": THE_PLANNER,
    "deepspeed": THE_PLANNER, "fsdp": THE_PLANNER,
    "flash_attention": "leave it out: torch takes the best attention kernel that the device has",
    "flash_attn": "leave it out: torch takes the best attention kernel that the device has",
    "bf16": THE_DTYPE, "fp16": THE_DTYPE, "tf32": THE_DTYPE, "dtype": THE_DTYPE, "torch_dtype": THE_DTYPE,
    "warmup_steps": "use warmup_ratio, the share of the steps that warm up",
    "optim": "use optimizer (adamw or adamw8bit)",
    "num_layers": "use method top-layers with its number of layers",
    "lora_modules_to_save": "there is none: all that is trained is the adapter",
    "special_tokens": "there is none: the tokenizer stays as it is",
    "train_on_inputs": "leave it out: only replies are learned; of rows in the text form every token is",
    "wandb_project": "use track wandb; its environment variables name project and account",
    "logging_steps": "leave it out: every step is logged",
}  # fmt: skip
