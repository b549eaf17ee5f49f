"""Files with experts one by one: written and read without loss, as PEFT reads them, and refused where not whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from fuzz.corpus import limit
from safetensors.torch import load_file, save_file
from support import tiny
from support.against_peft import logits, quiet
from support.mixtures import mixture

import peftcore
from peftcore.engine import applied
from peftcore.plugin import disturb

TENSORS = "adapter_model.safetensors"
NAMES = {
    "mixtral": "block_sparse_moe.experts.3.w1",
    "qwen3_moe": "mlp.experts.3.gate_proj",
    "deepseek_v3": "mlp.experts.3.up_proj",  # with shared experts, whose layers have these names
    "gpt_oss": "mlp.experts.3.down_proj",  # interleaved, transposed
}


def config_of(model: torch.nn.Module) -> Any:
    return applied(model, "default").config


def save_experts(family: str, folder: Path, **fields: object) -> torch.nn.Module:
    model = peftcore.apply(mixture(family), "lora", r=4, **fields)
    disturb(model, "default", seed=1)
    peftcore.save(model, folder, format="per_expert")
    return model


@pytest.mark.filterwarnings("ignore:Hugging Face PEFT cannot read this file. in a Deepseek")
@pytest.mark.parametrize("family", list(NAMES))
@pytest.mark.parametrize("fields", [{}, {"target_modules": ["experts"], "use_rslora": True}], ids=["all", "experts"])
def test_without_loss(family: str, fields: dict[str, object], tmp_path: Path) -> None:
    model = save_experts(family, tmp_path, lora_dropout=0.1, **fields)
    tensors = load_file(tmp_path / TENSORS)
    a, b = (tensors[f"base_model.model.model.layers.1.{NAMES[family]}.lora_{letter}.weight"] for letter in "AB")
    assert a.shape[0] == b.shape[1] == 2
    reloaded = peftcore.load(mixture(family), tmp_path)
    assert torch.equal(logits(reloaded), logits(model))
    for name in ("target_parameters", "rank_pattern", "alpha_pattern", "lora_dropout"):
        assert getattr(config_of(reloaded), name) == getattr(config_of(model), name)
    peftcore.save(reloaded, tmp_path / "peft")
    assert torch.equal(logits(peftcore.load(mixture(family), tmp_path / "peft")), logits(model))


TRAPS = [r"([a-z_.0-9]+)+X", r".*.*.*.*.*.*.*.*.*.*.*.*X", r"(a|[ab]|\w|.)*X"]


@pytest.mark.filterwarnings("ignore:Hugging Face PEFT cannot read this file")
@pytest.mark.parametrize("trap", TRAPS)
def test_a_pattern_that_takes_re_forever_is_matched_in_bounded_time(trap: str, tmp_path: Path) -> None:
    model = save_experts("mixtral", tmp_path, target_modules=["experts"])
    tiny.without_hash(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_modules": trap}))
    reloaded = mixture("mixtral")
    with limit(60):
        assert torch.equal(logits(peftcore.load(reloaded, tmp_path)), logits(model))


def plain(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """As another library writes it."""
    save_file(tensors, folder / TENSORS, {"format": "pt"})
    tiny.without_hash(folder)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_as_peft_reads_them(family: str, tmp_path: Path) -> None:
    """Gate and up with an A of their own, too: one pair of twice the rank."""
    model = save_experts(family, tmp_path, expert_r=4)
    peft_model = quiet(peft.PeftModel.from_pretrained, mixture(family), tmp_path).eval()
    torch.testing.assert_close(logits(peft_model), logits(model), rtol=0, atol=1e-5)
    tensors = load_file(tmp_path / TENSORS)
    gates = [name for name in tensors if name.endswith((".gate_proj.lora_A.weight", ".w1.lora_A.weight"))]
    plain(tmp_path, {name: t.flip(0) if name in gates else t for name, t in tensors.items()})
    peftcore_model = peftcore.load(mixture(family), tmp_path)
    assert config_of(peftcore_model).rank_pattern == {"experts.gate_up_proj": 8}
    peft_model = quiet(peft.PeftModel.from_pretrained, mixture(family), tmp_path).eval()
    torch.testing.assert_close(logits(peftcore_model), logits(peft_model), rtol=0, atol=1e-5)
    assert (logits(peftcore_model) - logits(model)).abs().max() > 1e-3


def test_a_part_alone(tmp_path: Path) -> None:
    """An adapter of up_proj and no other leaves gate as it is."""
    save_experts("qwen3_moe", tmp_path, target_modules=["gate_up_proj"])
    tensors = load_file(tmp_path / TENSORS)
    plain(tmp_path, {n: torch.zeros_like(t) if "gate_proj.lora_B" in n else t for n, t in tensors.items()})
    expected = logits(peftcore.load(mixture("qwen3_moe"), tmp_path))
    plain(tmp_path, {name: tensor for name, tensor in tensors.items() if "gate_proj" not in name})
    assert torch.equal(logits(peftcore.load(mixture("qwen3_moe"), tmp_path)), expected)


def test_what_is_refused(tmp_path: Path) -> None:
    model = save_experts("qwen3_moe", tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    plain(tmp_path, {name: tensor for name, tensor in tensors.items() if "1.mlp.experts.2.up_proj.lora_B" not in name})
    with pytest.raises(peftcore.CheckpointError, match=r"lacks lora_B of expert 2 for up of 'model.layers.1.mlp.exp"):
        peftcore.load(mixture("qwen3_moe"), tmp_path)
    with pytest.raises(peftcore.PeftcoreError, match=r"'default' .* in the format 'vllm'. .*'peft', 'per_expert'"):
        peftcore.save(model, tmp_path, format="vllm")
    llama = peftcore.apply(mixture("llama4_text"), "lora", r=4)
    with pytest.raises(peftcore.PeftcoreError, match="not a weight of experts run by transformers' interface"):
        peftcore.save(llama, tmp_path, format="per_expert")
