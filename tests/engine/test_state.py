"""The record on the model: what was placed, where, and in copies."""

import copy
import pickle

import pytest
import torch
from support import tiny

import peftcore
from peftcore.engine import adapter_modules, applied, placements
from peftcore.plugin import After, Around, PrefixKV, SoftPrompt

pytestmark = pytest.mark.usefixtures("toys")


@pytest.mark.parametrize(
    ("method", "kind", "modules"),
    [("around", Around, 2), ("after", After, 1), ("soft", SoftPrompt, 1), ("prefix", PrefixKV, 1)],
)
def test_placements_are_those_of_the_method(method: str, kind: type, modules: int) -> None:
    model = peftcore.apply(tiny.llama(), method)
    found = placements(model, "default")
    assert [type(placement) for placement in found] == [kind] * modules
    held = {id(p) for _, adapter in adapter_modules(model, "default") for p in adapter.parameters()}
    assert {id(p) for placement in found for p in placement.adapter.parameters()} == held


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_placements_of_its_own(copied: object) -> None:
    model = copied(peftcore.apply(tiny.llama(), "lora", r=2))
    for path, adapter in adapter_modules(model, "default"):
        assert applied(model, "default").placements[path][0].adapter is adapter


def test_of_a_placement_that_is_gone_nothing_is_said() -> None:
    model = peftcore.apply(tiny.llama(), "around")
    path = applied(model, "default").paths[0]
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, torch.nn.Linear(4, 4))
    assert [placement.path for placement in placements(model, "default")] == list(applied(model, "default").paths[1:])
