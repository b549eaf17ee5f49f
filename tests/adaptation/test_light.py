"""A module without PyTorch's empty tables of hooks is used as any other."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftcore.adaptation.light import LightAdapter, own_tensors, parts


class Double(LightAdapter):
    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("weight", nn.Parameter(torch.full((2,), 2.0)))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


X = torch.tensor([1.0, 3.0])


def test_tables_are_made_when_they_are_read() -> None:
    module = Double()
    assert sorted(module.__dict__) == ["_buffers", "_is_full_backward_hook", "_modules", "_parameters", "training"]
    assert module._forward_hooks is module._forward_hooks == {}
    assert module._forward_hooks is not Double()._forward_hooks
    assert torch.equal(module(X), 2 * X)
    assert {name: getattr(module, name) for name in vars(nn.Module())}.keys() == module.__dict__.keys()


def test_hooks_of_every_kind() -> None:
    module, seen = Double(), list[str]()

    def note(name: str) -> Any:
        return lambda *_: seen.append(name)

    registered = [
        module.register_forward_pre_hook(note("forward pre")),
        module.register_forward_hook(note("forward")),
        module.register_full_backward_pre_hook(note("backward pre")),
        module.register_full_backward_hook(note("backward")),
        module.register_state_dict_pre_hook(note("state pre")),
        module.register_state_dict_post_hook(note("state")),
        module.register_load_state_dict_pre_hook(note("load pre")),
        module.register_load_state_dict_post_hook(note("load")),
    ]
    for _ in range(2):
        module(X.clone().requires_grad_()).sum().backward()
        module.load_state_dict(module.state_dict())
        for handle in registered:
            handle.remove()
    assert sorted(seen) == sorted(
        f"{kind}{pre}" for kind in ("forward", "backward", "state", "load") for pre in ("", " pre")
    )


def test_buffers_that_are_not_saved() -> None:
    module = Double()
    module.register_buffer("kept", torch.ones(1))
    module.register_buffer("left", torch.ones(1), persistent=False)
    assert list(module.state_dict()) == ["weight", "kept"]
    del module.left
    assert module._non_persistent_buffers_set == set()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copied: Any) -> None:
    module = Double()
    module.register_forward_hook(_negate)
    assert torch.equal(copied(module)(X), -2 * X)
    assert torch.equal(copied(Double())(X), 2 * X)


def _negate(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return -output


def test_compiled_before_and_after_a_hook_comes() -> None:
    module = Double().requires_grad_(False)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert torch.equal(compiled(X), 2 * X)
    handle = module.register_forward_hook(_negate)
    assert torch.equal(compiled(X), -2 * X)
    handle.remove()
    assert torch.equal(compiled(X), 2 * X)


class Extra(Double):
    def get_extra_state(self) -> Tensor:
        return torch.ones(1)


class OtherNames(Double):
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}other"] = self.weight if keep_vars else self.weight.detach()


def _with_children(*inside: nn.Module) -> nn.Module:
    module = Double()
    module.register_buffer("kept", torch.ones(1))
    module.register_buffer("left", torch.ones(1), persistent=False)
    module.register_parameter("none", None)
    for i, child in enumerate((nn.Linear(2, 2), *inside, nn.BatchNorm1d(2))):
        module.add_module(f"child{i}", child)
    module.add_module("nothing", None)
    return module


def _with_hook(register: str) -> nn.Module:
    def rename(module: nn.Module, *found: Any) -> None:
        if found and isinstance(found[0], dict):
            found[0][f"{found[1]}renamed"] = found[0].pop(f"{found[1]}weight")

    module = _with_children()
    getattr(module.child0, register)(rename)
    return module


@pytest.mark.parametrize(
    "module",
    [
        Double(),
        nn.Identity(),
        _with_children(),
        _with_children(_with_children()),
        _with_children(Extra()),
        _with_children(OtherNames()),
        _with_hook("register_state_dict_post_hook"),
        _with_hook("register_state_dict_pre_hook"),
    ],
)
def test_own_tensors_are_those_of_the_state_dict(module: nn.Module) -> None:
    found = own_tensors(module)
    wanted = module.state_dict(keep_vars=True)
    assert list(found) == list(wanted)
    assert all(found[name] is wanted[name] or isinstance(module.child1, Extra) for name in wanted)
    assert set(parts(module)) == set(module.modules())


def test_reading_own_tensors_makes_no_table() -> None:
    module = Double()
    assert list(own_tensors(module)) == ["weight"]
    assert not {name for name in module.__dict__ if name.endswith("_hooks")}
