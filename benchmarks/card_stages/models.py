"""Models of the shape of a Llama of 1.1 B parameters, with random weights: with our LoRA, with peft's, in 4 bits."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda"
SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            return LlamaForCausalLM(LlamaConfig(**SIZES))
    finally:
        torch.set_default_dtype(torch.float32)


def with_lora(kind: str) -> Any:
    """Return a model by its label.

    Labels are `frozen`, `peft LoRA`, `peftcore LoRA` and `peftcore QLoRA`; those of peftcore may end with `, fused`.
    """
    model = llama()
    if kind == "frozen":
        return model.requires_grad_(False)
    if kind.startswith("peft "):
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS))
    import peftcore
    from peftcore.plugin import register

    if "lora" not in peftcore.methods():  # not installed: from the checkout
        sys.path.append(str(ROOT / "plugins" / "peftcore-lora"))
        register("lora", importlib.import_module("peftcore_lora"), distribution="peftcore-lora", version="0.1.0")
    if "QLoRA" in kind:
        peftcore.quantize(model, "nf4")
    peftcore.apply(model, "lora", r=16, lora_alpha=32, target_modules=TARGETS)
    if kind.endswith(", fused"):
        peftcore.fuse(model)
    return model
