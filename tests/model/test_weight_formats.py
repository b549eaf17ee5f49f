"""Formats of weights that plugins offer: found before those of the core, and refused with the names of the plugins."""

import pytest
import torch
from support import fresh_process

import peftcore
from peftcore.model.weight_formats import find_weight_format, weight_format
from peftcore.plugin import WeightFormat, hookimpl


@pytest.mark.parametrize(("answer", "found"), [("text", "str"), ([1], "int"), (None, "NoneType")])
def test_weight_formats_of_another_type_are_refused(discover, answer: object, found: str) -> None:
    class Wrong:
        @hookimpl
        def peftcore_weight_formats(self):
            return answer

    with pytest.raises(peftcore.PluginError, match=rf"'wrong' .* list of peftcore.plugin.WeightFormat, found {found}"):
        discover(("wrong", Wrong(), "peftcore-wrong")).offered("peftcore_weight_formats", WeightFormat)


def test_a_weight_format_that_fails_is_named(discover, monkeypatch) -> None:
    class Wrong:
        @hookimpl
        def peftcore_weight_formats(self):
            return [WeightFormat("blocks", lambda module: module.blocks, lambda module: module.blocks, None)]

    registry = discover(("wrong", Wrong(), "peftcore-wrong"))
    chosen = registry.offered("peftcore_weight_formats", WeightFormat)["blocks"][1]
    who = r"of the weight format 'blocks' of the plugin 'wrong' \(peftcore-wrong 1.0\) failed at Linear: Attr"
    monkeypatch.setattr("peftcore.model.weight_formats.registry", registry)
    with pytest.raises(peftcore.PluginError, match=f"`matches` {who}"):
        find_weight_format(torch.nn.Linear(2, 2))
    with pytest.raises(peftcore.PluginError, match=f"`read` {who}"):
        chosen.read(torch.nn.Linear(2, 2))


def blocks(name: str = "blocks") -> object:
    """A plugin with one weight format."""

    class Blocks:
        @hookimpl
        def peftcore_weight_formats(self):
            return [WeightFormat(name, lambda module: False, None, None)]

    return Blocks()


def test_weight_formats_of_plugins_come_before_the_cores(discover) -> None:
    registry = discover(("one", blocks("1"), "peftcore-one"), ("two", blocks("2"), "peftcore-two"))
    names = list(registry.offered("peftcore_weight_formats", WeightFormat))
    assert names[:2] == ["2", "1"] and {"dense", "wrapped"} <= {*names[2:]}


def test_two_weight_formats_of_one_name_are_refused(discover) -> None:
    registry = discover(("one", blocks(), "peftcore-one"), ("two", blocks(), "peftcore-two"))
    both = r"'two' \(peftcore-two 1.0\) and the plugin 'one' \(peftcore-one 1.0\) both provide 'blocks'"
    with pytest.raises(peftcore.PluginError, match=rf"{both}. Rename one"):
        registry.offered("peftcore_weight_formats", WeightFormat)
    registry.unregister("two")
    assert next(iter(registry.offered("peftcore_weight_formats", WeightFormat))) == "blocks"
    with pytest.raises(peftcore.PluginError, match=r"'dense' \(d 1.0\) and peftcore both provide 'dense'"):
        discover(("dense", blocks("dense"), "d")).offered("peftcore_weight_formats", WeightFormat)


def test_the_format_of_other_libraries_tensors_is_there_without_the_contract() -> None:
    """A plugin that imports nothing of `peftcore.quantization` reads weights of torchao and quanto, too."""
    code = (
        "import sys, torch, peftcore; model = torch.nn.Sequential(torch.nn.Linear(4, 4)); "
        "peftcore.apply(model, 'ia3', target_modules=['0'], feedforward_modules=[]); "
        "from peftcore.model.weight_formats import WeightFormat, registry; "
        "print(list(registry.offered('peftcore_weight_formats', WeightFormat)))"
    )
    found = fresh_process.run(code, PEFTCORE_PLUGINS="ia3")
    assert "'wrapped'" in found.stdout, found.stderr


def test_a_weight_that_another_library_keeps_in_integers() -> None:
    layer = torch.nn.Linear(2, 2)
    layer.weight = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(
        peftcore.PeftcoreError, match=r"reads Linear, whose weight another library stores as torch.int8. Use"
    ):
        weight_format(layer)
