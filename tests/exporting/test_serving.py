"""Folders for vLLM and SGLang: read by PEFT, which computes the same, and with nothing that these pass over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.exported import apply, llama, logits
from support.mixtures import mixture
from support.tiny import gpt2

import peftcore
from peftcore import PeftcoreError
from peftcore.exporting.serving import commands, remarks

PATTERNS = {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True}
OF_ALL = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    ("fields", "rank"),
    [
        ({**OF_ALL, **PATTERNS}, 8),
        ({"r": 4, "target_modules": ["embed_tokens", "lm_head", "model.layers.1.self_attn.k_proj"]}, 4),
    ],
)
def test_one_rank_and_one_scale(fields: dict[str, Any], rank: int, tmp_path: Path) -> None:
    import peft

    model = apply(llama(), **fields)
    expected = logits(model)
    peftcore.export(model, tmp_path / "served", format="vllm")
    config = json.loads((tmp_path / "served" / "adapter_config.json").read_text())
    assert config["r"] == rank and config["peft_type"] == "LORA" and config["bias"] == "none"
    assert not {"rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "modules_to_save"} & config.keys()
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "served").eval()
    assert torch.allclose(logits(theirs), expected, atol=2e-5)
    ours = peftcore.load(llama(), tmp_path / "served")
    assert torch.allclose(logits(ours.eval()), expected, atol=2e-5)


def test_modules_are_named_shortly_where_all_of_a_name_are_meant(tmp_path: Path) -> None:
    def targets(name: str, modules: list[str]) -> list[str]:
        peftcore.export(apply(llama(), r=4, target_modules=modules), tmp_path / name, format="vllm")
        return json.loads((tmp_path / name / "adapter_config.json").read_text())["target_modules"]

    assert targets("all", ["q_proj", "up_proj"]) == ["q_proj", "up_proj"]
    assert targets("one", ["layers.1.self_attn.q_proj"]) == ["model.layers.1.self_attn.q_proj"]


def test_what_has_to_be_said(tmp_path: Path) -> None:
    def said(name: str, **fields: Any) -> list[str]:
        return remarks(peftcore.export(apply(llama(), **fields), tmp_path / name, format="vllm"), "base")

    assert said("16", r=16, target_modules=["q_proj"]) == []
    assert "--max" not in commands(tmp_path / "16", "base")[0]
    assert said("17", r=17, target_modules=["q_proj"]) == []
    assert "vllm serve base --enable-lora --max-lora-rank 32 " in commands(tmp_path / "17", "base")[0]
    assert said("600", r=600, target_modules=["q_proj"]) == [
        "vLLM supports ranks up to 512, but the adapter has rank 600."
    ]
    (head,) = said("head", r=4, target_modules=["q_proj", "lm_head"])
    assert head.startswith("The adapter changes lm_head outside the layers")


def test_experts_are_written_one_by_one(tmp_path: Path) -> None:
    fields = {"r": 4, "target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj"]}
    model = apply(mixture("mixtral"), **fields)
    expected = logits(model)
    folder = peftcore.export(model, tmp_path / "served", format="vllm")
    assert any("experts" in remark for remark in remarks(folder, "base"))
    back = peftcore.load(mixture("mixtral"), folder).eval()
    assert torch.allclose(logits(back), expected, atol=2e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: apply(llama(), "dora", r=4), r"\(dora\) cannot be written for vLLM and SGLang.*peftcore.convert"),
        (
            lambda: apply(llama(), r=4, modules_to_save=["lm_head"]),
            "cannot be written for vLLM and SGLang: it fully trains",
        ),
        (lambda: apply(gpt2(), r=4, target_modules=["c_attn"]), "neither a linear layer nor an embedding"),
        (lambda: apply(llama(), "prompt-tuning", num_virtual_tokens=3), "does not change weights"),
    ],
)
def test_what_they_cannot_compute_is_refused(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(PeftcoreError, match=message):
        peftcore.export(make(), tmp_path / "served", format="vllm")
    assert not (tmp_path / "served").exists()
