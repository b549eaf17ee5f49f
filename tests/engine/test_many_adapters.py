"""With many adapters on a model, each change costs what it touches: functions are counted, not seconds."""

import gc
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import peftcore
from peftcore.engine import set_trainable

LAYERS = 6


def model_with(count: int) -> nn.Module:
    """LoRA on each of its layers, `count` times; the first one acts."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(LAYERS)))
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


def test_adapters_that_are_added_act_behind_those_that_do() -> None:
    model = model_with(1)
    peftcore.apply(model, "lora", r=1, adapter="b", init_lora_weights=False)
    grown, x = model(torch.ones(2, 4)), torch.ones(2, 4)
    peftcore.activate(model, [])
    peftcore.activate(model, ["a0", "b"])
    assert torch.equal(model(x), grown)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 4 * LAYERS


def test_a_resting_adapter_does_not_train_whatever_acts() -> None:
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
    with pytest.raises(peftcore.PeftcoreError, match=r"lora takes no first values from data with these fields\. Leave"):
        peftcore.apply(nn.Sequential(nn.Linear(4, 4)), "lora", r=1, batches=[(torch.ones(1, 4),)])
