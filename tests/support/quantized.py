"""Tiny models whose rows are whole blocks, which bitsandbytes needs on CPU, and bitsandbytes' copies of them."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes as bnb

INPUTS = {"input_ids": torch.arange(3, 21).view(2, 9), "attention_mask": torch.ones(2, 9, dtype=torch.long)}


def llama(dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> nn.Module:
    """A Llama of 2 layers, hidden size 64, with an output head that is not tied."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **changes})).to(dtype).eval()


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    special = {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "attn_pdrop": 0,
        "embd_pdrop": 0,
        "resid_pdrop": 0,
    }
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64, **special)).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**INPUTS).logits


def of_bnb(layer: nn.Linear, **keywords: Any) -> nn.Module:
    """The layer as bitsandbytes quantizes it. In training mode: in evaluation it repacks its weight."""
    keywords = {"quant_type": "nf4", "compress_statistics": True, **keywords}
    other = bnb.nn.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, **keywords)
    other.load_state_dict(layer.state_dict())
    return other.to(layer.weight.dtype).to("cpu").train()


def moved(found: torch.nn.Module) -> torch.nn.Module:
    """With other values in all that trains."""
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return found
