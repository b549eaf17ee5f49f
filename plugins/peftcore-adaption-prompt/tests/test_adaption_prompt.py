"""Adaption prompts beside Hugging Face PEFT's: files both ways, one field after another; invalid configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from support import tiny
from support.against_peft import both_ways
from torch import nn

import peftcore
from peftcore.plugin import disturb

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 96}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def mistral() -> nn.Module:
    torch.manual_seed(0)
    return transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, **HEADS)).eval()


MAKES: dict[str, Any] = {"llama": tiny.llama, "gpt2": tiny.gpt2, "mistral": mistral}


@pytest.mark.parametrize("kind", list(MAKES))
@pytest.mark.parametrize(
    "fields",
    [{"adapter_len": 4, "adapter_layers": 2},
     {"adapter_len": 3, "adapter_layers": 1}],
)  # fmt: skip
def test_files(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    fields = {**fields, "target_modules": "attn" if kind == "gpt2" else "self_attn"}
    model = peftcore.apply(MAKES[kind](), "adaption-prompt", **fields)
    both_ways(MAKES[kind], tmp_path, model, peft.AdaptionPromptConfig(task_type="CAUSAL_LM", **fields))


def test_what_is_not_said_is_the_model_s(tmp_path: Path) -> None:
    model = peftcore.apply(mistral(), "adaption-prompt", adapter_len=4)
    config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=3)
    both_ways(mistral, tmp_path, model, config)


def test_a_closed_gate_changes_nothing() -> None:
    expected = tiny.logits(tiny.llama())
    assert torch.equal(tiny.logits(peftcore.apply(tiny.llama(), "adaption-prompt")), expected)


def test_around_a_lora_it_reads_the_layers_with_that() -> None:
    """As if its change were in the weights."""
    low, merged = peftcore.apply(tiny.llama(), "lora", r=2, adapter="low"), tiny.llama()
    disturb(low, "low", 1, std=0.3)
    for path, adapter in peftcore.engine.adapter_modules(low, "low"):
        merged.get_submodule(path).weight.data += adapter.delta()
    for model in (low, merged):
        torch.manual_seed(4)
        peftcore.apply(model, "adaption-prompt", adapter_len=4, adapter="prompt")
        disturb(model, "prompt", 2, std=0.5)
    peftcore.activate(low, ["low", "prompt"])
    torch.testing.assert_close(tiny.logits(low), tiny.logits(merged), rtol=0, atol=1e-4)


def test_what_does_not_fit_is_refused() -> None:
    def assert_refused(match: str, make: Any, **fields: Any) -> None:
        with pytest.raises(peftcore.PeftcoreError, match=match):
            peftcore.apply(make(), "adaption-prompt", **fields)

    assert_refused("adapter_layers=9, but the model has 2", tiny.llama, adapter_layers=9)
    assert_refused(r"\(LlamaMLP\) differs. Use prefix-tuning or LoRA", tiny.llama, target_modules="mlp")
    assert_refused("LlamaForCausalLM has none", tiny.llama, target_modules="attention")

    def llama(**fields: Any) -> Any:
        return lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **HEADS, **fields))

    assert_refused("LlamaForCausalLM has none", llama(attention_bias=True))  # PEFT would add that of o_proj twice

    def granite() -> Any:
        config = transformers.GraniteConfig(**SIZES, **HEADS, attention_multiplier=0.5)
        return transformers.GraniteForCausalLM(config)

    assert_refused("GraniteForCausalLM has none", granite)
