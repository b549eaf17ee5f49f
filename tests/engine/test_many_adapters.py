"""With many adapters on a model, each change costs what it touches: functions are counted, not seconds."""

import copy
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peftcore
from peftcore.engine import set_trainable

LAYERS = 6


def model_with(count: int, layers: int = LAYERS) -> nn.Module:
    """LoRA on each of its layers, `count` times; the first one acts."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))
    for i in range(count):
        peftcore.apply(model, "lora", r=1, adapter=f"a{i}")
    peftcore.activate(model, "a0")
    return model


def calls(change: Callable[[], Any]) -> int:
    """How many Python functions a change calls."""
    count = 0

    def see(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal count
        count += event == "call"

    gc.disable()  # what it frees meanwhile may call functions, too
    sys.setprofile(see)
    try:
        change()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapter")
    return peftcore.save(model_with(1), path, adapter="a0")


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "apply": lambda model: peftcore.apply(model, "lora", r=1, adapter="new"),
    "activate": lambda model: peftcore.activate(model, "a1"),
    "one for each sample": lambda model: peftcore.activate(model, ["a1", None, "a2"], per_sample=True),
    "train": lambda model: set_trainable(model, "a0", False),
    "disable": lambda model: peftcore.disabled(model).__enter__(),
    "remove": lambda model: peftcore.remove(model, "a2"),
    "call": lambda model: model(torch.randn(3, 4)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_costs_what_it_touches(change: Callable[[nn.Module], Any]) -> None:
    few, many = model_with(3), model_with(33)
    change(model_with(3))  # what is found once for a class, or a kind of model
    growth = calls(lambda: change(many)) - calls(lambda: change(few))
    assert growth / 30 < LAYERS / 2  # for each adapter that is not touched: it is named, its layers are not walked


def test_what_is_loaded_frozen_trains_when_it_is_let(folder: Path) -> None:
    model = model_with(1)
    peftcore.load(model, folder, adapter="new", trainable=False)
    peftcore.activate(model, "new")
    assert not any(p.requires_grad for p in model.parameters())
    set_trainable(model, "new", True)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        name for name, _ in model.named_parameters() if ".new." in name
    ]


def test_another_choice_for_each_sample_walks_no_layers() -> None:
    def cost(layers: int) -> int:
        model = model_with(9, layers)
        for i in range(9):
            set_trainable(model, f"a{i}", False)
        peftcore.activate(model, ["a1", "a2", None], per_sample=True)
        return calls(lambda: peftcore.activate(model, ["a3", "a4", *(f"a{i}" for i in range(9))], per_sample=True))

    assert cost(4) == cost(12)


def test_a_switch_calls_a_few_functions_a_layer() -> None:
    def cost(layers: int) -> int:
        model = model_with(3, layers)
        set_trainable(model, "a1", False)
        peftcore.activate(model, "a1")
        peftcore.activate(model, "a2")  # which may train, so that it is walked
        return calls(lambda: peftcore.activate(model, "a1"))

    assert (cost(12) - cost(4)) / 8 < 40


def test_a_layer_that_is_exchanged_is_noticed_though_nothing_is_walked() -> None:
    model = model_with(3)
    peftcore.activate(model, ["a1", None], per_sample=True)
    before, model[1] = model[1], nn.Linear(4, 4)
    with pytest.raises(peftcore.PeftcoreError, match="'1' was replaced by another Linear"):
        peftcore.activate(model, ["a2", None], per_sample=True)
    model[1] = before
    peftcore.activate(model, ["a2", None], per_sample=True)
    model[2].weight.data = torch.zeros(5, 4)
    with pytest.raises(peftcore.PeftcoreError, match=r"'2' has 'weight' of shape \[5, 4\], which was \[4, 4\]"):
        peftcore.activate(model, ["a1", None], per_sample=True)
    model[2].weight.data = torch.zeros(4, 4)
    nn.utils.parametrize.register_parametrization(model[3], "weight", nn.Identity())
    with pytest.raises(peftcore.PeftcoreError, match=r"'3' has the parameters \['parametrizations.weight'\]"):
        peftcore.activate(model, ["a1", None], per_sample=True)


def test_layers_read_the_choice_at_their_call() -> None:
    model, x = model_with(4).eval(), torch.randn(3, 4)
    for i in range(4):
        nn.init.normal_(model[0]._modules["peftcore"][f"a{i}"].lora_B)  # type: ignore[index]
    alone = {}
    for name in ("a1", "a2", "a3"):
        peftcore.activate(model, name)
        alone[name] = model(x)
    with peftcore.disabled(model):
        alone[None] = model(x)
    for names in (["a1", "a2", None], [None, "a3", "a3"], ["a2", "a1", "a3"]):
        peftcore.activate(model, names, per_sample=True)
        wanted = torch.stack([alone[name][i] for i, name in enumerate(names)])
        torch.testing.assert_close(model(x), wanted)
    copied = copy.deepcopy(model)
    peftcore.activate(copied, ["a1", "a1", None], per_sample=True)
    torch.testing.assert_close(model(x), wanted)  # which the copy has not taken along
    torch.testing.assert_close(copied(x)[2], alone[None][2])


def test_adapters_that_are_added_act_behind_those_that_do() -> None:
    model = model_with(1)
    peftcore.apply(model, "lora", r=1, adapter="b", init_lora_weights=False)
    grown, x = model(torch.ones(2, 4)), torch.ones(2, 4)
    peftcore.activate(model, [])
    peftcore.activate(model, ["a0", "b"])
    assert torch.equal(model(x), grown)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 4 * LAYERS


def test_an_inactive_adapter_does_not_train_whatever_is_active() -> None:
    model = model_with(3)
    peftcore.activate(model, ["a1", "a2"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 4 * LAYERS and not any(".a0." in name for name in trained)
    set_trainable(model, "a1", False)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {n for n in trained if ".a2." in n}


def test_an_adapter_that_was_taken_out_by_hand_is_missed() -> None:
    model = model_with(3)
    del model[2]._modules["peftcore"]._modules["a1"]  # type: ignore[union-attr]
    with pytest.raises(peftcore.PeftcoreError, match=r"after the adapter 'a1' was applied: '2' has lost its adapter"):
        peftcore.activate(model, "a2")


def test_data_for_first_values_that_nobody_reads_are_refused() -> None:
    with pytest.raises(
        peftcore.PeftcoreError,
        match=r"lora does not initialise from data with these fields, but batches were passed\. Leave",
    ):
        peftcore.apply(nn.Sequential(nn.Linear(4, 4)), "lora", r=1, batches=[(torch.ones(1, 4),)])
