"""Walks over modules find what PyTorch's own methods find."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftcore.plugin.modules import own_tensors, parts


class Double(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("weight", nn.Parameter(torch.full((2,), 2.0)))


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
