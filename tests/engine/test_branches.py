"""Combiners: adapters that call others of their module, each alone around its own forward."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from support.threaded_layers import X, layers
from torch import Tensor, nn

import peftcore
from peftcore.engine import adapter_parameters, set_trainable
from peftcore.plugin import Around


class Combined(nn.Module):
    """y = base(x) + Σ share · (branch(x) - own(x))."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names
        self.share = nn.Parameter(torch.ones(len(names)))

    def forward(self, base: Any, x: Tensor) -> Tensor:
        own = base.own(x)
        changes = [share * (base.branch(name)(x) - own) for share, name in zip(self.share, self.names, strict=True)]
        return base(x) + sum(changes)


class Astray(Combined):
    def forward(self, base: Any, x: Tensor) -> Tensor:
        return base.branch("other")(x)


def place(kind: type[nn.Module]) -> Any:
    return lambda model, config, _: [
        Around(path, kind(config.names), branches=config.names) for path in config.target_modules
    ]


@pytest.fixture(autouse=True)
def combiners(toys: None) -> Iterator[None]:
    with tiny.installed(tiny.method("combined", place(Combined)), tiny.method("astray", place(Astray))):
        yield


LAYERS = ("0", "1")
TWO_AND_THREE = ("two", "three")


def two_and_three(model: nn.Module | None = None) -> Any:
    """Two layers of y = x, with 'two' that doubles each and 'three'; both rest."""
    model = layers(2, nn.Linear) if model is None else model
    for name, value in zip(TWO_AND_THREE, (2.0, 3.0), strict=True):
        peftcore.apply(model, "around", target_modules=LAYERS, value=value, adapter=name)
    peftcore.activate(model, [])
    return model


def combined(model: nn.Module | None = None, names: tuple[str, ...] = TWO_AND_THREE, **kwargs: Any) -> Any:
    model = two_and_three() if model is None else model
    return peftcore.apply(model, "combined", target_modules=LAYERS, names=names, adapter="both", **kwargs)


def out(model: nn.Module, x: Tensor = X) -> float:
    with torch.no_grad():
        return model(x).item()


def test_branches_run_alone_and_not_by_themselves() -> None:
    model = combined()
    assert out(model) == 4.0**2  # 1 + 1 + 2 in each layer
    with peftcore.disabled(model):
        assert out(model) == 1.0
    peftcore.activate(model, ["two", "three"])
    assert out(model) == 6.0**2
    for names in (["two", "both"], ["both"], "both", ["both", "three"]):
        peftcore.activate(model, names)
        assert out(model) == 4.0**2
    assert peftcore.engine.state_of(model).active == ("two", "both", "three")
    peftcore.activate(model, "three")
    assert out(model) == 9.0
    assert out(combined(peftcore.remove(combined(), "both"))) == 16.0


def test_applied_beside_active_ones() -> None:
    model = two_and_three()
    peftcore.activate(model, ["two", "three"])
    assert out(combined(model)) == 16.0
    peftcore.apply(model, "around", target_modules=LAYERS, value=10.0, adapter="outer")
    assert out(model) == 40.0**2
    peftcore.activate(model, ["outer", "both"])  # now it stands inside: 10 + 1 + 2
    assert out(model) == 13.0**2
    peftcore.remove(model, "both")
    assert out(model) == 100.0


def test_where_the_combiner_is_not_its_branches_rest() -> None:
    model = two_and_three()
    peftcore.apply(model, "combined", target_modules=("0",), names=TWO_AND_THREE, adapter="both")
    assert out(model) == 4.0


def test_branches_are_frozen_by_the_combiner() -> None:
    model = two_and_three()
    set_trainable(model, "three", False)
    combined(model)
    model(X).sum().backward()
    for name in TWO_AND_THREE:
        assert [(p.requires_grad, p.grad) for _, p in adapter_parameters(model, name)] == [(False, None)] * 2
    assert all(p.grad is not None for _, p in adapter_parameters(model, "both"))
    peftcore.remove(model, "both")
    peftcore.activate(model, ["two", "three"])
    assert [all(p.requires_grad for _, p in adapter_parameters(model, name)) for name in TWO_AND_THREE] == [True, False]


def test_a_branch_that_was_frozen_by_hand_stays_frozen() -> None:
    model = combined()
    set_trainable(model, "two", False)
    peftcore.remove(model, "both")
    peftcore.activate(model, ["two", "three"])
    assert [all(p.requires_grad for _, p in adapter_parameters(model, name)) for name in TWO_AND_THREE] == [False, True]


def test_branches_train_where_they_are_let() -> None:
    model = combined()
    set_trainable(model, "two", True)
    model(X).sum().backward()
    assert [p.grad.item() for _, p in adapter_parameters(model, "two")] == [4.0, 4.0]
    assert [p.grad for _, p in adapter_parameters(model, "three")] == [None, None]
    assert all(p.grad is not None for _, p in adapter_parameters(model, "both"))
    peftcore.activate(model, [])
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed(use_reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    model, x = combined(), X.clone().requires_grad_()
    set_trainable(model, "two", True)
    checkpoint(model, x, use_reentrant=use_reentrant).sum().backward()
    assert [p.grad.item() for _, p in adapter_parameters(model, "two")] == [4.0, 4.0]


def test_samples_may_go_through_a_combiner() -> None:
    model = combined()
    peftcore.activate(model, ["both", None, "three", "both"], per_sample=True)
    with torch.no_grad():
        assert model(torch.ones(4, 1)).flatten().tolist() == [16.0, 1.0, 9.0, 16.0]


def test_copies_and_graphs() -> None:
    model = combined()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        next(iter(adapter_parameters(twin, "two")))[1].fill_(5.0)
    assert out(twin) == 7.0 * 4.0 and out(model) == 16.0
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert out(compiled) == 16.0
    peftcore.activate(model, "two")
    assert out(compiled) == 4.0


def test_saved_together_and_alone(tmp_path: Path) -> None:
    model = combined()
    peftcore.save(model, tmp_path / "all")
    peftcore.save(model, tmp_path / "both", adapter="both")
    fresh = peftcore.load(layers(2, nn.Linear), tmp_path / "all")
    assert out(fresh) == 16.0
    assert out(peftcore.load(two_and_three(), tmp_path / "both", adapter="both")) == 16.0
    plain = layers(2, nn.Linear)
    with pytest.raises(peftcore.PeftcoreError, match=r"combines 'two', which is not applied.*peftcore\.load"):
        peftcore.load(plain, tmp_path / "both", adapter="both")
    assert out(plain) == 1.0 and not hasattr(plain[0], "peftcore")


def refusing(match: str) -> Any:
    return pytest.raises(peftcore.PeftcoreError, match=match)


def test_what_is_no_branch_is_refused() -> None:
    model = two_and_three()
    with refusing(r"combines 'four', which is not applied \(applied: two, three\)"):
        combined(model, ("two", "four"))
    with refusing("'both' cannot combine itself"):
        combined(model, ("two", "both"))
    peftcore.apply(model, "around", target_modules=("0",), adapter="first")
    with refusing(r"combines 'first' on '1', but 'first' \(around\) is not attached there. It is attached to '0'"):
        combined(model, ("first",))
    peftcore.apply(model, "train", names=("0.bias",), adapter="biases")
    with refusing(r"cannot combine 'biases' \(train\): it trains base parameters"):
        combined(model, ("biases",))
    combined(model)
    with refusing(r"cannot combine 'both' \(combined\): it is itself a combination of adapters \(two, three\)"):
        peftcore.apply(model, "combined", target_modules=LAYERS, names=("both",), adapter="twice")
    astray = peftcore.apply(two_and_three(), "astray", target_modules=LAYERS, names=TWO_AND_THREE)
    with refusing("'other' is not a branch of this placement, which combines two, three"):
        out(astray)


def test_a_branch_stays_while_it_is_combined() -> None:
    model = combined()
    with refusing(r"cannot remove 'two': 'both' combines it. First peftcore.remove\(model, 'both'\)"):
        peftcore.remove(model, "two")
    with refusing("cannot be merged"):
        peftcore.merge(model, undo=True)
    peftcore.activate(model, "two")
    with refusing("cannot remove 'two': 'both' combines it"):
        peftcore.merge(model)
    peftcore.merge(model, undo=True)
    assert out(model) == 4.0
    with refusing("merged"):
        peftcore.activate(model, "both")
    peftcore.unmerge(model)
    peftcore.activate(model, "both")
    assert out(model) == 16.0
    assert out(peftcore.remove(peftcore.remove(peftcore.remove(model, "both"), "two"), "three")) == 1.0
