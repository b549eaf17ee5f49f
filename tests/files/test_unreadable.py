"""`save` refuses what `load` would refuse: tensors that a method's `write` loses or writes in another shape."""

from pathlib import Path

import pytest
import torch
from support import tiny

import peftcore
from peftcore.plugin import Method, StateRules

NAME = "base_model.model.model.layers.0.self_attn.q_proj.gain"


def dropping(tensors):
    return {name: tensor for name, tensor in tensors.items() if name != NAME}


def popping(tensors):
    tensors.pop(NAME)
    return tensors


def widening(tensors):
    return {name: tensor.expand(2) for name, tensor in tensors.items()}


def doubling(tensors):
    return {f"{name}.doubled": 2 * tensor for name, tensor in tensors.items()}


def halving(model, tensors, fields):
    assert fields["value"] == 2.0 and (model is None or "peft_version" in fields)
    return {name.removesuffix(".doubled"): tensor / 2 for name, tensor in tensors.items()}, fields


def method_of(write, **changes) -> Method:
    rules = StateRules(
        peft_type="LOSING", write=lambda _model, tensors, fields: (write(tensors) if tensors else {}, fields), **changes
    )
    return tiny.method("losing", state=rules)


@pytest.mark.parametrize(
    ("write", "back"),
    [(dropping, "not at all"), (popping, "not at all"), (doubling, "not at all"), (widening, r"with shape \[2\]")],
)
def test_what_cannot_load_is_not_saved(tmp_path: Path, write, back: str) -> None:
    folder = tmp_path / "adapter"
    with tiny.installed(tiny.method("whole")):
        model = peftcore.apply(tiny.llama(), "whole", adapter="before")
        peftcore.save(model, folder)
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        with tiny.installed(method_of(write)):
            peftcore.apply(model, "losing", adapter="losing")
            message = rf"'losing' was not saved.*'{NAME}' with shape \[\] comes back {back}\. `write` of losing"
            with pytest.raises(peftcore.PluginError, match=message):
                peftcore.save(model, folder, adapter="losing")
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


def test_another_form_that_is_read_back_is_saved(tmp_path: Path) -> None:
    with tiny.installed(method_of(doubling, read=halving)):
        model = peftcore.apply(tiny.llama(), "losing")
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.fill_(1.75)
        peftcore.save(model, tmp_path / "adapter")
        loaded = peftcore.load(tiny.llama(), tmp_path / "adapter")
        assert torch.equal(tiny.logits(loaded), tiny.logits(model))


def test_an_error_of_read_is_named(tmp_path: Path) -> None:
    def failing(model, tensors, fields):
        raise KeyError("scale")

    with tiny.installed(method_of(doubling, read=failing)):
        model = peftcore.apply(tiny.llama(), "losing")
        with pytest.raises(peftcore.PluginError, match=r"^`read` of the plugin 'losing' .* failed: KeyError"):
            peftcore.save(model, tmp_path / "adapter")
