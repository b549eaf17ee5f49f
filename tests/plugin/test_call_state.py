"""State of a call that layers share, by the method that needs it: a ladder, a side network beside the layers.

    s_i = s_{i-1} + tanh(y_i) D_i,  s_{-1} = 0        behind layer i, [batch, tokens, width]
    output of the norm behind all layers + s_last U

Sung et al. 2022, arXiv 2206.06522, without its gates.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support import tiny
from support.checkpointing import enable_checkpointing
from torch import Tensor, nn

import peftcore
from peftcore.plugin import Adapter, After, Architecture, Method, Placement, StateRules, current_call

WIDTH = 4


@dataclass(frozen=True)
class LadderConfig:
    pass


class Rung(Adapter):
    needs_call = True

    def __init__(self, layer: int, hidden: int) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Parameter(torch.randn(hidden, WIDTH) / hidden**0.5)

    def forward(self, y: Tensor) -> Tensor:
        state, own = current_call().state, torch.tanh(y) @ self.down
        state["ladder", self.layer] = own + state["ladder", self.layer - 1] if self.layer else own
        return y


class Top(Adapter):
    needs_call = True

    def __init__(self, layers: int, hidden: int) -> None:
        super().__init__()
        self.layers = layers
        self.up = nn.Parameter(torch.zeros(WIDTH, hidden))

    def forward(self, y: Tensor) -> Tensor:
        return y + current_call().state["ladder", self.layers - 1] @ self.up


def place(model: nn.Module, config: LadderConfig, architecture: Architecture) -> list[Placement]:
    layers, hidden = architecture.num_layers or 0, architecture.hidden_size or 0
    rungs: list[Placement] = [After(f"model.layers.{i}", Rung(i, hidden)) for i in range(layers)]
    return [*rungs, After("model.norm", Top(layers, hidden))]


@pytest.fixture(autouse=True)
def ladder() -> Iterator[None]:
    with tiny.installed(Method("ladder", LadderConfig, place, StateRules(peft_type="LADDER"))):
        yield


def laddered() -> Any:
    torch.manual_seed(0)
    model = peftcore.apply(tiny.llama(), "ladder")
    for name, parameter in model.named_parameters():
        if name.endswith(".up"):
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    return model


def by_hand(model: Any, tokens: Tensor) -> Tensor:
    rungs = {name: p for name, p in model.named_parameters() if name.endswith((".down", ".up"))}
    downs, (up,) = (
        [p for n, p in rungs.items() if n.endswith("down")],
        [p for n, p in rungs.items() if n.endswith("up")],
    )
    with peftcore.disabled(model):
        found = model.model(tokens, output_hidden_states=True).hidden_states
        seen = []
        hooks = [layer.register_forward_hook(lambda _m, _a, y: seen.append(y)) for layer in model.model.layers]
        model(tokens)
        for hook in hooks:
            hook.remove()
    outputs = [y[0] if isinstance(y, tuple) else y for y in seen]
    side = sum(torch.tanh(y) @ down for y, down in zip(outputs, downs, strict=True))
    return model.lm_head(found[-1] + side @ up)


def test_a_layer_reads_what_the_one_before_left() -> None:
    model = laddered()
    assert torch.allclose(model(tiny.TOKENS).logits, by_hand(model, tiny.TOKENS), atol=1e-5)
    assert torch.equal(model(tiny.TOKENS).logits, model(tiny.TOKENS).logits)  # nothing stays of the first call


def gradients(model: Any) -> list[Tensor]:
    model(tiny.TOKENS, labels=tiny.TOKENS).loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_a_checkpointed_layer_reads_what_its_forward_read() -> None:
    model, other = laddered().train(), laddered().train()
    enable_checkpointing(other, {"use_reentrant": False})
    wanted, found = gradients(model), gradients(other)
    assert len(wanted) == len(found) == 3
    for a, b in zip(wanted, found, strict=True):
        assert torch.allclose(a, b, atol=1e-6) and a.any()


def test_threads_do_not_share_it() -> None:
    model = laddered()
    inputs = [torch.randint(64, (1, 6), generator=torch.Generator().manual_seed(i)) for i in range(8)]
    with torch.no_grad(), ThreadPoolExecutor(4) as pool:
        wanted = [model(tokens).logits for tokens in inputs]
        found = list(pool.map(lambda tokens: model(tokens).logits, inputs))
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_each_samples_adapter_has_its_own() -> None:
    model = laddered()
    peftcore.apply(model, "ladder", adapter="other")
    tokens = tiny.TOKENS[:1].expand(2, -1)
    with torch.no_grad():
        alone = []
        for name in ("default", "other"):
            peftcore.activate(model, name)
            alone.append(model(tokens[:1]).logits)
        peftcore.activate(model, ["default", "other"], per_sample=True)
        assert torch.allclose(model(tokens).logits, torch.cat(alone), atol=1e-5)
    assert not torch.allclose(*alone)


def test_a_value_is_written_once() -> None:
    model = peftcore.apply(tiny.llama(), "ladder")
    rungs = [module for module in model.modules() if isinstance(module, Rung)]
    rungs[1].layer = 0
    with pytest.raises(peftcore.PeftcoreError, match=r"state of this call already has \('ladder', 0\)"):
        model(tiny.TOKENS)
