"""Hugging Face PEFT loads adapters saved here with the same logits, and vice versa."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from support import against_peft, tiny
from support.against_peft import compare_padded, logits, quiet
from torch import nn

import peftcore
from peftcore.files.folder import read_tensors
from peftcore.plugin import disturb


def distilbert_classifier() -> nn.Module:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=96, dim=32, n_layers=2, n_heads=4, hidden_dim=48, num_labels=3)
    return DistilBertForSequenceClassification(config).eval()


def bert_tagger() -> nn.Module:
    from transformers import BertForTokenClassification

    torch.manual_seed(0)
    return BertForTokenClassification(tiny.bert_classifier().config).eval()


def mistral() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return MistralForCausalLM(MistralConfig(vocab_size=96, num_key_value_heads=2, sliding_window=64, **sizes)).eval()


MODELS = {
    **tiny.MODELS,
    "roberta": tiny.roberta_classifier,
    "distilbert": distilbert_classifier,
    "llama classifier": tiny.llama_classifier,
    "bert tagger": bert_tagger,
    "mistral": mistral,
}


@pytest.fixture(params=list(MODELS))
def bases(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """(a base for us, the same base for PEFT)."""
    return MODELS[request.param](), MODELS[request.param]()


def compare(model: nn.Module, peft_model: nn.Module) -> None:
    """The same logits, for rows of one length and for a row that is padded on the right."""
    torch.testing.assert_close(logits(model), logits(peft_model), rtol=0, atol=1e-5)
    if hasattr(model, "score"):
        return  # PEFT gives a decoder's classifier no token ids, so that it pools the padding
    compare_padded(model, peft_model)


def trained_by_peft(model: nn.Module) -> nn.Module:
    # PEFT does not find the sizes of DistilBERT.
    sizes = {"token_dim": 32, "num_attention_heads": 4} if model.config.model_type == "distilbert" else {}
    return against_peft.trained_by_peft(model, peft.PromptTuningConfig, **sizes)


def test_peft_reads_ours(bases: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    model, peft_model = bases
    base = logits(model)
    peftcore.apply(model, "prompt-tuning", num_virtual_tokens=4)
    disturb(model, "default", seed=1)
    assert (logits(model) - base).abs().max() > 1e-3
    peftcore.save(model, tmp_path)
    compare(model, quiet(peft.PeftModel.from_pretrained, peft_model, tmp_path).eval())


def test_ours_reads_peft(bases: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    model, peft_model = bases
    peft_model = trained_by_peft(peft_model)
    quiet(peft_model.save_pretrained, tmp_path)
    base = logits(model)
    peftcore.load(model, tmp_path)
    assert (logits(model) - base).abs().max() > 1e-3
    compare(model, peft_model)


def test_files_are_peft_s(tmp_path: Path) -> None:
    """The same keys in both files, and no more."""
    quiet(trained_by_peft(tiny.bert_classifier()).save_pretrained, tmp_path / "peft")
    peftcore.save(peftcore.load(tiny.bert_classifier(), tmp_path / "peft"), tmp_path / "peftcore")
    fields = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("peftcore", "peft")]
    assert fields[0].keys() == fields[1].keys() - {"peft_version"}
    differ = {name for name in fields[0] if fields[0][name] != fields[1][name]}
    assert differ == {"modules_to_save"}  # PEFT lists modules that are not there, twice
    shapes = [{k: v.shape for k, v in read_tensors(tmp_path / n)[0].items()} for n in ("peftcore", "peft")]
    assert shapes[0] == shapes[1]


def test_the_loss_counts_the_input_s_tokens() -> None:
    """PEFT counts the input's first token in addition, which the prompt's last vector predicts.

    Here the loss is over the tokens of the base's loss: Trainer divides by their number, and an evaluation compares
    the two.
    """
    peftcore_model = peftcore.apply(tiny.llama(), "prompt-tuning", num_virtual_tokens=4)
    peft_model = trained_by_peft(tiny.llama())
    peftcore.engine.applied(peftcore_model, "default")
    prompt = next(parameter for name, parameter in peftcore_model.named_parameters() if "prompt_embeddings" in name)
    with torch.no_grad():
        prompt.copy_(peft_model.prompt_encoder["default"].embedding.weight)
    labels = tiny.TOKENS.clone()
    labels[:, 0] = -100
    losses = [quiet(model, input_ids=tiny.TOKENS, labels=labels).loss for model in (peftcore_model, peft_model)]
    torch.testing.assert_close(*losses, rtol=0, atol=1e-6)


def test_the_same_start_trains_to_the_same_place(tmp_path: Path) -> None:
    """From one start, three AdamW steps here and in PEFT end at the same values, the classifier's head included."""
    peft_model = trained_by_peft(tiny.bert_classifier())
    quiet(peft_model.save_pretrained, tmp_path / "start")
    peftcore_model = peftcore.load(tiny.bert_classifier(), tmp_path / "start", trainable=True)
    for model, folder in ((peftcore_model, "peftcore"), (peft_model, "peft")):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            model(input_ids=tiny.TOKENS, labels=torch.tensor([0, 2])).loss.backward()
            optimizer.step()
        if model is peftcore_model:
            peftcore.save(model, tmp_path / folder)
        else:
            quiet(model.save_pretrained, tmp_path / folder)
    actual, expected = (read_tensors(tmp_path / name)[0] for name in ("peftcore", "peft"))
    assert actual.keys() == expected.keys()
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-6)
