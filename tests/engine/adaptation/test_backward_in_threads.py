"""Between forward and backward: gradients arrive at the adapters that acted, or the change is refused."""

from collections.abc import Callable

import pytest
from support.threaded_layers import X, infer, layers, merge, switch, two_and_three
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftcore
from peftcore.engine import adapter_parameters, set_trainable

pytestmark = pytest.mark.usefixtures("toys", "switching_often")


def gradient(model: nn.Module, name: str) -> list[float]:
    return [p.grad.item() if p.grad is not None else 0.0 for _, p in adapter_parameters(model, name)]


@pytest.mark.parametrize(
    "change",
    [
        lambda m: peftcore.activate(m, "three"),
        lambda m: peftcore.activate(m, []),
        lambda m: peftcore.merge(m, undo=True),
        lambda m: peftcore.remove(m, "two"),
    ],
    ids=["activate", "rest", "merge", "remove"],
)
@pytest.mark.parametrize(
    "output", [lambda y: y, lambda y: {"loss": y}, lambda y: (None, [y])], ids=["tensor", "dict", "list"]
)
def test_a_backward_whose_gradients_would_be_lost_is_refused(change: Callable, output: Callable) -> None:
    model = two_and_three()
    model.register_forward_hook(lambda module, args, y: output(y))
    found = model(X)
    while not isinstance(found, Tensor):
        found = found["loss"] if isinstance(found, dict) else found[-1]
    change(model)
    with pytest.raises(
        peftcore.PeftcoreError,
        match=r"\['two'\] was active in the forward pass but has been deactivated",
    ):
        found.sum().backward()


def test_gradients_arrive_where_the_same_adapters_act_again() -> None:
    model = two_and_three()
    loss = model(X).sum()
    with peftcore.disabled(model):
        assert infer(model) == 1.0
    switch(model)
    merge(model)
    loss.backward()
    assert gradient(model, "two") == [8.0] * 4
    loss = model(X).sum()
    with peftcore.disabled(model):
        loss.backward()
    assert gradient(model, "two") == [16.0] * 4


def test_what_is_not_trained_may_change() -> None:
    model = two_and_three()
    set_trainable(model, "two", False)
    x = X.clone().requires_grad_()
    y = model(x)
    peftcore.activate(model, "three")
    y.sum().backward()
    assert x.grad.item() == 16.0


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.inner, self.use_reentrant = inner, use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_part_runs_again_as_in_its_forward(use_reentrant: bool) -> None:
    model = Checkpointed(layers(), use_reentrant)
    peftcore.apply(model, "around", target_modules=["0", "1", "2", "3"])
    x = X.clone().requires_grad_()
    with peftcore.disabled(model):
        base = model(x)
    y = model(x)
    base.sum().backward()
    assert x.grad.item() == 1.0
    with peftcore.disabled(model):
        y.sum().backward()
    assert x.grad.item() == 17.0
    assert gradient(model, "default") == [8.0] * 4


def test_a_checkpointed_part_with_other_adapters_is_refused() -> None:
    model = Checkpointed(layers(), False)
    for name in ("a", "b"):
        peftcore.apply(model, "around", target_modules=["0", "1", "2", "3"], adapter=name)
    peftcore.activate(model, "a")
    y = model(X)
    peftcore.activate(model, ["a", "b"])
    with pytest.raises(peftcore.PeftcoreError, match=r"backward\(\) recomputes a checkpointed module"):
        y.sum().backward()
