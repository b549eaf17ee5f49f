"""The projection, the layout in encoder-decoders, the config's errors, and what a prefix refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peftcore_prefix_tuning import Prefix, PrefixTuningConfig
from support import tiny
from support.checkpointing import enable_checkpointing
from torch import nn

import peftcore
from peftcore import PeftcoreError
from peftcore.engine import adapter_parameters
from peftcore.files.loading import restore
from peftcore.plugin import disturb

PROJECTION = {"num_virtual_tokens": 4, "prefix_projection": True, "encoder_hidden_size": 7}


def names(model: nn.Module) -> list[str]:
    return [name.rpartition("adapter.")[2] for name, _ in adapter_parameters(model, "default")]


def test_the_order_of_keys_and_values() -> None:
    """Row i of P holds K of layer 0, V of layer 0, K of layer 1, ..., each head after head."""
    config = PrefixTuningConfig(3, token_dim=8, num_attention_heads=2, num_layers=2, num_transformer_submodules=1)
    prefix = Prefix(config)
    with torch.no_grad():
        prefix.prompt_embeddings.copy_(torch.arange(3 * 32).view(3, 32))
    actual = prefix()
    assert actual.shape == (2, 2, 2, 3, 4)
    for layer in range(2):
        for kv in range(2):
            for head in range(2):
                start = 16 * layer + 8 * kv + 4 * head
                for i in range(3):
                    assert actual[layer, kv, head, i].tolist() == [32 * i + start + d for d in range(4)]


def test_a_projection_is_left_out_of_the_file_for_users(tmp_path: Path) -> None:
    model = peftcore.apply(tiny.llama(), "prefix-tuning", **PROJECTION)
    disturb(model, "default", seed=1)
    peftcore.save(model, tmp_path / "small", resumable=False)
    peftcore.save(model, tmp_path / "whole")
    small, whole = (peftcore.load(tiny.llama(), tmp_path / name) for name in ("small", "whole"))
    assert names(small) == ["prompt_embeddings"]
    assert names(whole) == names(model) and len(names(whole)) == 5
    for loaded in (small, whole):
        torch.testing.assert_close(tiny.logits(loaded), tiny.logits(model), rtol=0, atol=1e-6)


def test_what_was_exported_does_not_resume_a_projection(tmp_path: Path) -> None:
    model = peftcore.apply(tiny.llama(), "prefix-tuning", **PROJECTION)
    peftcore.save(model, tmp_path, resumable=False)
    with pytest.raises(peftcore.CheckpointError, match="5 tensors are missing, such as 'embedding'"):
        restore(model, tmp_path)


def test_zero_values() -> None:
    """Keys and values of zero: attention to the prefix gets nothing."""
    for fields in ({}, PROJECTION):
        model = peftcore.apply(tiny.llama(), "prefix-tuning", init_weights="zero", **fields)
        actual = next(module for module in model.modules() if isinstance(module, Prefix))()
        assert not actual.any()


@pytest.mark.parametrize("submodules", [1, 2])
def test_layers_of_an_encoder_decoder(submodules: int, tmp_path: Path) -> None:
    """By default as PEFT, where two layers share a part; with 1 each has its own."""
    model = peftcore.apply(tiny.t5(), "prefix-tuning", num_virtual_tokens=4, num_transformer_submodules=submodules)
    disturb(model, "default", seed=1)
    prefix = next(module for module in model.modules() if isinstance(module, Prefix))()
    assert torch.equal(prefix[0], prefix[1]) == (submodules == 2)
    peftcore.save(model, tmp_path)
    loaded = peftcore.load(tiny.t5(), tmp_path)
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))


def test_a_decoder_deeper_than_its_encoder() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_decoder_layers": 3, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(vocab_size=96, decoder_start_token_id=0, **sizes)).eval()
    base = tiny.logits(model)
    peftcore.apply(model, "prefix-tuning", num_virtual_tokens=4)
    assert peftcore.engine.applied(model, "default").config.num_layers == 3
    assert not torch.equal(tiny.logits(model), base)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_virtual_tokens": -1}, "num_virtual_tokens must be a positive whole number, found -1"),
        ({"encoder_hidden_size": 0}, "encoder_hidden_size must be a positive whole number, found 0"),
        ({"init_weights": "ones"}, "init_weights must be 'zero' or None, found 'ones'"),
        ({"num_transformer_submodules": 3}, "num_transformer_submodules must be None, 1 or 2, found 3"),
        ({"token_dim": 32}, r"token_dim=32 does not fit LlamaForCausalLM, which has 16 \(2 layers, 2 key-value heads"),
        ({"num_layers": 4}, "num_layers=4 does not fit LlamaForCausalLM, which has 2"),
        ({"num_virtual_tokens": 4096}, "4096 tokens leaves no room for input"),
    ],
)
def test_wrong_fields(fields: dict[str, Any], message: str) -> None:
    model = tiny.llama()
    with pytest.raises(PeftcoreError, match=message):
        peftcore.apply(model, "prefix-tuning", **fields)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_models_without_a_cache() -> None:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    sizes = {"vocab_size": 96, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
    model = DistilBertForSequenceClassification(DistilBertConfig(**sizes))
    with pytest.raises(PeftcoreError, match="needs attention with a cache, but DistilBertForSequenceClass"):
        peftcore.apply(model, "prefix-tuning")
    with pytest.raises(PeftcoreError, match="layers and heads of Sequential is unknown"):
        peftcore.apply(tiny.convnet(), "prefix-tuning")


def test_merging_is_refused() -> None:
    model = peftcore.apply(tiny.llama(), "prefix-tuning", num_virtual_tokens=3)
    with pytest.raises(PeftcoreError, match=r"'default' \(prefix-tuning\) cannot be merged"):
        peftcore.merge(model, undo=True)


@pytest.mark.parametrize("fields", [{}, PROJECTION], ids=["direct", "projected"])
@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.t5, tiny.bert_classifier])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(make: Any, fields: dict[str, Any], reentrant: bool) -> None:
    """The same output and gradients, the model's own `use_cache` left as it is."""
    results = []
    for checkpointing in (False, True):
        model = make()
        peftcore.apply(model, "prefix-tuning", **{"num_virtual_tokens": 4, **fields})
        disturb(model, "default", seed=1)
        if checkpointing:
            enable_checkpointing(model, {"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train()
        torch.manual_seed(3)  # the same dropout
        output = model(**tiny.inputs(model)).logits
        output.square().mean().backward()
        results.append((output.detach(), {name: p.grad for name, p in adapter_parameters(model, "default")}))
    (plain, expected), (actual, gradients) = results
    torch.testing.assert_close(actual, plain, rtol=0, atol=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)
