"""Gradients through layers of bitsandbytes, which pack their weight for a kernel without a derivative."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.quantized import INPUTS, llama, logits, moved, of_bnb
from torch import nn

import peftcore


def with_bnb(attention: str = "self_attn") -> tuple[nn.Module, list[Any]]:
    """A Llama whose attention consists of layers of bitsandbytes, in eval mode, and these layers."""
    model = llama()
    layers = []
    for path, module in list(model.named_modules()):
        if attention in path and isinstance(module, nn.Linear):
            layer: Any = of_bnb(module)
            layer.requires_grad_(False)
            layers.append(layer)
            model.set_submodule(path, layer)
    return model.eval(), layers


def gradients(model: nn.Module) -> list[Any]:
    model.train()
    model(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
    return [p.grad.norm().item() for p in model.parameters() if p.requires_grad]


def test_layers_of_bitsandbytes_keep_their_gradients_after_evaluation() -> None:
    wanted, _ = with_bnb()
    model, layers = with_bnb()
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True  # as bitsandbytes finds it on such a processor
    for each in (wanted, model):
        torch.manual_seed(1)
        moved(peftcore.apply(each, "lora", r=4, target_modules=["q_proj", "o_proj"]))
    logits(model.eval())
    found = gradients(model)
    assert found == gradients(wanted) and min(found) > 0


def test_layers_of_bitsandbytes_that_are_packed_already_are_refused() -> None:
    model, layers = with_bnb()
    if not layers[0].support_avx512bf16_for_cpu:
        pytest.skip("this processor has no AVX512-BF16")
    before = logits(model)
    with pytest.raises(peftcore.PeftcoreError, match=r"learn nothing.*Before apply, call peftcore.quantize\(model\)"):
        peftcore.apply(model, "lora", r=4)
    peftcore.apply(peftcore.quantize(model, skip=["mlp", "lm_head"]), "lora", r=4)
    assert (logits(model) - before).norm() < 0.02 * before.norm()  # the kernel of bitsandbytes rounds to bfloat16
    assert min(gradients(model)[1::2]) > 0
