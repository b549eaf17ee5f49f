"""Rows of an embedding: what is trained, what a tied head does, merging, files, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peftcore_trainable_tokens import TrainableTokensConfig
from support import tiny
from support.against_peft import both_ways, logits, moved, quiet
from torch import nn

import peftcore
from peftcore.plugin import disturb

IDS = [60, 3, 41, 5]


def gemma() -> nn.Module:
    """Tied, with an embedding that scales what it looks up."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    return Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=96, num_key_value_heads=2, head_dim=8, **sizes)).eval()


MODELS = {**tiny.MODELS, "gemma": gemma}


@pytest.mark.parametrize("kind", list(MODELS))
def test_files(kind: str, tmp_path: Path) -> None:
    make = MODELS[kind]
    task = peftcore.model.detect(make()).task_type
    model = peftcore.apply(make(), TrainableTokensConfig(token_indices=IDS))
    both_ways(make, tmp_path, model, peft.TrainableTokensConfig(token_indices=IDS, task_type=task))


@pytest.mark.parametrize("named", [["lm_head"], ["embed_tokens", "lm_head"], r"lm_head|model\.embed_tokens"])
def test_peft_reads_the_rows_of_a_tied_head(named: str | list[str], tmp_path: Path) -> None:
    model = peftcore.apply(gemma(), "trainable-tokens", token_indices=IDS, target_modules=named)
    disturb(model, "default", seed=1)
    peftcore.save(model, tmp_path)
    peftcore_model = tiny.logits(model)
    peft_model = quiet(peft.PeftModel.from_pretrained, gemma(), tmp_path).eval()
    torch.testing.assert_close(logits(peft_model), peftcore_model, rtol=0, atol=1e-5)
    assert not torch.allclose(tiny.logits(gemma()), peftcore_model, atol=0.1)
    assert torch.equal(tiny.logits(peftcore.load(gemma(), tmp_path)), peftcore_model)


def test_an_untied_head_is_adapted_alone() -> None:
    model = peftcore.apply(tiny.llama(), "trainable-tokens", token_indices=IDS, target_modules=["lm_head"])
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "lm_head.peftcore.default.trainable_tokens_delta"
    ]


def test_rows_are_those_of_the_weight() -> None:
    """Here and merged, with gradients of the rows alone; a tied head is one parameter with them, before and after."""
    model = peftcore.apply(gemma(), "trainable-tokens", token_indices=IDS)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == len(IDS) * 32
    disturb(model, "default", seed=1)
    peftcore_model = tiny.logits(model)
    rows = model.model.embed_tokens.peftcore["default"].trainable_tokens_delta
    plain = gemma()
    weight = plain.model.embed_tokens.weight
    with torch.no_grad():
        weight[torch.tensor(IDS)] = rows
    torch.testing.assert_close(peftcore_model, tiny.logits(plain), rtol=0, atol=1e-5)
    for each in (model, plain):
        each(input_ids=tiny.TOKENS, labels=tiny.TOKENS).loss.backward()
    torch.testing.assert_close(rows.grad, weight.grad[torch.tensor(IDS)], rtol=1e-4, atol=1e-6)
    peftcore.merge(model, undo=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, weight)
    peftcore.unmerge(model)
    assert torch.equal(tiny.logits(model), peftcore_model)


def test_padding_gets_no_gradient() -> None:
    model = peftcore.apply(
        nn.Sequential(nn.Embedding(9, 4, padding_idx=2)), "trainable-tokens", token_indices=[7, 2], target_modules=["0"]
    )
    model(torch.tensor([[2, 7, 1]])).sum().backward()
    assert torch.equal(model[0].peftcore["default"].trainable_tokens_delta.grad, torch.tensor([[1.0] * 4, [0.0] * 4]))


def test_new_tokens_are_in_the_file(tmp_path: Path) -> None:
    """Their rows are drawn anew with every base: those in the file stand."""
    model = tiny.llama()
    model.resize_token_embeddings(99)
    peftcore.apply(model, "trainable-tokens", token_indices=[96, 97, 98], init_weights=False)
    peftcore.save(model, tmp_path)
    reloaded = tiny.llama()
    reloaded.resize_token_embeddings(99)
    peftcore.load(reloaded, tmp_path)
    tokens = torch.tensor([[5, 96, 98]])
    assert torch.equal(reloaded.model.embed_tokens(tokens), model.model.embed_tokens(tokens))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"token_indices": []}, r"must be distinct, and at least one, found \[\]"),
        ({"token_indices": [96]}, r"'model.embed_tokens' has 96 rows, so no row for token 96"),
        ({"token_indices": [-1]}, r"no row for token -1"),
        ({"token_indices": [3, 3]}, r"and at least one, found \[3, 3\]"),
        ({"token_indices": [3], "target_modules": ["norm"]}, r"'norm' matches LlamaRMSNorm"),
    ],
)
def test_what_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(peftcore.PeftcoreError, match=message):
        peftcore.apply(tiny.llama(), "trainable-tokens", **fields)


def test_quantized_rows_are_refused() -> None:
    model = peftcore.quantize(tiny.llama(), skip=[])
    with pytest.raises(peftcore.PeftcoreError, match=r"'lm_head' .* is quantized.*skip="):
        peftcore.apply(model, "trainable-tokens", token_indices=[3], target_modules=["lm_head"])


def masked() -> nn.Module:
    """BERT whose head has a bias, and the weight of the embedding."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    model = BertForMaskedLM(BertConfig(vocab_size=96, **sizes)).eval()
    nn.init.normal_(model.cls.predictions.bias)
    return model


BESIDE_LORA = {"target_modules": ["query"], "r": 2, "trainable_token_indices": {"word_embeddings": IDS}}


@pytest.mark.parametrize(
    "config",
    [
        peft.TrainableTokensConfig(token_indices=IDS, target_modules=["word_embeddings"]),
        peft.LoraConfig(**BESIDE_LORA),
    ],
    ids=["alone", "lora"],
)
def test_peft_leaves_out_the_bias_of_a_head(config: peft.PeftConfig, tmp_path: Path) -> None:
    peft_model = moved(quiet(peft.get_peft_model, masked(), config).eval())
    quiet(peft_model.save_pretrained, tmp_path)
    with pytest.raises(peftcore.PeftcoreError, match=r"PEFT computes 'cls.predictions.decoder' without its bias"):
        peftcore.load(masked(), tmp_path)
    base = masked()
    base.get_submodule("cls.predictions.decoder").bias = None  # as the message says
    model = peftcore.load(base, tmp_path)
    torch.testing.assert_close(tiny.logits(model), logits(peft_model), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "fields"), [("trainable-tokens", {"token_indices": IDS}), ("lora", BESIDE_LORA)], ids=["alone", "lora"]
)
def test_a_head_that_peft_computes_without_its_bias_is_saved_with_a_warning(
    method: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    model = peftcore.apply(masked(), method, **fields)
    disturb(model, "default", seed=1)
    with pytest.warns(UserWarning, match="cls.predictions.decoder"):
        peftcore.save(model, tmp_path)
    assert torch.equal(tiny.logits(peftcore.load(masked(), tmp_path)), tiny.logits(model))
