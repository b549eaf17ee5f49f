"""Kinds of placements that a plugin defines: the core knows none of them, and treats them like its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from torch import Tensor, nn

import peftcore
from peftcore import engine
from peftcore.engine.adaptation.adapted import adapters_at
from peftcore.plugin import Adapter, AtModule, Attachments, Link, Placement, override

PATH = "model.layers.0.mlp.down_proj"


class BeforeLink(Link):
    """The adapter changes the first input of the module."""

    __slots__ = ()

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.inside(self.adapter(x), *args, **kwargs)


@dataclass(frozen=True)
class Before(AtModule):
    path: str
    adapter: nn.Module
    link = BeforeLink


class InputScale(Adapter):
    def __init__(self, width: int, value: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((width,), value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale

    @override
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * self.scale, bias


@dataclass(frozen=True)
class Logits(Placement):
    """The adapter changes the output of the model's head, wherever that is."""

    adapter: nn.Module
    whole_model = True

    def attach(self, to: Attachments) -> None:
        assert to.architecture.output_head is not None
        to.wrap(self, to.architecture.output_head, self.adapter)

    @property
    def key(self) -> str:
        return "logits"


class Shift(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.arange(width, dtype=torch.float32))

    def forward(self, base: Any, x: Tensor) -> Tensor:
        return base(x) + self.shift


BEFORE = tiny.method("before", lambda model, _config, _facts: [Before(PATH, InputScale(48, 2.0))])
LOGITS = tiny.method("logits", lambda model, _config, _facts: [Logits(Shift(96))])


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(tiny.TOKENS).logits


def with_weight(factor: float) -> Tensor:
    base = tiny.llama()
    with torch.no_grad():
        base.get_submodule(PATH).weight.mul_(factor)
    return output(base)


def test_a_link_of_a_plugin_takes_part_in_calls_and_in_merging(tmp_path: Path) -> None:
    with tiny.installed(BEFORE):
        model, base, twice = tiny.llama(), output(tiny.llama()), with_weight(2.0)
        assert str(peftcore.plan(model, "before")).startswith("before: 1 x InputScale")
        peftcore.apply(model, "before")
        torch.testing.assert_close(output(model), twice)
        peftcore.merge(model, undo=True)
        torch.testing.assert_close(output(model), twice)
        peftcore.unmerge(model)
        samples = peftcore.activate(model, ["default", None], per_sample=True)
        torch.testing.assert_close(output(samples), torch.stack([twice[0], base[1]]))
        peftcore.activate(model, "default")
        folder = peftcore.save(model, tmp_path / "before")
        loaded = peftcore.load(tiny.llama(), folder)
        assert torch.equal(output(loaded), output(model))
        assert torch.equal(output(peftcore.remove(model)), base)
        assert not hasattr(model.get_submodule(PATH), "peftcore")


def test_its_tensors_have_the_names_of_the_module(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    with tiny.installed(BEFORE, LOGITS):
        for name, wanted in (("before", f"base_model.model.{PATH}.scale"), ("logits", "base_model.model.logits.shift")):
            folder = peftcore.save(peftcore.apply(tiny.llama(), name), tmp_path / name)
            assert list(load_file(folder / "adapter_model.safetensors")) == [wanted]


def test_a_kind_decides_where_it_is_attached() -> None:
    with tiny.installed(LOGITS):
        model = peftcore.apply(tiny.llama(), "logits")
        assert list(engine.method_modules(model, "default")) == ["logits"]
        assert adapters_at(model.lm_head)["default"] is engine.method_modules(model, "default")["logits"]
        torch.testing.assert_close(output(model), output(tiny.llama()) + torch.arange(96))
        with pytest.raises(
            peftcore.PeftcoreError, match="cannot be merged, because it does more than change weights at 'lm_head'"
        ):
            peftcore.merge(model, undo=True)


def test_a_link_of_a_plugin_compiles_whole() -> None:
    with tiny.installed(BEFORE):
        model = peftcore.apply(tiny.llama(), "before")
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(output(compiled), output(model))
