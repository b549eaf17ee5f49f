"""Weights that other code reads: merging would change what that code computes, and an adapter would not."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftcore


class NanoHead(nn.Module):
    """A head as nanoGPT's without a module: the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.fc = nn.Embedding(12, 16), nn.Linear(16, 16)

    def forward(self, idx: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.fc(self.emb(idx))), self.emb.weight)


class TiedAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc, self.mid = nn.Linear(16, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.mid(torch.tanh(self.enc(x))), self.enc.weight.t())


class ReadsABias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.fc.bias


@pytest.mark.parametrize(("model", "read"), [(NanoHead(), "emb"), (TiedAutoencoder(), "enc")], ids=["nano", "tied"])
@pytest.mark.parametrize("undo", [True, False])
def test_merge_refuses_a_weight_that_is_called_and_read(model: nn.Module, read: str, undo: bool) -> None:
    x = torch.arange(6) if read == "emb" else torch.randn(3, 16)
    peftcore.apply(model, "lora", target_modules=[read], init_lora_weights=False)
    before = model(x)
    with pytest.raises(peftcore.PeftcoreError, match=rf"cannot merge into '{read}.weight': the model's own forward"):
        peftcore.merge(model, undo=undo)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    peftcore.remove(model, "default")


@pytest.mark.parametrize(("model", "other"), [(NanoHead(), "fc"), (TiedAutoencoder(), "mid")], ids=["nano", "tied"])
def test_other_layers_of_such_a_model_merge(model: nn.Module, other: str) -> None:
    x = torch.arange(6) if other == "fc" else torch.randn(3, 16)
    peftcore.apply(model, "lora", target_modules=[other], init_lora_weights=False)
    before = model(x)
    torch.testing.assert_close(peftcore.merge(model, undo=True)(x), before)


def test_a_bias_that_is_read_can_stay_while_the_weight_is_merged() -> None:
    model, x = ReadsABias(), torch.randn(3, 16)
    peftcore.apply(model, "lora", target_modules=["fc"], init_lora_weights=False)
    before = model(x)
    torch.testing.assert_close(peftcore.merge(model, undo=True)(x), before)
    model = ReadsABias()
    peftcore.apply(model, "lora", target_modules=["fc"], init_lora_weights=False, lora_bias=True)
    with torch.no_grad():
        for _, parameter in peftcore.engine.adapter_parameters(model, "default"):
            parameter.add_(0.1)
    with pytest.raises(peftcore.PeftcoreError, match=r"cannot merge into 'fc.bias'"):
        peftcore.merge(model, undo=True)
