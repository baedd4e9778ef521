"""The same laws on a CUDA device. Marked `gpu`: run with `pytest -n 0 -m gpu tests/test_cuda.py` where there is one."""

from __future__ import annotations

import pytest
import torch

from tests.laws.bench import make_bench, random_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unpacking_equals_bitsandbytes(dtype):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from quant.nf4 import pack, unpack_into

    weight = torch.randn(256, 896, device="cuda", dtype=dtype)
    codes, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    ours = unpack_into(pack(weight), torch.empty_like(weight))
    torch.testing.assert_close(ours, dequantize_4bit(codes, state), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_equal_transformers(four_bit, family, dtype):
    from transformers import AutoModelForCausalLM

    from lopt_edge.run.step.losses import logits

    folder = four_bit(family, dtype=dtype)
    model = make_bench(folder, method="frozen", dtype=dtype, device="cuda").model
    ids = torch.randint(3, 320, (2, 24), device="cuda")
    with torch.no_grad():
        for layer in range(4):  # adapters off: their B is not zero here
            for module in model.layers[layer].modules():
                if hasattr(module, "lora_a"):
                    module.lora_a = module.lora_b = None
        hidden = model.embed(ids)
        frame = model.layer_context(hidden)
        for layer in range(4):
            hidden = model.run_layer(layer, hidden, frame)
        ours = logits(model, hidden.flatten(0, 1)).view(2, 24, -1)
        theirs = AutoModelForCausalLM.from_pretrained(folder, device_map="cuda")(ids).logits.float()
    assert (ours - theirs).norm() / theirs.norm() < (1e-4 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("method", ["lopt", "e2e"])
def test_gradients_equal_the_cpu(four_bit, method):
    folder = four_bit()
    on_cpu = make_bench(folder, method=method).gradients([random_batch((11, 7))])
    on_gpu = make_bench(folder, method=method, device="cuda").gradients([random_batch((11, 7), device="cuda")])
    for name, gradient in on_cpu.items():
        torch.testing.assert_close(on_gpu[name].cpu(), gradient, rtol=1e-3, atol=1e-5)


def test_float16_with_loss_scale_follows_float32(four_bit):
    folder = four_bit()
    reference = make_bench(folder, device="cuda").gradients([random_batch((11, 7), device="cuda")])
    bench = make_bench(folder, dtype=torch.float16, device="cuda")
    scaled = bench.gradients([random_batch((11, 7), device="cuda")])
    for name, gradient in reference.items():
        error = (scaled[name] / bench.executor.loss_scale - gradient).norm() / gradient.norm()
        assert error < 0.05, name


def test_the_device_is_proved():
    from lopt_edge.doctor.prove import prove

    found = list(prove(torch.device("cuda", torch.cuda.current_device())))
    assert all(proof.passed for proof in found), [proof for proof in found if not proof.passed]
