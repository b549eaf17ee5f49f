"""Hugging Face PEFT loads adapters saved here with the same logits, and vice versa."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support import against_peft, tiny
from support.against_peft import compare_padded, logits, quiet
from support.checkpointing import enable_checkpointing
from support.releases import BEFORE_5_24
from support.whole_run import nightly_but
from torch import nn

import peftcore
from peftcore.files.folder import read_tensors
from peftcore.plugin import cache_argument, disturb


def deep_t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=96, decoder_start_token_id=0, **sizes)).eval()


def wide_qwen3() -> nn.Module:
    """A head_dim of its own: heads · head_dim is not the hidden size."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=96, num_key_value_heads=2, head_dim=12, **sizes)).eval()


MODELS = {
    "llama": tiny.llama,
    "gpt2": tiny.gpt2,
    "t5": tiny.t5,
    "deep t5": deep_t5,
    "wide qwen3": wide_qwen3,
}


@pytest.fixture(params=list(MODELS))
def bases(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """(a base for us, the same base for PEFT)."""
    return MODELS[request.param](), MODELS[request.param]()


def compare(model: nn.Module, peft_model: nn.Module) -> None:
    """The same logits, for rows of one length, without a mask, and for a row that is padded on the right."""
    torch.testing.assert_close(logits(model), logits(peft_model), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        logits(model, attention_mask=None), logits(peft_model, attention_mask=None), rtol=0, atol=1e-5
    )
    compare_padded(model, peft_model)


def trained_by_peft(model: nn.Module, **fields: Any) -> nn.Module:
    return against_peft.trained_by_peft(model, peft.PrefixTuningConfig, **fields)


PROJECTION = {"prefix_projection": True, "encoder_hidden_size": 7}


@pytest.mark.parametrize("fields", [{}, PROJECTION], ids=["direct", "projected"])
@pytest.mark.parametrize("resumable", nightly_but([True, False], [True]))
def test_peft_reads_ours(
    bases: tuple[nn.Module, nn.Module], fields: dict[str, Any], resumable: bool, tmp_path: Path
) -> None:
    model, peft_model = bases
    base = logits(model)
    peftcore.apply(model, "prefix-tuning", num_virtual_tokens=4, **fields)
    disturb(model, "default", seed=1)
    assert (logits(model) - base).abs().max() > 1e-3
    peftcore.save(model, tmp_path, resumable=resumable)
    compare(model, quiet(peft.PeftModel.from_pretrained, peft_model, tmp_path).eval())


@pytest.mark.parametrize("fields", [{}, PROJECTION], ids=["direct", "projected"])
def test_ours_reads_peft(bases: tuple[nn.Module, nn.Module], fields: dict[str, Any], tmp_path: Path) -> None:
    model, peft_model = bases
    peft_model = trained_by_peft(peft_model, **fields)
    quiet(peft_model.save_pretrained, tmp_path)
    base = logits(model)
    peftcore.load(model, tmp_path)
    assert (logits(model) - base).abs().max() > 1e-3
    compare(model, peft_model)


@pytest.mark.parametrize("fields", [{}, PROJECTION], ids=["direct", "projected"])
def test_files_are_peft_s(fields: dict[str, Any], tmp_path: Path) -> None:
    """The same keys in both files; the projection's tensors only where training may go on."""
    quiet(trained_by_peft(tiny.llama(), **fields).save_pretrained, tmp_path / "peft")
    model = peftcore.apply(tiny.llama(), "prefix-tuning", num_virtual_tokens=4, **fields)
    peftcore.save(model, tmp_path / "peftcore", resumable=False)
    peftcore.save(model, tmp_path / "resumable")
    config, peft_config = (
        json.loads((tmp_path / folder / "adapter_config.json").read_text()) for folder in ("peftcore", "peft")
    )
    assert config == {name: value for name, value in peft_config.items() if name != "peft_version"}
    shapes, peft_shapes, resumable = (
        {name: tensor.shape for name, tensor in read_tensors(tmp_path / folder)[0].items()}
        for folder in ("peftcore", "peft", "resumable")
    )
    assert shapes == peft_shapes
    assert len(resumable) == (6 if fields else 1)


def test_the_loss_and_gradients_are_peft_s(tmp_path: Path) -> None:
    peft_model = trained_by_peft(tiny.llama())
    quiet(peft_model.save_pretrained, tmp_path)
    peftcore_model = peftcore.load(tiny.llama(), tmp_path, trainable=True)
    losses = [quiet(model, input_ids=tiny.TOKENS, labels=tiny.TOKENS).loss for model in (peftcore_model, peft_model)]
    torch.testing.assert_close(*losses, rtol=0, atol=1e-6)
    for loss in losses:
        loss.backward()
    actual, expected = (
        next(p.grad for p in model.parameters() if p.requires_grad) for model in (peftcore_model, peft_model)
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [tiny.bert_classifier, tiny.roberta_classifier, tiny.llama_classifier])
def test_classifiers(make: Any, tmp_path: Path) -> None:
    """PEFT asks classifiers for an argument that transformers has renamed; it means its prefix in their cache."""
    peft_model = trained_by_peft(make())
    if not BEFORE_5_24:
        with pytest.raises(ValueError, match="does not support past key values"):
            logits(peft_model)
    quiet(peft_model.save_pretrained, tmp_path)
    model = peftcore.load(make(), tmp_path)
    mask, base = torch.ones_like(tiny.TOKENS), peft_model.get_base_model()
    if not hasattr(base, "score"):
        mask[1, 5:] = 0
    with torch.no_grad():
        extended = torch.cat([torch.ones(2, 4, dtype=torch.long), mask], dim=1)
        cache = {cache_argument(base.base_model): peft_model.get_prompt(2)}
        output = base.base_model(input_ids=tiny.TOKENS, attention_mask=extended, **cache)
        if hasattr(base, "score"):
            expected = base.score(output.last_hidden_state[:, -1])
        else:
            pooled = getattr(output, "pooler_output", None)
            expected = base.classifier(output.last_hidden_state if pooled is None else pooled)
    torch.testing.assert_close(logits(model, attention_mask=mask), expected, rtol=0, atol=1e-5)


def test_peft_refuses_gradient_checkpointing() -> None:
    """... which works here, see `test_gradient_checkpointing`."""
    model = tiny.llama()
    enable_checkpointing(model)
    with pytest.raises(ValueError, match="does not work with gradient checkpointing"):
        trained_by_peft(model)
