"""Conditions in a model's code: settings, fields of its config, and arguments that nobody passes."""

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import peftcore
from peftcore.engine import applied
from peftcore.observation import bypassed


class Layer(nn.Module):
    """`dense` is read where there is a `query`."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(8, 8)

    def forward(self, x: Tensor, scale: float = 1.0, query: Tensor | None = None) -> Tensor:
        if query is None:
            return self.dense(x) * scale
        return F.linear(query, self.dense.weight)


class Outer(nn.Module):
    """Calls its `layer` as `call` does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.times, self.config = Layer(), 0, types.SimpleNamespace(model_type="outer", pieces=1)


class Never(Outer):
    def forward(self, x: Tensor, query: None = None) -> Tensor:
        for _ in range(1):
            x = self.layer(x, 2.0)
            x = self.layer(x, query=None)
        if self.times > 1:
            x = self.layer(x, query=x)
        return x


class ByKeyword(Outer):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, query=x if x.is_cuda else None)


class ByPosition(Outer):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, 1.0, x) if x.is_cuda else self.layer(x)


class ByDictionary(Outer):
    def forward(self, x: Tensor, **more: Any) -> Tensor:
        return self.layer(x, **more)


class ByAnotherName(Outer):
    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        return layer(x, query=x) if x.is_cuda else layer(x)


def helped(layer: nn.Module, x: Tensor, query: Tensor | None) -> Any:
    return layer(x, query=query)


class ByAFunction(Outer):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = helped(self.layer, x, x if x.is_cuda else None)
        return y


class First(nn.Module):
    """Its only argument has a default, and decides."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(8, 8)

    def forward(self, x: Tensor | None = None) -> Tensor:
        return self.dense(torch.ones(8)) if x is None else F.linear(x, self.dense.weight)


class InASequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Sequential(First())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.parts(x)
        return y


class Between(nn.Module):
    """Passes on what it gets, and changes it behind that, or in a loop before the next time."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.inner = layer

    def forward(self, x: Tensor, query: Tensor | None = None) -> Tensor:
        x = self.inner(x, query=query)
        if query is None:
            query = x
        return x + query


class InALoop(Between):
    def forward(self, x: Tensor, query: Tensor | None = None) -> Tensor:
        for _ in range(2):
            x = self.inner(x, query=query)
            query = x if x.is_cuda else None
        return x


class Through(Outer):
    def __init__(self, between: Callable[[Layer], nn.Module]) -> None:
        super().__init__()
        self.layer = between(Layer())  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (Never(), set()),
        (ByKeyword(), {"layer.dense"}),
        (ByPosition(), {"layer.dense"}),
        (ByDictionary(), {"layer.dense"}),
        (ByAnotherName(), {"layer.dense"}),
        (ByAFunction(), {"layer.dense"}),
        (InASequence(), {"parts.0.dense"}),
        (Through(Between), set()),
        (Through(InALoop), {"layer.inner.dense"}),
        (Layer(), {"dense"}),  # whose arguments are the user's
    ],
    ids=lambda each: type(each).__name__,
)
def test_arguments_that_nobody_passes(model: nn.Module, found: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from peftcore.observation import inputs

    monkeypatch.setattr(inputs, "BUILDERS", {"x": lambda facts: facts.floats(2, 8)})
    assert set(bypassed(model)) == found


def test_settings_decide_who_passes() -> None:
    model = Never()
    model.times = 2
    assert set(bypassed(model)) == {"layer.dense"}


class InPieces(Outer):
    """The code of models with `pretraining_tp`."""

    def forward(self, x: Tensor) -> Tensor:
        if self.config.pieces > 1:
            return F.linear(x, self.layer.dense.weight)
        return self.layer(x)


def test_fields_of_the_config_are_settings() -> None:
    model = InPieces()
    assert bypassed(model) == {}
    model.config.pieces = 2  # what is remembered was found with another value
    assert set(bypassed(model)) == {"layer.dense"}
    model.config.pieces = 1
    assert bypassed(model) == {}


def test_deberta_takes_the_default_of_peft() -> None:
    """Its `in_proj` is read by layers that run again on their output, which they do `z_steps` times: never."""
    config = transformers.DebertaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        relative_attention=True, pos_att_type=["c2p", "p2c"],
    )  # fmt: skip
    model = transformers.DebertaForSequenceClassification(config).eval()
    assert bypassed(model) == {}
    peftcore.apply(model, "lora", target_modules=["in_proj"], r=2)
    assert applied(model, "default").paths == ("deberta.encoder.layer.0.attention.self.in_proj",)
    model(input_ids=torch.arange(6)[None], labels=torch.tensor([1])).loss.backward()
    assert all(p.grad is not None for _, p in peftcore.engine.adapter_parameters(model, "default"))
    again = transformers.DebertaForSequenceClassification(config)
    again.deberta.z_steps = 2
    with pytest.raises(peftcore.PeftcoreError, match="in_proj' would do nothing"):
        peftcore.apply(again, "lora", target_modules=["in_proj"])
