"""What a method places is checked before anything is changed: adapters are modules, with tensors of their own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import tiny
from torch import nn

import peftcore
from peftcore.plugin import Around, Method, SoftPrompt

PATH = "model.layers.0.self_attn.q_proj"


class KeepsItsLayer(tiny.Scaled):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__(1.0)
        self.layer = layer


class KeepsIn(tiny.Scaled):
    """Keeps what it was given in a child, under the name `kept`."""

    def __init__(self, kept: Any) -> None:
        super().__init__(1.0)
        self.inner = nn.Module()
        if isinstance(kept, nn.Parameter):
            self.inner.kept = kept
        else:
            self.inner.register_buffer("kept", kept)


def keeps_model(model: nn.Module) -> nn.Module:
    return KeepsItsLayer(model)


def keeps_layer(model: nn.Module) -> nn.Module:
    return KeepsItsLayer(model.get_submodule(PATH))


def keeps_parameter(model: nn.Module) -> nn.Module:
    return KeepsIn(model.get_submodule(PATH).weight)


def keeps_storage(model: nn.Module) -> nn.Module:
    return KeepsIn(nn.Parameter(model.get_submodule(PATH).weight.data[:3]))


def keeps_buffer(model: nn.Module) -> nn.Module:
    return KeepsIn(model.model.rotary_emb.inv_freq)


def method_of(make: Callable[[nn.Module], Any]) -> Method:
    return tiny.method("keeping", lambda model, config, architecture: [Around(PATH, make(model))])


@pytest.mark.parametrize(
    ("make", "registers"),
    [
        (keeps_layer, rf"'{PATH}' of the base as 'layer'"),
        (keeps_model, r"'LlamaForCausalLM' of the base as 'layer'"),
        (keeps_parameter, rf"'{PATH}.weight' of the base as 'inner.kept'"),
        (keeps_storage, rf"'{PATH}.weight' of the base as 'inner.kept'"),
        (keeps_buffer, r"'model.rotary_emb.inv_freq' of the base as 'inner.kept'"),
        (lambda model: model.get_submodule(PATH), rf"'{PATH}' of the base, which"),
    ],
)
def test_an_adapter_that_registers_what_is_the_bases(make: Callable[[nn.Module], Any], registers: str) -> None:
    model = tiny.llama()
    keys, wanted = list(model.state_dict()), tiny.logits(model)
    with tiny.installed(method_of(make)):
        message = rf"adapter that keeping places at '{PATH}' registers {registers}.*or register a copy"
        with pytest.raises(peftcore.PluginError, match=message):
            peftcore.apply(model, "keeping")
        with torch.device("meta"), pytest.raises(peftcore.PluginError, match=message):
            peftcore.plan(model, "keeping")
    assert list(model.state_dict()) == keys and torch.equal(tiny.logits(model), wanted)


def keeps_copy(model: nn.Module) -> nn.Module:
    return KeepsIn(nn.Parameter(model.get_submodule(PATH).weight.detach().clone()))


def test_copies_are_an_adapters_own() -> None:
    with tiny.installed(method_of(keeps_copy)):
        model = peftcore.apply(tiny.llama(), "keeping")
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 32 * 32 + 1


@pytest.mark.parametrize(
    ("placed", "message"),
    [
        ([None], r"`place` of odd must return placements of peftcore.plugin, such as .*, found None"),
        (["q_proj"], r"must return placements .*found 'q_proj'"),
        ([Around(PATH, len)], r"the adapter of Around must be an nn.Module, found builtin_function"),
        ([SoftPrompt(torch.zeros(2, 32))], r"the adapter of SoftPrompt must be an nn.Module, found Tensor"),
        (
            None,
            r"`place` of the plugin 'odd' \(peftcore-odd 1.0\) failed: TypeError: 'NoneType' object is not iterable",
        ),
    ],
)
def test_what_is_no_placement(placed: Any, message: str) -> None:
    method = tiny.method("odd", lambda model, config, architecture: placed)
    with tiny.installed(method), pytest.raises(peftcore.PluginError, match=message):
        peftcore.apply(tiny.llama(), "odd")
