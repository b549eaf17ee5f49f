"""The class swap: what stays the same while adapters stand around a module, and after."""

import copy
import functools
import pickle

import pytest
import torch
from support import tiny
from torch import nn

import peftcore
from peftcore.engine.adaptation import adapted
from peftcore.model.base_modules import base_modules, base_parameters
from peftcore.plugin.placements.after import AfterLink


def test_swap_keeps_keys_names_instance_and_hooks() -> None:
    linear = nn.Linear(3, 2)
    seen = []
    linear.register_forward_hook(lambda module, args, output: seen.append(output))
    keys = list(linear.state_dict())
    adapted.attach(linear, "a", tiny.Scaled(2.0))
    adapted.activate(linear, ["a"])
    x = torch.randn(4, 3)
    assert isinstance(linear, nn.Linear)
    assert type(linear).__name__ == "Linear"
    assert list(linear.state_dict())[:2] == keys
    torch.testing.assert_close(linear(x), 2 * nn.functional.linear(x, linear.weight, linear.bias))
    assert len(seen) == 1


def test_chain_runs_in_the_order_of_activation() -> None:
    linear = nn.Linear(3, 2)
    adapted.attach(linear, "double", tiny.Scaled(2.0))
    adapted.attach(linear, "shift", tiny.Shifted(1.0), link=AfterLink)
    x = torch.randn(4, 3)
    y = nn.functional.linear(x, linear.weight, linear.bias)
    for names, wanted in (
        (["double", "shift"], 2 * y + 1),
        (["shift", "double"], 2 * (y + 1)),
        (["shift"], y + 1),
        ([], y),
    ):
        adapted.activate(linear, names)
        torch.testing.assert_close(linear(x), wanted)


def test_detaching_the_last_restores_class_and_dict() -> None:
    linear = nn.Linear(3, 2)
    before = dict(linear.__dict__)
    adapted.attach(linear, "a", tiny.Scaled(2.0))
    adapted.attach(linear, "b", tiny.Scaled(3.0))
    adapted.detach(linear, "a")
    assert adapted.is_adapted(linear)
    adapted.detach(linear, "b")
    assert type(linear) is nn.Linear
    assert linear.__dict__.keys() == before.keys()
    assert list(linear._modules) == []


def test_the_class_is_cached() -> None:
    first, second = nn.Linear(3, 2), nn.Linear(5, 5)
    for linear in (first, second):
        adapted.attach(linear, "a", tiny.Scaled(2.0))
    assert type(first) is type(second)


def test_an_instance_forward_stays_in_the_chain() -> None:
    """accelerate's hooks set `module.forward` on the instance, which would shadow the class."""
    linear = nn.Linear(3, 2)
    own = functools.partial(lambda module, x: nn.Linear.forward(module, x) + 10, linear)
    linear.forward = own
    adapted.attach(linear, "a", tiny.Scaled(2.0))
    adapted.activate(linear, ["a"])
    x = torch.randn(4, 3)
    torch.testing.assert_close(linear(x), 2 * (nn.functional.linear(x, linear.weight, linear.bias) + 10))
    adapted.detach(linear, "a")
    assert linear.forward is own


class TupleOutput(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:
        return x, "kept"


def test_after_changes_the_first_of_a_tuple() -> None:
    module = TupleOutput()
    adapted.attach(module, "shift", tiny.Shifted(1.0), link=AfterLink)
    adapted.activate(module, ["shift"])
    x = torch.randn(2)
    y, rest = module(x)
    torch.testing.assert_close(y, x + 1)
    assert rest == "kept"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_have_a_chain_of_their_own(copied) -> None:
    linear = nn.Linear(3, 2)
    adapted.attach(linear, "a", tiny.Scaled(2.0))
    adapted.activate(linear, ["a"])
    twin = copied(linear)
    x = torch.randn(4, 3)
    assert torch.equal(twin(x), linear(x))
    with torch.no_grad():
        twin.weight.zero_()
        twin.bias.zero_()
    assert twin(x).abs().max() == 0
    assert linear(x).abs().max() > 0


@pytest.mark.parametrize("name", ["keys", "default", "a b", "0"])
def test_names_that_a_module_dict_would_refuse(name: str) -> None:
    linear = nn.Linear(3, 2)
    adapted.attach(linear, name, tiny.Scaled(2.0))
    assert f"peftcore.{name}.gain" in linear.state_dict()


def test_base_modules_and_parameters_leave_adapters_out() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    wanted = [name for name, _ in model.named_modules()], [name for name, _ in model.named_parameters()]
    adapted.attach(model[0], "a", tiny.Scaled(2.0))
    assert [name for name, _ in base_modules(model)] == wanted[0]
    assert [name for name, _ in base_parameters(model)] == wanted[1]


def test_tied_parameters_under_each_of_their_names() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    assert [name for name, p in base_parameters(model) if p is model[0].weight] == ["0.weight", "1.weight"]


def test_a_sequential_runs_as_before(toys: None) -> None:
    """Its children are called in turn, and what peftcore keeps there is a child."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU())), torch.randn(3, 4)
    base = model(x)
    peftcore.apply(model, "train", names=("0.bias",))
    assert torch.equal(model(x), base)
    adapted.attach(model[1], "behind", tiny.Shifted(2.0), link=AfterLink)
    assert torch.equal(model(x), base)
    adapted.activate(model[1], ["behind"])
    assert torch.equal(model(x), base + 2.0)


def test_what_is_made_by_the_class_of_a_model_has_no_adapters(toys: None) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    peftcore.apply(model, "around", target_modules=("1",))
    x = torch.randn(2, 4)
    for other in (model[:1], type(model)(*model)[:1], type(model[1])(4, 4)):
        assert other(x).shape == (2, 4)
        assert type(other) in (nn.Sequential, nn.Linear)
    assert type(model) is not nn.Sequential
    assert torch.equal(type(model)(*model)(x), model(x))


class Outer(nn.Module):
    """A module of one's own, in which an adapted layer is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + 1

    def generate(self, x: torch.Tensor) -> torch.Tensor:
        return self(self(x))


COMPILED = {
    "model": lambda model: model,
    "generate": lambda model: model.generate,
    "layer": lambda model: model.layer,
    "forward of a layer": lambda model: model.layer.forward,
}


@pytest.mark.parametrize("part", list(COMPILED))
@pytest.mark.usefixtures("toys")
def test_what_was_compiled_or_kept_runs_after_remove(part: str) -> None:
    torch._dynamo.reset()
    model, x = Outer(), torch.randn(2, 3)
    base = COMPILED[part](model)(x)
    peftcore.apply(model, "around", target_modules=["layer"])
    adapted_output = COMPILED[part](model)(x)
    assert not torch.allclose(adapted_output, base)
    kept = COMPILED[part](model)
    compiled = kept if part == "generate" else torch.compile(kept, backend="eager")  # generate takes a lock
    torch.testing.assert_close(compiled(x), adapted_output)
    peftcore.remove(model)
    torch.testing.assert_close(compiled(x), base)
    peftcore.apply(model, "around", target_modules=["layer"])
    torch.testing.assert_close(compiled(x), adapted_output)


@pytest.mark.usefixtures("toys")
def test_a_compiled_sequential_runs_after_remove() -> None:
    """Its forward is PyTorch's own, which the tracer treats in another way."""
    torch._dynamo.reset()
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), torch.randn(2, 3)
    base = model(x)
    peftcore.apply(model, "around", target_modules=["0"])
    compiled, adapted_output = torch.compile(model, backend="eager"), model(x)
    torch.testing.assert_close(compiled(x), adapted_output)
    peftcore.remove(model)
    torch.testing.assert_close(compiled(x), base)
    peftcore.apply(model, "around", target_modules=["0"])
    torch.testing.assert_close(compiled(x), adapted_output)
