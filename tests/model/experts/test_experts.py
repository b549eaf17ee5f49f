"""Thin changes of experts' weights: within the products where transformers' interface runs them, else as ever."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from peftcore.engine.adaptation import chain
from peftcore.engine.adaptation.adapted import activate, attach
from peftcore.errors import PeftcoreError
from peftcore.plugin import Adapter
from peftcore.plugin.adapter import LowRank
from peftcore.plugin.placements.on_weight import WeightChanges, WeightLink


class Config:
    num_experts, hidden_size, moe_intermediate_size, hidden_act = 4, 32, 24, "silu"
    _experts_implementation = "grouped_mm"


class ThinChange(Adapter):
    def __init__(self, out: int, width: int, dropout_p: float = 0.0) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4, 3, width) / 5), nn.Parameter(torch.randn(4, out, 3) / 5)
        self.dropout_p = dropout_p

    def expert_low_rank(self) -> LowRank:
        return LowRank(self.a, self.b, 0.5, dropout_p=self.dropout_p if self.training else 0.0)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + 0.5 * self.b @ self.a


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Overridden(Qwen3MoeExperts):
    def forward(self, *args: Any) -> Tensor:
        return 2 * super().forward(*args)


INDEX = torch.tensor([[0, 1], [3, 0], [3, 1], [1, 0], [0, 3]])  # none for the expert 2
CALL = (torch.randn(5, 32, generator=torch.Generator().manual_seed(1)), INDEX, torch.rand(5, 2))


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls of the fused forward."""
    calls: list[Any] = []
    own = chain.experts_forward
    monkeypatch.setattr(chain, "experts_forward", lambda *args, **kwargs: (calls.append(args), own(*args, **kwargs))[1])
    return calls


def experts(cls: type[nn.Module] = Qwen3MoeExperts, **changes: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    module = cls(Config())
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2).requires_grad_(False)
    for name, change in changes.items():
        attach(module, name, WeightChanges({"gate_up_proj": change, "down_proj": ThinChange(32, 24)}), link=WeightLink)
    if changes:
        activate(module, list(changes))
    return module.eval()


def changed(module: nn.Module) -> Tensor:
    """What the module's own forward gives with the changes in its weights."""
    plain = experts(type(module).__mro__[1])
    for name in module._peftcore_active:
        for parameter, change in module.peftcore[name].changes.items():
            with torch.no_grad():
                getattr(plain, parameter).copy_(change(getattr(plain, parameter)))
    return plain(*CALL)


def test_thin_changes_of_several_adapters(fused: list[Any]) -> None:
    module = experts(a=ThinChange(48, 32), b=ThinChange(48, 32, dropout_p=0.5))
    y = module(*CALL)
    assert len(fused) == 1
    torch.testing.assert_close(y, changed(module))
    y.square().sum().backward()
    grads = [p.grad for p in module.peftcore.parameters()]
    assert len(grads) == 8 and all(g[2].abs().max() == 0 < g[3].abs().max() for g in grads)  # [experts, ...]
    module.train()  # the second has dropout now, and the first has none
    assert not torch.equal(module(*CALL), module(*CALL)) and len(fused) == 3
    activate(module, ["a"])
    torch.testing.assert_close(module(*CALL), changed(module))


@pytest.mark.parametrize("why", ["another change", "gradients", "subclass", "registered", "names"])
def test_else_the_forward_of_the_module_reads_changed_weights(
    why: str, fused: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cls, changes, call = Qwen3MoeExperts, {"a": ThinChange(48, 32)}, CALL
    if why == "another change":
        changes["b"] = Doubled()
    if why == "subclass":
        cls = Overridden
    if why == "registered":
        ALL_EXPERTS_FUNCTIONS.register("twice", lambda module, x, index, weights: 2 * x)
        monkeypatch.setattr(Config, "_experts_implementation", "twice")
    module = experts(cls, **changes)
    if why == "gradients":
        module.down_proj.requires_grad_(True)
    if why == "names":
        monkeypatch.setattr(Config, "_experts_implementation", "eager")
        y = module(CALL[0], top_k_index=CALL[1], top_k_weights=CALL[2])
        torch.testing.assert_close(y, changed(module))
        assert len(fused) == 1
        return
    y = module(*call)
    assert not fused
    torch.testing.assert_close(y, 2 * call[0] if why == "registered" else changed(module))
    if why == "gradients":
        y.sum().backward()
        assert module.down_proj.grad.abs().max() > 0


@pytest.mark.parametrize("change", [ThinChange(48, 32), Doubled()], ids=["thin", "any"])
def test_offloaded_by_accelerate(change: nn.Module, fused: list[Any]) -> None:
    """Its hook brings the weights, which lie on meta, for the time of a call."""
    module = experts(a=change)
    wanted = module(*CALL)
    plain = experts()
    add_hook_to_module(plain, AlignDevicesHook("cpu", offload=True, weights_map=dict(plain.named_parameters())))
    attach(plain, "a", module.peftcore["a"], link=WeightLink)
    activate(plain, ["a"])
    assert plain.down_proj.is_meta and torch.equal(plain(*CALL), wanted) and plain.down_proj.is_meta
    assert len(fused) == (2 if isinstance(change, ThinChange) else 0)
    plain.__dict__["_old_forward"] = lambda *args: args  # another forward than the class's inside the hook
    with pytest.raises(PeftcoreError, match="Qwen3MoeExperts has its own `forward` on the instance"):
        plain(*CALL)


def test_weights_in_another_dtype_than_the_input(fused: list[Any]) -> None:
    module = experts(a=ThinChange(48, 32)).to(torch.bfloat16)
    y = module(*CALL)  # transformers' grouped_mm casts likewise
    assert y.dtype is torch.float32 and len(fused) == 1
    torch.testing.assert_close(y, changed(module.float()), rtol=0.05, atol=0.1)
