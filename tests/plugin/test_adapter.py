"""`Adapter`: what it says of members that a class does not have, and errors for members that nobody would call."""

import pytest
import torch
from support import tiny
from torch import Tensor, nn

import peftcore
from peftcore.plugin import Adapter, Around, Base, SoftPrompt
from peftcore.plugin.adapter import implements


class Gain(Adapter):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(32))

    def forward(self, base: Base, x: Tensor) -> Tensor:
        return base(x) * self.gain

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * self.gain[:, None], bias


class NotMerged(Gain):
    merged = Adapter.merged


class Plain(nn.Module):
    """Like `Gain`, but not an `Adapter`."""

    __init__, forward, merged = nn.Module.__init__, Gain.forward, Gain.merged


class Inside(nn.Module):
    needs_call = True


class Prompt(Adapter):
    """Its module reads the call, which nobody would see."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = Inside()

    def forward(self) -> torch.Tensor:
        return torch.zeros(1, 32)


def test_members_that_a_class_overrides() -> None:
    assert implements(Gain(), Adapter.merged)
    assert not implements(Gain(), Adapter.neutral)
    assert not implements(NotMerged(), Adapter.merged)
    assert not implements(Plain(), Adapter.merged)


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (lambda: Around("lm_head", Plain()), "places a Plain, which defines `merged` but does not derive from"),
        (lambda: SoftPrompt(Prompt(), (1, 32)), "places a Inside, which defines `needs_call` but does not derive from"),
    ],
)
def test_a_member_that_nobody_would_call_is_an_error(placement, message: str) -> None:
    with tiny.installed(tiny.method("unseen", lambda *_: [placement()])):
        model = tiny.llama()
        with pytest.raises(peftcore.PluginError, match=message):
            peftcore.apply(model, "unseen")
        assert "_peftcore_state" not in vars(model)
