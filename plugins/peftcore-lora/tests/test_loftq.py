"""LoftQ's start: the best low-rank part of what any 4-bit format loses, on the base as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peftcore_lora import loftq_start
from support.quantized import INPUTS, llama, logits
from support.tiny import gpt2

import peftcore
from peftcore.plugin import other_adapter


@pytest.mark.parametrize("quant_type", ["nf4", "mxfp4", "nvfp4", "affine4"])
def test_the_start_is_the_best_of_its_rank(quant_type: str) -> None:
    dense, model = llama(num_hidden_layers=1), llama(num_hidden_layers=1)
    peftcore.quantize(model, quant_type, **({"blocksize": 32} if quant_type == "affine4" else {}))
    plain = logits(model)
    peftcore.apply(model, "lora", r=4, lora_alpha=12)
    residuals = loftq_start(model, dense)
    for name in ("self_attn.k_proj", "mlp.up_proj", "mlp.down_proj"):
        path = f"model.layers.0.{name}"
        layer, adapter = model.get_submodule(path), other_adapter(model, "default").modules[path]
        error = dense.get_submodule(path).weight.detach() - layer.dequantized(torch.float32)
        u, values, vh = torch.linalg.svd(error)
        change = 3 * adapter.lora_B @ adapter.lora_A  # lora_alpha / r
        torch.testing.assert_close(change, u[:, :4] * values[:4] @ vh[:4], rtol=1e-3, atol=1e-5)
        assert residuals[path] == pytest.approx(
            (values[4:].square().sum() / values.square().sum()).sqrt().item(), rel=1e-3
        )
    target = logits(dense)
    assert (logits(model) - target).norm() < 0.9 * (plain - target).norm()


def test_it_is_saved_and_trains(tmp_path: Path) -> None:
    model = peftcore.quantize(llama(num_hidden_layers=1), "mxfp4")
    peftcore.apply(model, "lora", r=4)
    loftq_start(model, llama(num_hidden_layers=1).state_dict())
    model(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    peftcore.save(model, tmp_path)
    reloaded = peftcore.load(peftcore.quantize(llama(num_hidden_layers=1), "mxfp4"), tmp_path)
    assert torch.equal(logits(reloaded), logits(model))


def test_conv1d_from_a_state_dict() -> None:
    model = peftcore.quantize(gpt2(), "nf4")
    peftcore.apply(model, "lora", r=4, target_modules=["c_fc"])
    residuals, other_model = loftq_start(model, gpt2().state_dict()), peftcore.quantize(gpt2(), "nf4")
    peftcore.apply(other_model, "lora", r=4, target_modules=["c_fc"])
    assert residuals == loftq_start(other_model, gpt2()) and all(0 < share < 1 for share in residuals.values())


def test_what_is_refused() -> None:
    model = peftcore.quantize(llama(num_hidden_layers=1), "mxfp4")
    with pytest.raises(peftcore.PeftcoreError, match="no adapter 'default'"):
        loftq_start(model, {})
    peftcore.apply(model, "lora", r=2, target_modules=["q_proj"])
    dense = llama(num_hidden_layers=1).state_dict()
    with pytest.raises(peftcore.PeftcoreError, match=r"dense weights lack 'model.layers.0.self_attn.q_proj.weight'"):
        loftq_start(model, {"lm_head.weight": dense["lm_head.weight"]})
    with pytest.raises(peftcore.PeftcoreError, match=r"q_proj.weight' has shape \[3, 3\], but the layer needs"):
        loftq_start(model, {"model.layers.0.self_attn.q_proj.weight": torch.ones(3, 3)})
    with pytest.raises(peftcore.PeftcoreError, match="have the dense weights"):
        loftq_start(model, model)
    loftq_start(model, dense)
    with pytest.raises(peftcore.PeftcoreError, match=r"'default' has been trained: B at '.*q_proj' is not zero"):
        loftq_start(model, dense)
    pissa_model = llama(num_hidden_layers=1)
    peftcore.apply(pissa_model, "lora", init_lora_weights="pissa", target_modules=["q_proj"])
    with pytest.raises(peftcore.PeftcoreError, match=r"needs LoRA on linear layers, and adapter 'default' .lora. has"):
        loftq_start(pissa_model, dense)
