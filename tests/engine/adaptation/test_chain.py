"""`base.weight()`: the dense weight as adapters inside change it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import tiny
from torch import Tensor, nn

import peftcore
from peftcore.plugin import Around
from peftcore.testing import disturb

pytestmark = pytest.mark.usefixtures("toys")
X = torch.linspace(-1, 1, 5 * 64).sin().view(5, 64)


class Normed(nn.Module):
    """y = base(x) / |W|, of all that is inside."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        type(self).seen = weight = base.weight()
        y = base(*args, **kwargs)
        return y / weight.float().norm().to(y.dtype) * self.gain.to(y.dtype)


@pytest.fixture
def normed() -> Any:
    with tiny.installed(tiny.method("normed", lambda model, *_: [Around("0", Normed())])):
        yield


def gpt2_layer() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(32, 64)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "bf16", "4 bits"])
def test_it_is_the_weight_in_the_layout_of_the_format(kind: str, normed: None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(gpt2_layer() if kind == "conv1d" else nn.Linear(64, 32), nn.Linear(32, 2))
    x = X
    if kind == "4 bits":
        peftcore.quantize(model, skip=["1"])
        wanted = model[0].dequantized(torch.float32)
    else:
        if kind == "bf16":
            model, x = model.bfloat16(), X.bfloat16()
        wanted = model[0].weight.T if kind == "conv1d" else model[0].weight
    peftcore.apply(model, "normed")
    model(x)
    assert torch.equal(Normed.seen, wanted) and Normed.seen.dtype is wanted.dtype


@pytest.mark.parametrize("inside", ["around", "lora", "on-weight"])
def test_adapters_inside_change_it_and_get_gradients(inside: str, normed: None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32))
    fields = {"names": ("0:weight",)} if inside == "on-weight" else {"target_modules": ("0",)}
    peftcore.apply(model, inside, adapter="inner", **fields)
    disturb(model, "inner", seed=1)
    peftcore.apply(model, "normed", adapter="outer")
    y = model(X)
    whole = Normed.seen
    with torch.no_grad():
        peftcore.activate(model, "inner")
        torch.testing.assert_close(y, model(X) / whole.norm())
        peftcore.merge(model, undo=True)
        torch.testing.assert_close(model[0].weight, whole)
        peftcore.unmerge(model)
    peftcore.activate(model, ["inner", "outer"])
    model(X)
    Normed.seen.sum().backward()
    inner = model[0].peftcore["inner"]
    assert all(p.grad is not None for p in inner.parameters())


def test_an_adapter_inside_that_is_no_change_of_a_weight_is_named(normed: None) -> None:
    model = tiny.llama()
    path = "model.layers.0.self_attn"
    place = lambda *_: [Around(path, Normed())]  # noqa: E731
    with tiny.installed(tiny.method("reads", place)):
        peftcore.apply(model, "after", adapter="inner")
        peftcore.apply(model, "reads", adapter="outer")
        with pytest.raises(
            peftcore.PeftcoreError,
            match=r"active adapter 'inner' \(Shifted\) around that module does not act as a change",
        ):
            tiny.logits(model)
        peftcore.activate(model, ["outer"])
        with pytest.raises(peftcore.PeftcoreError, match="no weight format reads"):
            tiny.logits(model)


def test_it_is_compiled_whole(normed: None) -> None:
    torch.manual_seed(0)
    for packed in (False, True):
        model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 2))
        if packed:
            peftcore.quantize(model, skip=["1"])
        place = lambda *_: [Around("0", Divided())]  # noqa: E731
        with tiny.installed(tiny.method("divided", place)):
            peftcore.apply(model, "around", target_modules=("0",), adapter="inner")
            peftcore.apply(model, "divided", adapter="outer")
            wanted = model(X)
            found = torch.compile(model, fullgraph=True, backend="aot_eager")(X)
            torch.testing.assert_close(found, wanted)


class Divided(nn.Module):
    def forward(self, base: Any, x: Tensor) -> Tensor:
        return base(x) / base.weight().norm()


class Told(nn.Module):
    """Keeps what it is told of those inside."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.inside: list[nn.Module] = []

    def forward(self, base: Any, x: Tensor) -> Any:
        self.inside, link = [], base
        while link.adapter is not None:
            self.inside.append(link.adapter)
            link = link.inside
        return base(x) * self.gain


def test_an_adapter_knows_those_that_act_before_it() -> None:
    def place(model: nn.Module, config: Any, architecture: Any) -> list[Any]:
        return [Around("0", Told())]

    model = nn.Sequential(nn.Linear(64, 32))
    with tiny.installed(tiny.method("told", place)):
        for name in "abc":
            peftcore.apply(model, "told", adapter=name)
        told: dict[str, Any] = {name: dict(peftcore.engine.adapter_modules(model, name))["0"] for name in "abc"}
        model(X)
        assert told["a"].inside == [] and told["b"].inside == [told["a"]]
        assert told["c"].inside == [told["b"], told["a"]]
        peftcore.activate(model, ["c", "a"])
        model(X)
        assert told["a"].inside == [told["c"]] and told["c"].inside == []


def test_a_weight_that_trains_too_gets_its_gradient() -> None:
    model = peftcore.apply(nn.Sequential(nn.Linear(64, 3)), "lora", target_modules=["0"])
    model[0].weight.requires_grad_()
    model(X).sum().backward()
    torch.testing.assert_close(model[0].weight.grad, X.sum(0).expand(3, -1))
