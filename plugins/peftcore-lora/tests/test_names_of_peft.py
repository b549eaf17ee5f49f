"""Modules whose names are those of PEFT's own wrappers are saved and loaded like others."""

from pathlib import Path

import pytest
import torch
from torch import nn

import peftcore.plugin


class Model(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)
        self.name = name
        self.add_module(name, nn.Linear(4, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.get_submodule(self.name)(self.layer(x))


@pytest.mark.parametrize("name", ["modules_to_save", "original_module"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_trained_module_is_loaded(name: str, method: str, tmp_path: Path) -> None:
    model, other, x = Model(name), Model(name), torch.ones(1, 4)
    peftcore.apply(model, method, target_modules=["layer"], modules_to_save=[name])
    peftcore.plugin.disturb(model, "default", 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    peftcore.save(model, tmp_path)
    peftcore.load(other, tmp_path)
    assert torch.equal(other(x), model(x))
    assert not torch.allclose(other(x), Model(name)(x))
