"""`target_parameters`: experts and others, beside PEFT both ways, merged, of older files; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from support import tiny
from support.against_peft import both_ways, logits
from torch import nn

import peftcore
from peftcore.plugin import disturb

SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MOE = {**SIZES, "num_key_value_heads": 2, "num_experts_per_tok": 2}


def mixtral(inner: int = 24) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**MOE, num_local_experts=4, intermediate_size=inner)).eval()


def qwen3_moe() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes = {"num_experts": 4, "intermediate_size": 48, "moe_intermediate_size": 24, "head_dim": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**MOE, **sizes)).eval()


def gpt_oss() -> nn.Module:
    """Experts `[experts, in, out]`."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    return GptOssForCausalLM(GptOssConfig(**MOE, num_local_experts=4, intermediate_size=24, head_dim=8)).eval()


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "mixtral": (mixtral, {"target_parameters": EXPERTS, "target_modules": ["q_proj"]}),
    "qwen3_moe": (qwen3_moe, {"target_parameters": EXPERTS[::-1], "target_modules": ["q_proj"], "use_rslora": True}),
    "gpt_oss": (gpt_oss, {"target_parameters": EXPERTS, "target_modules": ["q_proj"]}),
    "one of two": (mixtral, {"target_parameters": ["layers.1.mlp.experts.down_proj"], "target_modules": []}),
    "a router": (qwen3_moe, {"target_parameters": ["gate.weight"], "target_modules": []}),
    "layers": (
        tiny.llama,
        {
            "target_parameters": ["q_proj.weight"],
            "target_modules": ["v_proj"],
            "rank_pattern": {"layers.0.self_attn.q_proj.weight": 3},
            "alpha_pattern": {"q_proj.weight": 5},
        },
    ),
}


@pytest.mark.parametrize("case", list(CASES))
def test_against_peft_and_merged(case: str, tmp_path: Path) -> None:
    make, fields = CASES[case]
    model = peftcore.apply(make(), "lora", r=2, **fields)
    both_ways(make, tmp_path, model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, **fields))
    acting = logits(model)
    peftcore.merge(model, undo=True)
    torch.testing.assert_close(logits(model), acting, rtol=0, atol=1e-5)
    peftcore.unmerge(model)
    assert torch.equal(logits(model), acting)


@pytest.mark.parametrize("inner", [24, 16], ids=["by shapes", "by version"])
def test_older_files(inner: int, tmp_path: Path) -> None:
    """Up to 0.18 PEFT took [experts, out, in] for [experts, in, out]: its A is today's B."""
    fields = {"target_parameters": EXPERTS[:1], "target_modules": []}
    model = peftcore.apply(mixtral(inner), "lora", r=3, **fields)
    disturb(model, "default", seed=1)
    peftcore.save(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    old = {}
    for name, tensor in safetensors.torch.load_file(file).items():
        experts_last = tensor.view(-1, 3, 4) if "lora_B" in name else tensor.view(4, 3, -1)
        swapped = experts_last.permute(2, 1, 0).contiguous()
        other = name.replace("lora_A", "lora_X").replace("lora_B", "lora_A").replace("lora_X", "lora_B")
        old[other] = swapped.reshape(12, -1) if "lora_B" in name else swapped.reshape(-1, 12)
    safetensors.torch.save_file(old, file, {"format": "pt"})
    tiny.without_hash(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "peft_version": "0.18.1"}))
    assert torch.equal(logits(peftcore.load(mixtral(inner), tmp_path)), logits(model))


def test_experts_with_dropout_and_two_adapters() -> None:
    """Their factors join the products: with a seed the same, without dropout what the merged weights compute."""
    fields = {"target_parameters": EXPERTS, "target_modules": [], "lora_dropout": 0.5}
    model = peftcore.apply(mixtral(), "lora", r=2, **fields)
    peftcore.apply(model, "lora", adapter="other", r=3, **{**fields, "lora_dropout": 0.1})
    for name in ("default", "other"):
        disturb(model, name, seed=1)
    peftcore.activate(model, ["default", "other"])
    acting = logits(model)
    model.train()
    first, second, other = (torch.manual_seed(seed) and logits(model) for seed in (0, 0, 1))
    assert torch.equal(first, second) and not torch.equal(first, other)
    peftcore.merge(model, undo=True)
    torch.testing.assert_close(logits(model), acting, rtol=0, atol=1e-5)


def test_a_layer_in_four_bits() -> None:
    fields = {"target_parameters": ["q_proj.weight"], "target_modules": ["v_proj"]}
    model = peftcore.apply(peftcore.quantize(tiny.llama()), "lora", r=2, **fields)
    disturb(model, "default", seed=1)
    acting = logits(model)
    assert (acting - logits(peftcore.quantize(tiny.llama()))).abs().max() > 1e-3
    peftcore.merge(model, dtype=torch.float32, undo=True)
    torch.testing.assert_close(logits(model), acting, rtol=0, atol=1e-5)


def test_what_others_read_is_refused() -> None:
    """DBRX's experts read the weights of their GLU, and give them to its forward."""
    from transformers import DbrxConfig, DbrxForCausalLM

    experts = {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2}
    heads = {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10_000.0}
    model = DbrxForCausalLM(
        DbrxConfig(d_model=16, n_heads=2, n_layers=1, vocab_size=32, attn_config=heads, ffn_config=experts)
    )
    with pytest.raises(
        peftcore.PeftcoreError, match=r"experts.mlp.w1' is read by other modules, not by its own module's forward"
    ):
        peftcore.apply(model, "lora", target_modules=[], target_parameters=["mlp.w1"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_parameters": ["experts.up"]}, r"target_parameters: 'experts.up' matches no parameter \(nearest"),
        ({"target_parameters": EXPERTS, "lora_bias": True}, r"lora_bias=True is not possible with target_parameters"),
        ({"target_parameters": ["norm.weight"]}, r"'model.norm.weight' has shape \[32\].*two or three"),
        ({"target_parameters": ["q_proj.weight"]}, r"selected by target_modules and also by target_parameters"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(peftcore.PeftcoreError, match=message):
        peftcore.apply(mixtral(), "lora", **{"target_modules": ["q_proj"], **fields})
