"""Hugging Face PEFT reads what is saved here, and the other way round, with the same logits."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from torch import Tensor, nn

import peftcore
from peftcore.testing import disturb


def llama_classifier() -> nn.Module:
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(1)
    config = tiny.llama().config
    config.num_labels = 3
    return LlamaForSequenceClassification(config).eval()


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
    "llama classifier": llama_classifier,
    "bert tagger": bert_tagger,
    "mistral": mistral,
}


@pytest.fixture(params=list(MODELS))
def bases(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """(a base for us, the same base for PEFT)."""
    return MODELS[request.param](), MODELS[request.param]()


def quiet(call: Any, *args: Any, **kwargs: Any) -> Any:
    """PEFT warns of names that transformers has deprecated, and of its own optional kernels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **kwargs)


def logits(model: nn.Module, **changes: Any) -> Tensor:
    """Logits of a model of ours or PEFT's for the caller's tokens; PEFT gives those of the prompt, too."""
    call = {**tiny.inputs(model.get_base_model() if isinstance(model, peft.PeftModel) else model), **changes}
    with torch.no_grad():
        found = quiet(model, **call).logits
    return found[:, -call.get("decoder_input_ids", call["input_ids"]).shape[1] :] if found.dim() == 3 else found


def compare(ours: nn.Module, theirs: nn.Module) -> None:
    """The same logits, for rows of one length and for a row that is padded on the right."""
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)
    if hasattr(ours, "score"):
        return  # PEFT gives a decoder's classifier no token ids, so that it pools the padding
    tokens, mask = tiny.TOKENS.clone(), torch.ones_like(tiny.TOKENS)
    tokens[1, 5:], mask[1, 5:] = ours.config.pad_token_id or 0, 0
    found, wanted = (logits(model, input_ids=tokens, attention_mask=mask) for model in (ours, theirs))
    if found.shape[:2] == mask.shape:
        found, wanted = found[mask == 1], wanted[mask == 1]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def trained_by_peft(model: nn.Module, **fields: Any) -> nn.Module:
    task = peftcore.architecture.detect(model).task_type
    if model.config.model_type == "distilbert":
        fields.update(token_dim=32, num_attention_heads=4)  # PEFT does not find them
    config = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=4, **fields)
    model = quiet(peft.get_peft_model, model, config).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


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
    shapes = [
        {k: v.shape for k, v in peftcore.checkpoint.read_tensors(tmp_path / n)[0].items()} for n in ("ours", "peft")
    ]
    assert shapes[0] == shapes[1]


def test_the_loss_counts_the_input_s_tokens() -> None:
    """PEFT counts the input's first token in addition, which the prompt's last vector predicts."""
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
    ours = peftcore.load(tiny.bert_classifier(), tmp_path / "start")
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
    found, wanted = (peftcore.checkpoint.read_tensors(tmp_path / name)[0] for name in ("ours", "theirs"))
    assert found.keys() == wanted.keys()
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-6)
