"""A process of its own in which transformers reads a merged folder: what another program will make of it.

Standard input has one JSON object: folder, dtype, rows of token ids. Standard output gets the fp32 logits of each row, raw.
The rule: if memory runs short, the kernel ends this process, not the export that asked.
"""

from __future__ import annotations

import json
import sys

from lopt_edge.system.expendable import answer_stream


def main() -> None:
    """Load, run, write."""
    request = json.load(sys.stdin)
    answer = answer_stream()
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]
    dtype = getattr(torch, request["dtype"])
    config = AutoConfig.from_pretrained(request["folder"], trust_remote_code=False)
    is_text = type(config) in AutoModelForCausalLM._model_mapping
    kind = AutoModelForCausalLM if is_text else AutoModelForImageTextToText
    model = kind.from_pretrained(request["folder"], dtype=dtype, trust_remote_code=False)
    model.train(False)
    with torch.no_grad(), answer:
        for row in request["rows"]:
            logits_TV = model(torch.tensor([row]), use_cache=False).logits[0].float().contiguous()
            answer.write(logits_TV.view(-1).numpy().data)
            answer.flush()


if __name__ == "__main__":
    main()
