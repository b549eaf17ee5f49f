"""Outputs of several values, whose first one an adapter behind the module changes."""

from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from support import tiny
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

import peftcore
from peftcore.engine.adaptation import adapted
from peftcore.plugin.outputs import first_of
from peftcore.plugin.placements.after import After, AfterLink

Pair = namedtuple("Pair", ["hidden", "other"])


@pytest.mark.parametrize(
    "build",
    [
        lambda x: x,
        lambda x: (x, "more"),
        lambda x: [x, "more"],
        lambda x: Pair(x, "more"),
        lambda x: OrderedDict(hidden=x, other="more"),
        lambda x: BaseModelOutput(last_hidden_state=x),
    ],
)
def test_an_adapter_behind_changes_the_first_value_and_keeps_the_rest(build: Any) -> None:
    class Layer(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            self.given = build(x)
            return self.given

    layer, x = Layer(), torch.randn(2, 3)
    adapted.attach(layer, "a", tiny.Shifted(1.0), link=AfterLink)
    adapted.activate(layer, ["a"])
    found = layer(x)
    assert type(found) is type(layer.given) and torch.equal(first_of(found), x + 1)
    assert torch.equal(first_of(layer.given), x)
    if not isinstance(found, (torch.Tensor, BaseModelOutput)):
        rest = found.values() if isinstance(found, dict) else found
        assert list(rest)[1:] == ["more"]
    if isinstance(found, (Pair, BaseModelOutput)):
        assert torch.equal(found.hidden if isinstance(found, Pair) else found.last_hidden_state, x + 1)


def test_a_loss_is_not_changed_in_place_of_the_logits() -> None:
    with tiny.installed(tiny.method("end", lambda *_: [After("", tiny.Shifted(1.0))])):
        model = peftcore.apply(tiny.llama(), "end")
        with peftcore.disabled(model):
            logits = tiny.logits(model)
        assert torch.equal(tiny.logits(model), logits + 1)
        for named in (True, False):
            with pytest.raises(peftcore.PeftcoreError, match=r"would change its loss, not its logits"):
                model(tiny.TOKENS, labels=tiny.TOKENS, return_dict=named)
