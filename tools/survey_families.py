"""Which causal language models of the installed transformers run here without a record, and why the others do not.

Each model type that transformers has a causal language model for and lopt-edge no record of is tried as a user's model
would be, on a tiny config with its own defaults: its parts are found, a tiny model is proved (tracing/proof.py), its
layers are traced (tracing/unlisted.py). What comes out is docs/families.md's two lists.

    python tools/survey_families.py            prints them (five minutes of a core); --families a,b: these alone
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
from typing import Any

GROUPS = (  # a reason as docs have it, and what a message says
    (
        "experts in another form than two stacks of matrices",
        r"no linear layer, and would stay unpacked|tensor '[^']*experts[^']*' is missing",
    ),
    ("a state over the tokens, in chunks or steps: not planned", r"depends on the number of tokens"),
    ("a matrix used past its linear layer", r"PackedWeight"),
    ("matrices that are Conv1Ds", r"Conv1D"),
    ("a bias in the head", r"its head has a bias"),
    ("no single list of decoder layers", r"no single list|no norm behind"),
    ("two linear layers of one name in a layer", r"two linear layers of the name"),
    ("linear layers outside of the list", r"is a linear layer outside"),
    ("tensors that checkpoints call otherwise", r"is missing"),
    ("transformers' own defaults of it make no model", r"cannot build|no tiny model"),
)


def config_of(name: str) -> Any:
    """The default config of a model type, with what some of them leave to their published configs."""
    from transformers import AutoConfig

    types = {"layer_types": ["conv", "full_attention"] * 16} if name == "lfm2_moe" else {}
    config, more = AutoConfig.for_model(name, **types), {}
    known = config.to_dict()
    if "num_key_value_heads" in known and known["num_key_value_heads"] is None:
        more["num_key_value_heads"] = config.num_attention_heads
    if "head_dim" in known and known["head_dim"] is None:
        more["head_dim"] = config.hidden_size // config.num_attention_heads
    if name in ("lfm2", "lfm2_moe"):
        more["layer_types"] = (["conv", "full_attention"] * config.num_hidden_layers)[: config.num_hidden_layers]
    return AutoConfig.for_model(name, **more) if more else config


def outcome(name: str) -> str:
    """What came of a model type: "" where it runs, else the message."""
    from lopt_edge.models.tiny import smaller
    from lopt_edge.models.unlisted import read_facts
    from lopt_edge.planning.unlisted import make_ready

    try:
        config = config_of(name)
        if type(getattr(config, "num_hidden_layers", None)) is not int:
            return "no single list of decoder layers"
        tiny = smaller(config, n_layers=min(6, config.num_hidden_layers))
        facts = read_facts(json.loads(json.dumps(tiny.to_dict(), default=str)), where="config.json")
        make_ready(facts, itemsize=4, targets=facts.linear_names, where="config.json")
    except Exception as error:  # of any kind, from code that is not ours: that is what is asked
        return " ".join(str(error).split()) or type(error).__name__
    return ""


def group_of(message: str) -> str:
    """The reason as docs have it; the message itself where no group has it."""
    named = next((group for group, pattern in GROUPS if re.search(pattern, message)), "")
    if found := re.search(r"differ from transformers' by|differs from autograd's", message):
        return "another result than transformers': " + {"differ": "logits"}.get(found[0].split()[0], "gradients")
    return named or re.sub(r"^config.json: |-> .*$", "", message)[:160]


def main() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES
    from transformers.utils import logging

    from lopt_edge.plan.facts.families import FAMILIES, WRAPPERS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default="", help="which to try (default: all that have no record)")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    wanted = options.families.split(",") if options.families else [n for n in NAMES if n not in {*FAMILIES, *WRAPPERS}]
    passed, refused = [], dict[str, list[str]]()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["LOPT_EDGE_CACHE"] = cache
        for name in sorted(wanted):
            message = outcome(name)
            print(f"# {name}: {message[:300] or 'runs'}", flush=True)
            if message:
                refused.setdefault(group_of(message), []).append(name)
            else:
                passed.append(name)
    print(f"\n{len(passed)} of {len(wanted)} run: {', '.join(passed)}.\n")
    print("| reason | model types |\n|---|---|")
    for reason, names in sorted(refused.items(), key=lambda pair: -len(pair[1])):
        print(f"| {reason} | {', '.join(names)} |")


if __name__ == "__main__":
    main()
