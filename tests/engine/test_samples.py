"""Heads and other parameters of the base that adapters train, an adapter for each sample: as if each were alone."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from torch import Tensor, nn

import peftcore
from peftcore.engine import adapter_parameters, state_of
from peftcore.testing import disturb

NAMES = ["a", None, "b", "a"]


def tokens() -> Tensor:
    return torch.randint(3, 90, (4, 6), generator=torch.Generator().manual_seed(2))


def classifier(build: Any = tiny.bert_classifier, method: str = "lora", **fields: Any) -> Any:
    torch.manual_seed(0)
    model = build().eval()
    for seed, name in enumerate("ab"):
        peftcore.apply(model, method, adapter=name, **fields)
        disturb(model, name, seed=seed, std=0.3)
        peftcore.activate(model, [])
    return model


def alone(model: Any) -> Tensor:
    found = []
    for sample, name in zip(tokens(), NAMES, strict=True):
        peftcore.activate(model, name or [])
        found.append(model(input_ids=sample[None]).logits)
    return torch.cat(found)


@pytest.mark.parametrize("build", [tiny.bert_classifier, tiny.roberta_classifier, tiny.llama_classifier])
def test_heads(build: Any) -> None:
    model = classifier(build)
    assert any(state_of(model).applied["a"].trained)  # type: ignore[union-attr]
    keys = list(model.state_dict())
    with torch.no_grad():
        wanted = alone(model)
        peftcore.activate(model, NAMES, per_sample=True)
        found = model(input_ids=tokens()).logits
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(other(input_ids=tokens()).logits, found)
        assert list(model.state_dict()) == keys
        peftcore.activate(model, ["b", "a", "a", None], per_sample=True)
        assert not torch.allclose(model(input_ids=tokens()).logits, found, atol=1e-3)
        torch.testing.assert_close(alone(model), wanted)
        peftcore.activate(model, [])
        torch.testing.assert_close(model(input_ids=tokens(), adapter_names=["a", "__base__", "b", "a"]).logits, wanted)
    for name in "ab":
        peftcore.remove(model, name)
    assert type(model) is type(build()) and list(model.state_dict()) == list(build().state_dict())


def test_gradients_reach_each_head() -> None:
    model = classifier()

    def gradients(name: str, batch: Tensor) -> list[Tensor]:
        parameters = [p for _, p in adapter_parameters(model, name)]
        return list(torch.autograd.grad(model(input_ids=batch).logits.square().sum(), parameters))

    peftcore.activate(model, NAMES, per_sample=True)
    found = gradients("a", tokens())
    peftcore.activate(model, "a")
    for one, other in zip(found, gradients("a", tokens()[[0, 3]]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["bitfit", "ln-tuning"])
def test_biases_and_norms(method: str) -> None:
    model = classifier(method=method)
    with torch.no_grad():
        wanted = alone(model)
        peftcore.activate(model, NAMES, per_sample=True)
        torch.testing.assert_close(model(input_ids=tokens()).logits, wanted, rtol=1e-4, atol=1e-5)


def test_an_adapter_is_removed_and_saved_meanwhile(tmp_path: Path) -> None:
    model = classifier()
    with torch.no_grad():
        wanted = alone(model)
        peftcore.activate(model, NAMES, per_sample=True)
        peftcore.save(model, tmp_path, adapter="a")
        peftcore.remove(model, "b")
        torch.testing.assert_close(model(input_ids=tokens()).logits[[0, 3]], wanted[[0, 3]], rtol=1e-4, atol=1e-5)
        torch.manual_seed(0)
        other = peftcore.load(tiny.bert_classifier().eval(), tmp_path)
        torch.testing.assert_close(other(input_ids=tokens()[[0, 3]]).logits, wanted[[0, 3]], rtol=1e-4, atol=1e-5)


class Reads(nn.Module):
    """Reads the bias of a layer without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.layer.weight, self.layer.bias) + self.other(x)


def test_parameters_that_are_read_without_a_call_are_refused() -> None:
    model = peftcore.apply(Reads().eval(), "bitfit", adapter="a")
    with pytest.raises(peftcore.PeftcoreError, match=r"as a whole.*: it trains parameters of 'layer'"):
        peftcore.activate(model, ["a", None], per_sample=True)


def test_combine_and_convert_leave_each_sample_its_adapter() -> None:
    model = classifier(modules_to_save=[])
    peftcore.activate(model, NAMES, per_sample=True)
    with torch.no_grad():
        wanted = model(input_ids=tokens()).logits
        peftcore.combine(model, ["a", "b"], adapter="sum")
        assert torch.equal(model(input_ids=tokens()).logits, wanted)
        peftcore.convert(model, "a", method="lora")
        assert torch.equal(model(input_ids=tokens()).logits, wanted)


@pytest.mark.parametrize("together", [False, True])
def test_load_is_refused_and_leaves_each_sample_its_adapter(together: bool, tmp_path: Path) -> None:
    model = classifier(modules_to_save=[])
    peftcore.save(model, tmp_path, adapter=None if together else "a")
    other = classifier(modules_to_save=[])
    peftcore.activate(other, NAMES, per_sample=True)
    with torch.no_grad():
        wanted = other(input_ids=tokens()).logits
        with pytest.raises(peftcore.PeftcoreError, match="cannot load adapters while each sample has its own"):
            peftcore.load(other, tmp_path, adapter=None if together else "c")
        assert torch.equal(other(input_ids=tokens()).logits, wanted)


def test_remove_gets_out_where_a_trained_module_is_gone() -> None:
    model = classifier()
    peftcore.activate(model, NAMES, per_sample=True)
    del model.classifier
    for name in "ab":
        with pytest.warns(UserWarning, match="classifier.weight' is gone"):
            peftcore.remove(model, name)
    assert not any("peftcore" in key for key in model.state_dict()) and not hasattr(type(model), "_peftcore_enclosed")
