"""A process of its own in which transformers writes a merged folder as a graph, and that graph's runtime reads it back.

Standard input has one JSON object: folder, target, runtime, rows of token ids. Standard output gets one: the norm of the
logits and of their difference, and how many top tokens agree, over all rows. The graph takes token ids, their positions and
a cache of keys and values (in OpenVINO a state of the graph), so it reads a prompt and goes on token by token; number of
sequences and of tokens are free. The rule: what is compared is the file that was written, opened by its runtime, with a
cache that holds a beginning. If memory runs short, the kernel ends this process, not the export that asked.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from lopt_edge.system.expendable import answer_stream

SAMPLE_TOKENS = 8  # of the two rows that are traced


def main() -> None:
    """Load, trace, write, open, compare."""
    request = json.load(sys.stdin)
    answer = answer_stream()
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.exporters.utils import decompose_for_generation
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()  # type: ignore[no-untyped-call]
    set_verbosity_error()  # type: ignore[no-untyped-call]
    # half precision is kept by OpenVINO, and what one runtime cannot compute in is no gain
    dtype = torch.float32 if request["runtime"] == "onnx" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(request["folder"], dtype=dtype, trust_remote_code=False)
    model.train(False)
    sample_BT = torch.tensor([request["rows"][0][:SAMPLE_TOKENS]] * 2)
    inputs = {"input_ids": sample_BT, "attention_mask": torch.ones_like(sample_BT)}
    traced, given = decompose_for_generation(model, inputs, multi_token_decode=True)["decode"]
    write, read = _RUNTIMES[request["runtime"]]
    write(traced, given, request["target"])
    logits_of = read(request["target"])
    model.float()  # type: ignore[no-untyped-call]
    error = size = same = n_tokens = 0.0
    with torch.no_grad():
        for row in request["rows"]:
            ids_BT = torch.tensor([row])
            want_BTV = model(ids_BT, use_cache=False).logits.float()
            cut = len(row) // 2
            begun = model(ids_BT[:, :cut], use_cache=True).past_key_values
            found_BTV = logits_of(ids_BT, cut, begun).float()
            want_BTV = want_BTV[:, -found_BTV.shape[1] :]
            error += float((found_BTV - want_BTV).double().square().sum())
            size += float(want_BTV.double().square().sum())
            same += float((found_BTV.argmax(-1) == want_BTV.argmax(-1)).sum())
            n_tokens += found_BTV.shape[1]
    with answer:
        found = {"error": error**0.5, "size": size**0.5, "same": same, "n_tokens": n_tokens}
        answer.write(json.dumps(found).encode())


def _write_onnx(model: Any, inputs: Any, target: str) -> None:
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    exporter = OnnxExporter()  # type: ignore[no-untyped-call]
    exporter.export(model, inputs, OnnxConfig(dynamic=True)).save_pretrained(target)


def _read_onnx(target: str) -> Callable[..., Any]:
    """The logits of a row's later tokens, the cache of the earlier ones given."""
    import torch
    from transformers.exporters.base import ExportedModel

    exported = ExportedModel.from_pretrained(target)

    def logits_of(ids_BT: Any, cut: int, begun: Any) -> Any:
        positions_BT = torch.arange(cut, ids_BT.shape[1])[None]
        mask_BT = torch.ones_like(ids_BT)
        given = {"input_ids": ids_BT[:, cut:], "position_ids": positions_BT, "attention_mask": mask_BT}
        return exported(**given, past_key_values=begun).logits

    return logits_of


def _write_openvino(model: Any, inputs: Any, target: str) -> None:
    from transformers.exporters.configs import OpenVINOConfig
    from transformers.exporters.exporter_openvino import OpenVINOExporter

    exporter = OpenVINOExporter()  # type: ignore[no-untyped-call]
    exporter.export(model, inputs, OpenVINOConfig(dynamic=True)).save_pretrained(target)


def _read_openvino(target: str) -> Callable[..., Any]:
    """The logits of all tokens of a row, which goes through the graph's state in two calls."""
    import openvino
    import torch

    precise = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.compile_model(f"{target}/openvino_model.xml", "CPU", precise)
    names = {name for port in compiled.inputs for name in port.get_names()}
    request = compiled.create_infer_request()

    def logits_of(ids_BT: Any, cut: int, begun: Any) -> Any:
        request.reset_state()
        found = []
        for first, last in ((0, cut), (cut, ids_BT.shape[1])):
            given = {
                "input_ids": ids_BT[:, first:last],
                "position_ids": torch.arange(first, last)[None],
                "attention_mask": torch.ones_like(ids_BT[:, :last]),
                "beam_idx": torch.zeros(1, dtype=torch.int32),
            }
            answers = request.infer({name: tensor.numpy() for name, tensor in given.items() if name in names})
            found.append(torch.from_numpy(answers["logits"].copy()))
        return torch.cat(found, dim=1)

    return logits_of


_RUNTIMES = {"onnx": (_write_onnx, _read_onnx), "openvino": (_write_openvino, _read_openvino)}


if __name__ == "__main__":
    main()
