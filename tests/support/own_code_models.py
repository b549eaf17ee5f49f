"""Tiny models whose classes are code in their own folders, with the names of modules of those that people fine-tune."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from support.commands import SPECIAL, WORDS, save_tokenizer

_ATTENTION = """
import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

def attended(q, k, v, heads, mask):
    def split(x):
        return x.unflatten(-1, (-1, q.shape[-1] // heads)).transpose(1, 2)
    found = nn.functional.scaled_dot_product_attention(split(q), split(k), split(v), attn_mask=mask, enable_gqa=True)
    return found.transpose(1, 2).flatten(2)

def past(x, attention_mask):
    length = x.shape[1]
    itself = torch.eye(length, dtype=torch.bool, device=x.device)
    before = torch.ones_like(itself).tril()[None, None]
    return before if attention_mask is None else before & (itself | attention_mask[:, None, None].bool())
"""
_REPLIT = """
from .configuration import ReplitLMConfig

class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.n_heads
        self.Wqkv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.out_proj = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x, mask):
        return self.out_proj(attended(*self.Wqkv(x).chunk(3, -1), self.heads, mask))

class GPTMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.mlp_up = nn.Linear(config.d_model, config.mlp_ratio * config.d_model, bias=False)
        self.mlp_act = nn.GELU()
        self.mlp_down = nn.Linear(config.mlp_ratio * config.d_model, config.d_model, bias=False)

    def forward(self, x):
        return self.mlp_down(self.mlp_act(self.mlp_up(x)))

class GPTBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(config.d_model), nn.LayerNorm(config.d_model)
        self.attn, self.mlp = Attention(config), GPTMLP(config)

    def forward(self, x, mask):
        x = x + self.attn(self.norm_1(x), mask)
        return x + self.mlp(self.norm_2(x))

class ReplitLM(PreTrainedModel):
    config_class = ReplitLMConfig
    main_input_name = "input_ids"

    def __init__(self, config):
        super().__init__(config)
        blocks = nn.ModuleList([GPTBlock(config) for _ in range(config.n_layers)])
        words, norm = nn.Embedding(config.vocab_size, config.d_model), nn.LayerNorm(config.d_model)
        self.transformer = nn.ModuleDict({"wte": words, "blocks": blocks, "ln_f": norm})
        self.post_init()

    def forward(self, input_ids, past_key_values=None, attention_mask=None, return_dict=None, use_cache=None):
        x = self.transformer.wte(input_ids)
        mask, length = past(x, attention_mask), x.shape[1]
        steps = torch.arange(length, device=x.device, dtype=x.dtype)
        slopes = 2.0 ** -torch.arange(1, self.config.n_heads + 1, device=x.device, dtype=x.dtype)[:, None, None]
        mask = (slopes * (steps - steps[:, None]).clamp(max=0)).masked_fill(~mask, torch.finfo(x.dtype).min)
        for block in self.transformer.blocks:
            x = block(x, mask)
        return CausalLMOutput(logits=nn.functional.linear(self.transformer.ln_f(x), self.transformer.wte.weight))
"""
_DBRX = """
from .configuration import DbrxConfig

class DbrxAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.n_heads
        shared = config.d_model // config.n_heads * config.attn_config["kv_n_heads"]
        self.q_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.k_proj = nn.Linear(config.d_model, shared, bias=False)
        self.v_proj = nn.Linear(config.d_model, shared, bias=False)
        self.out_proj = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x, mask):
        return self.out_proj(attended(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, mask))

class DbrxNormAttentionNorm(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(config.d_model), nn.LayerNorm(config.d_model)
        self.attn = DbrxAttention(config)

    def forward(self, x, mask):
        x = x + self.attn(self.norm_1(x), mask)
        return x, self.norm_2(x)

class DbrxRouter(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layer = nn.Linear(config.d_model, config.ffn_config["moe_num_experts"], bias=False)

    def forward(self, x):
        return self.layer(x).softmax(-1)

class DbrxMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        size = config.ffn_config["ffn_hidden_size"]
        self.w1, self.v1 = nn.Linear(config.d_model, size, bias=False), nn.Linear(config.d_model, size, bias=False)
        self.w2 = nn.Linear(size, config.d_model, bias=False)

    def forward(self, x):
        return self.w2(nn.functional.silu(self.w1(x)) * self.v1(x))

class DbrxExperts(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.mlp = nn.ModuleList([DbrxMLP(config) for _ in range(config.ffn_config["moe_num_experts"])])

    def forward(self, x, weights, chosen):
        shares = torch.zeros(*x.shape[:-1], len(self.mlp), dtype=x.dtype, device=x.device)
        shares = shares.scatter(-1, chosen, weights)
        return sum(shares[..., i : i + 1] * expert(x) for i, expert in enumerate(self.mlp))

class DbrxFFN(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.count = config.ffn_config["moe_top_k"]
        self.router, self.experts = DbrxRouter(config), DbrxExperts(config)

    def forward(self, x):
        return self.experts(x, *self.router(x).topk(self.count, -1))

class DbrxBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm_attn_norm, self.ffn = DbrxNormAttentionNorm(config), DbrxFFN(config)

    def forward(self, x, mask):
        x, normed = self.norm_attn_norm(x, mask)
        return x + self.ffn(normed)

class DbrxModel(PreTrainedModel):
    config_class = DbrxConfig

    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList([DbrxBlock(config) for _ in range(config.n_layers)])
        self.norm_f = nn.LayerNorm(config.d_model)
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        x = self.wte(input_ids)
        mask = past(x, attention_mask)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm_f(x)

class DbrxForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = DbrxConfig
    base_model_prefix = "transformer"

    def __init__(self, config):
        super().__init__(config)
        self.transformer = DbrxModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.transformer.wte

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        logits = self.lm_head(self.transformer(input_ids, attention_mask))
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)
"""
_CONFIG = """
from transformers import PretrainedConfig

class {name}(PretrainedConfig):
    model_type = "{model_type}"
    attribute_map = {{"hidden_size": "d_model", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}}

    def __init__(self, **kwargs):
        for key in {keys}:
            setattr(self, key, kwargs.pop(key, None))
        super().__init__(**kwargs)
"""
_SIZES: dict[str, Any] = {"d_model": 32, "n_heads": 4, "n_layers": 2}


def replit(folder: Path) -> None:
    """Save a model with the modules of replit-code-v1-3b of May 2023, which takes no labels and computes no loss."""
    _write(folder, "replit_lm", "ReplitLMConfig", "ReplitLM", _REPLIT, {**_SIZES, "mlp_ratio": 2})


def dbrx(folder: Path) -> None:
    """Save a model with the modules of a DBRX of which layers were made: projections, and experts one by one."""
    parts = {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 500000},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4},
    }
    parts["ffn_config"]["moe_top_k"] = 2
    _write(folder, "dbrx", "DbrxConfig", "DbrxForCausalLM", _DBRX, {**_SIZES, **parts})


def _write(folder: Path, model_type: str, config: str, model: str, code: str, sizes: dict[str, Any]) -> None:
    """Write a model with random weights, its code, and a tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir()
    save_tokenizer(folder)
    keys = (*sizes, "vocab_size")
    (folder / "configuration.py").write_text(_CONFIG.format(name=config, model_type=model_type, keys=keys))
    (folder / "modeling.py").write_text(_ATTENTION + code)
    classes = {"AutoConfig": f"configuration.{config}", "AutoModelForCausalLM": f"modeling.{model}"}
    described: dict[str, Any] = {"model_type": model_type, "auto_map": classes, "architectures": [model]}
    described |= {**sizes, "vocab_size": len(SPECIAL + WORDS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps({**described, "tie_word_embeddings": False}))
    torch.manual_seed(0)
    found = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    AutoModelForCausalLM.from_config(found, trust_remote_code=True).save_pretrained(folder)


KINDS = {"replit": replit, "dbrx": dbrx}
