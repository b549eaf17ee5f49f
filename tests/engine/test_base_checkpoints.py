"""`load_state_dict` of a model with adapters: checkpoints of its base, and its own."""

import copy

import pytest
import torch
from support import tiny
from torch import nn

import peftcore


def adapted() -> nn.Module:
    return peftcore.apply(tiny.llama(), "around", target_modules=("q_proj",), value=3.0)


def other_base() -> nn.Module:
    base = tiny.llama()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(1.5)
    return base


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("copied", [False, True])
def test_a_checkpoint_of_the_base_loads_strictly(toys: None, copied: bool, assign: bool) -> None:
    model, base = adapted(), other_base()
    if copied:
        model = copy.deepcopy(model)
    wanted = peftcore.apply(other_base(), "around", target_modules=("q_proj",), value=3.0)
    adapters = peftcore.state_dict(model, "default")
    model.load_state_dict(base.state_dict(), assign=assign)
    assert torch.equal(tiny.logits(model), tiny.logits(wanted))
    assert all(torch.equal(value, adapters[name]) for name, value in peftcore.state_dict(model, "default").items())
    peftcore.remove(model)
    assert not model._load_state_dict_pre_hooks and torch.equal(tiny.logits(model), tiny.logits(base))


def test_a_checkpoint_that_lacks_some_of_the_adapters_is_refused(toys: None) -> None:
    model = adapted()
    state = model.state_dict()
    state.pop(next(key for key in state if ".peftcore." in key))
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state)


def test_where_the_weights_of_the_base_are_replaced_nothing_is_added(toys: None) -> None:
    model = peftcore.merge(adapted(), undo=True)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(tiny.llama().state_dict())
    model = peftcore.apply(adapted(), "train", adapter="second", names=("model.norm.weight",))
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(tiny.llama().state_dict())


def test_within_another_module(toys: None) -> None:
    model = nn.Sequential(adapted())
    model.load_state_dict({f"0.{name}": value for name, value in other_base().state_dict().items()})
