"""A module that adapters share: once in memory, on disk and in the optimizer, whatever becomes of the model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import tiny
from torch import nn

import peftcore
from peftcore.engine import applied, method_modules
from peftcore.plugin import Around, StateRules

pytestmark = pytest.mark.usefixtures("toys")


def adapted() -> nn.Module:
    torch.manual_seed(3)
    return peftcore.apply(tiny.llama(), "shared")


def banks(model: nn.Module) -> list[Any]:
    return [adapter.bank for adapter in method_modules(model, "default").values()]


def is_one(model: nn.Module) -> bool:
    first, second = banks(model)
    names = [name for name, p in model.named_parameters(remove_duplicate=False) if p is first.trained]
    return first is second and len(names) == 2 and sum(p is first.trained for p in model.parameters()) == 1


def emptied(model: nn.Module) -> nn.Module:
    """As `from_pretrained` and FSDP make models: shapes first, memory afterwards."""
    found = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    with torch.no_grad():
        found.load_state_dict(model.state_dict())
        for (_, there), (_, here) in zip(found.named_buffers(), model.named_buffers(), strict=True):
            there.copy_(here)
    return found


def on_disk(model: nn.Module, folder: Path) -> nn.Module:
    peftcore.save(model, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert sorted(name.rpartition(".")[2] for name in tensors) == ["drawn", "gate", "gate", "trained"]
    assert torch.equal(next(t for name, t in tensors.items() if name.endswith("drawn")), banks(model)[0].drawn)
    return peftcore.load(tiny.llama(), folder)


WAYS: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "pickle": lambda model, _: pickle.loads(pickle.dumps(model)),
    "to": lambda model, _: model.to(torch.float64).to(torch.float32),
    "to_empty": lambda model, _: emptied(model),
    "rest and act": lambda model, _: [peftcore.activate(model, names) for names in ([], ["default"])] and model,
    "disk": on_disk,
}


@pytest.mark.parametrize("way", WAYS)
def test_it_stays_one(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    config = type(applied(model, "default").config)
    monkeypatch.setattr(tiny, config.__name__, config, raising=False)  # where pickle looks for it
    with torch.no_grad():
        banks(model)[0].trained.add_(0.1)
    before = tiny.logits(model)
    found = WAYS[way](model, tmp_path)
    assert is_one(found)
    torch.testing.assert_close(tiny.logits(found), before, atol=1e-6, rtol=0)
    with torch.no_grad():
        banks(found)[0].trained.zero_()
    torch.testing.assert_close(tiny.logits(found), tiny.logits(tiny.llama()), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_it_is_moved_once_and_trained_once(dtype: torch.dtype | None) -> None:
    model = peftcore.apply(tiny.llama().bfloat16(), "shared", dtype=dtype)
    bank = banks(model)[0]
    assert is_one(model) and bank.trained.dtype == bank.drawn.dtype == (dtype or torch.float32)
    (group,) = [
        group for group in peftcore.parameter_groups(model, lr=1.0) if any(p is bank.trained for p in group["params"])
    ]
    assert sum(p is bank.trained for p in group["params"]) == 1
    assert not bank.drawn.requires_grad
    model(**tiny.inputs(model)).logits.float().square().mean().backward()
    assert bank.trained.grad.abs().sum() > 0


def test_a_compiled_model_computes_and_learns_the_same() -> None:
    def net() -> nn.Module:
        torch.manual_seed(3)
        return peftcore.apply(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "shared", target_modules=("0", "1"))

    x, (model, other) = torch.randn(2, 8), (net(), net())
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    for found in (model, compiled):
        found(x).square().sum().backward()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert not one.requires_grad or torch.equal(one.grad, two.grad)


def test_a_parameter_of_two_adapters_is_one_when_it_is_loaded(tmp_path: Path) -> None:
    def place(*_: Any) -> list[Around]:
        first, second = tiny.Scaled(2.0), tiny.Scaled(2.0)
        second.gain = first.gain
        return [Around("0", first), Around("1", second)]

    def gains(model: nn.Module) -> list[nn.Parameter]:
        return [adapter.gain for adapter in method_modules(model, "default").values()]

    state = StateRules(peft_type="TOY_TWINS", tensor_name=lambda _, name: f"base_model.{name}")
    with tiny.installed(tiny.method("twins", place, state=state)):
        model, other = (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2))
        peftcore.apply(model, "twins")
        with torch.no_grad():
            gains(model)[0].fill_(3.0)
        peftcore.save(model, tmp_path)
        first, second = gains(peftcore.load(other, tmp_path, check_base=False))
    assert first is second and first.item() == 3.0


def test_two_adapters_of_one_method_have_one_each() -> None:
    model = peftcore.apply(adapted(), "shared", adapter="other")
    mine, others = banks(model)[0], next(iter(method_modules(model, "other").values())).bank
    assert mine is not others and is_one(model)
    peftcore.remove(model, "default")
    assert sum(name.endswith("bank.trained") for name, _ in model.named_parameters()) == 1
