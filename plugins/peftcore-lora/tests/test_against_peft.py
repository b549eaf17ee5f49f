"""Hugging Face PEFT reads what is saved here, and the other way round, with the same logits."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from torch import Tensor, nn

import peftcore
from peftcore.engine import adapter_parameters
from peftcore.testing import disturb

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {"r": 4, "lora_alpha": 16}) for name in tiny.MODELS},
    "rank_pattern": (
        "llama",
        {"r": 4, "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}, "alpha_pattern": {"v_proj": 32}},
    ),
    "rslora": ("llama", {"r": 4, "use_rslora": True, "lora_alpha": 3}),
    "modules_to_save": ("llama", {"r": 4, "modules_to_save": ["lm_head"], "target_modules": ["q_proj", "v_proj"]}),
    "norms saved": ("llama", {"r": 2, "modules_to_save": ["input_layernorm"], "target_modules": ["q_proj"]}),
    "regular expression": ("llama", {"r": 4, "target_modules": r".*layers\.1\..*(up|down)_proj"}),
    "layers": ("llama", {"r": 4, "target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1]}),
    "excluded": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj"], "exclude_modules": ["mlp.c_proj"]}),
    "bias all": ("bert", {"r": 4, "bias": "all", "target_modules": ["query", "value"]}),
    "gaussian": ("gpt2", {"r": 4, "init_lora_weights": "gaussian"}),
    "roberta": ("roberta", {"r": 4}),
    "embedding": ("llama", {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}),
}
MODELS = {**tiny.MODELS, "roberta": tiny.roberta_classifier}


@pytest.fixture(params=list(CASES))
def case(request) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """(a base for us, the same base for PEFT, fields of the config)."""
    kind, fields = CASES[request.param]
    return MODELS[kind](), MODELS[kind](), fields


def logits(model: nn.Module) -> Tensor:
    """Logits of a model of ours or PEFT's."""
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    with torch.no_grad():
        return model(**tiny.inputs(inner)).logits


def quiet(call, *args: Any, **kwargs: Any) -> Any:
    """PEFT warns of GPT-2's layout, of saved embeddings and of its own optional kernels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **kwargs)


def test_peft_reads_ours(case, tmp_path: Path) -> None:
    ours, theirs, fields = case
    peftcore.apply(ours, "lora", **fields)
    disturb(ours, "default", seed=1)
    assert (logits(ours) - logits(theirs)).abs().max() > 1e-3
    peftcore.save(ours, tmp_path)
    theirs = quiet(peft.PeftModel.from_pretrained, theirs, tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=1e-5)


def test_ours_reads_peft(case, tmp_path: Path) -> None:
    ours, theirs, fields = case
    task = peftcore.architecture.detect(ours).task_type
    fields = {"target_modules": "all-linear", **fields}
    theirs = quiet(peft.get_peft_model, theirs, peft.LoraConfig(task_type=task, **fields)).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    base = logits(ours)
    quiet(theirs.save_pretrained, tmp_path)
    peftcore.load(ours, tmp_path)
    assert (logits(ours) - base).abs().max() > 1e-3
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)


def test_the_same_start_trains_to_the_same_place(tmp_path: Path) -> None:
    """From one file, three AdamW steps here and in PEFT end at the same factors."""
    peftcore.save(peftcore.apply(tiny.llama(), "lora", r=4, lora_alpha=16), tmp_path)
    ours = peftcore.load(tiny.llama(), tmp_path)
    theirs = quiet(peft.PeftModel.from_pretrained, tiny.llama(), tmp_path, is_trainable=True)
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            model(input_ids=tiny.TOKENS, labels=tiny.TOKENS).loss.backward()
            optimizer.step()
    wanted = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): p
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    found = {name: p for name, p in adapter_parameters(ours, "default")}
    assert found.keys() == wanted.keys()
    for name, parameter in found.items():
        torch.testing.assert_close(parameter, wanted[name], rtol=1e-4, atol=1e-6)


def test_bf16_base_is_as_close_to_fp32_as_peft_is(tmp_path: Path) -> None:
    reference = peftcore.apply(tiny.llama().double(), "lora", r=4, lora_alpha=16)
    disturb(reference, "default", seed=1)
    peftcore.save(reference, tmp_path, dtype=torch.float32)
    ours = peftcore.load(tiny.llama().bfloat16(), tmp_path)
    theirs = quiet(peft.PeftModel.from_pretrained, tiny.llama().bfloat16(), tmp_path)
    wanted = logits(reference)
    errors = [(logits(model).double() - wanted).square().mean().sqrt() for model in (ours, theirs)]
    assert errors[0] <= 1.25 * errors[1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, r"uses use_dora=True, which the installed plugin 'lora' does not know"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights must be True, False or 'gaussian', found 'pissa'"),
    ],
)
def test_what_is_not_here_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], **fields)
    quiet(quiet(peft.get_peft_model, tiny.llama(), config).save_pretrained, tmp_path)
    with pytest.raises(peftcore.CheckpointError, match=message):
        peftcore.load(tiny.llama(), tmp_path)
