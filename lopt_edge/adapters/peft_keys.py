"""Every key of peft's LoraConfig with its default, as one version of peft writes them.

An adapter folder names all keys of the installed peft. To ask peft for them is to import it, and with it bitsandbytes and
torch's compiler: 3 s of a core and 50 MiB at the end of each run, for a table that changes once a release. So the table of
the version that the tests run with is here, and a test compares it with that peft; any other version is asked itself
(lopt_edge/adapters/save.py).

Not here: what the keys mean when an adapter is read (lopt_edge/run/model/adapter_config.py).
"""

from __future__ import annotations

from typing import Any

PEFT_VERSION = "0.21.0"
KEYS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": False,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": PEFT_VERSION,
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": None,
    "target_parameters": None,
    "task_type": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}
