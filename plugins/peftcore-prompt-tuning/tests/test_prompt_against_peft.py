"""Hugging Face PEFT reads what is saved here, and the other way round, with the same logits."""

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


def compare(ours: nn.Module, theirs: nn.Module) -> None:
    """The same logits, for rows of one length and for a row that is padded on the right."""
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)
    if hasattr(ours, "score"):
        return  # PEFT gives a decoder's classifier no token ids, so that it pools the padding
    compare_padded(ours, theirs)


def trained_by_peft(model: nn.Module) -> nn.Module:
    # PEFT does not find the sizes of DistilBERT.
    sizes = {"token_dim": 32, "num_attention_heads": 4} if model.config.model_type == "distilbert" else {}
    return against_peft.trained_by_peft(model, peft.PromptTuningConfig, **sizes)


def test_peft_reads_ours(bases: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    ours, theirs = bases
    base = logits(ours)
    peftcore.apply(ours, "prompt-tuning", num_virtual_tokens=4)
    disturb(ours, "default", seed=1)
    assert (logits(ours) - base).abs().max() > 1e-3
    peftcore.save(ours, tmp_path)
    compare(ours, quiet(peft.PeftModel.from_pretrained, theirs, tmp_path).eval())


def test_ours_reads_peft(bases: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    ours, theirs = bases
    theirs = trained_by_peft(theirs)
    quiet(theirs.save_pretrained, tmp_path)
    base = logits(ours)
    peftcore.load(ours, tmp_path)
    assert (logits(ours) - base).abs().max() > 1e-3
    compare(ours, theirs)


def test_files_are_peft_s(tmp_path: Path) -> None:
    """The same keys in both files, and no more."""
    quiet(trained_by_peft(tiny.bert_classifier()).save_pretrained, tmp_path / "peft")
    peftcore.save(peftcore.load(tiny.bert_classifier(), tmp_path / "peft"), tmp_path / "ours")
    fields = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "peft")]
    assert fields[0].keys() == fields[1].keys() - {"peft_version"}
    differ = {name for name in fields[0] if fields[0][name] != fields[1][name]}
    assert differ == {"modules_to_save"}  # PEFT lists modules that are not there, twice
    shapes = [{k: v.shape for k, v in read_tensors(tmp_path / n)[0].items()} for n in ("ours", "peft")]
    assert shapes[0] == shapes[1]


def test_the_loss_counts_the_input_s_tokens() -> None:
    """PEFT counts the input's first token in addition, which the prompt's last vector predicts.

    Here the loss is over the tokens of the base's loss: Trainer divides by their number, and an evaluation compares
    the two.
    """
    ours = peftcore.apply(tiny.llama(), "prompt-tuning", num_virtual_tokens=4)
    theirs = trained_by_peft(tiny.llama())
    peftcore.engine.applied(ours, "default")
    own = next(parameter for name, parameter in ours.named_parameters() if "prompt_embeddings" in name)
    with torch.no_grad():
        own.copy_(theirs.prompt_encoder["default"].embedding.weight)
    labels = tiny.TOKENS.clone()
    labels[:, 0] = -100
    losses = [quiet(model, input_ids=tiny.TOKENS, labels=labels).loss for model in (ours, theirs)]
    torch.testing.assert_close(*losses, rtol=0, atol=1e-6)


def test_the_same_start_trains_to_the_same_place(tmp_path: Path) -> None:
    """From one start, three AdamW steps here and in PEFT end at the same values, the classifier's head included."""
    theirs = trained_by_peft(tiny.bert_classifier())
    quiet(theirs.save_pretrained, tmp_path / "start")
    ours = peftcore.load(tiny.bert_classifier(), tmp_path / "start", trainable=True)
    for model, folder in ((ours, "ours"), (theirs, "theirs")):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            model(input_ids=tiny.TOKENS, labels=torch.tensor([0, 2])).loss.backward()
            optimizer.step()
        if model is ours:
            peftcore.save(model, tmp_path / folder)
        else:
            quiet(model.save_pretrained, tmp_path / folder)
    found, wanted = (read_tensors(tmp_path / name)[0] for name in ("ours", "theirs"))
    assert found.keys() == wanted.keys()
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-6)
