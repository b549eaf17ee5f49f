"""Changes of a model's adapters that are interrupted at any line: as before, or finished."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from threading import Thread
from typing import Any

import pytest
import torch
from interrupting import interrupted
from torch import nn

import peftcore
from peftcore.engine import set_trainable

pytestmark = pytest.mark.usefixtures("toys")
_INPUT = torch.eye(4)


def _one() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    return peftcore.apply(model, "around", target_modules=("0", "1"), value=3.0)


def _two() -> nn.Module:
    model = peftcore.apply(_one(), "train", names=("1.bias",), adapter="b")
    with torch.no_grad():
        model[1].bias.mul_(2)
    return model


def _norm() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(4))


def _fused() -> nn.Module:
    return peftcore.fuse(_norm())


def _apply_another(model: nn.Module) -> None:
    peftcore.apply(model, "around", target_modules=("0",), value=5.0, adapter="c")


def _facts(model: nn.Module) -> list[Any]:
    """Return what a change of adapters may change."""
    found: list[Any] = [model(_INPUT).tolist()]
    for path, module in model.named_modules():
        names = sorted(name for name in module.__dict__ if name.startswith("_peftcore"))
        found.append((path, type(module).__mro__, names))
    found += [(name, each.requires_grad, each.tolist()) for name, each in model.named_parameters()]
    state = peftcore.engine.state_of(model)
    if state is not None:
        entries = [(name, each.trainable, each.multiplier, each.frozen) for name, each in state.applied.items()]
        counts = {path: site.adapters for path, site in state.sites.items()}
        found += [entries, counts, state.active, state.lock.activation]
    return found


_REMOVING = ("adaptation/adapted.py", "engine/removing.py", "engine/trained.py")
_CHANGES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any], tuple[str, ...]]] = {
    "remove the last one": (_one, peftcore.remove, _REMOVING),
    "remove the first of two": (_two, peftcore.remove, _REMOVING),
    "remove trained parameters": (_two, lambda model: peftcore.remove(model, "b"), _REMOVING),
    "apply another": (_one, _apply_another, ("engine/applying.py", "adaptation/adapted.py")),
    "activate": (_two, lambda model: peftcore.activate(model, "b"), ("engine/activating.py", "engine/trained.py")),
    "set_trainable": (_two, lambda model: set_trainable(model, "b", False), ("engine/activating.py",)),
    "fuse": (_norm, peftcore.fuse, ("adaptation/fused_forward.py",)),
    "stop fusing": (_fused, lambda model: peftcore.fuse(model, enabled=False), ("adaptation/fused_forward.py",)),
}


@pytest.mark.parametrize("name", _CHANGES)
def test_an_interrupted_change_is_undone_or_finished(name: str) -> None:
    make, change, files = _CHANGES[name]
    model = make()
    finished = deepcopy(model)
    change(finished)
    wanted = [_facts(model), _facts(finished)]
    for each, line in interrupted(lambda: deepcopy(model), change, files):
        assert _facts(each) in wanted, line


def test_the_lock_of_an_interrupted_change_is_free() -> None:
    model = _one()
    for each, line in interrupted(
        lambda: deepcopy(model), lambda each: peftcore.activate(each, []), ("adaptation/concurrency.py",)
    ):
        other = Thread(target=each, args=(_INPUT,), daemon=True)
        other.start()
        other.join(20)
        assert not other.is_alive(), line
