"""Modules whose class name is in the table: those that compute an operator, and those that only look alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftcore.engine.adaptation.fused_forward import FusedActivation, FusedMLP, FusedNorm
from peftcore.training.fusible import fused_forward

FLOATS = (torch.float32, torch.float32)


class Norm(nn.Module):
    """As Llama has it."""

    def __init__(self, columns: int = 24, eps: float = 1e-5) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(columns))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.scale * wide.to(x.dtype)


class LlamaRMSNorm(Norm):
    pass


class Mlp(nn.Module):
    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(4, 6), nn.Linear(4, 6)
        self.act_fn, self.down_proj = act or nn.SiLU(), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("columns", [1, 24, 700])
def test_norms_of_any_size_and_dtype(columns: int) -> None:
    norm = fused_forward(LlamaRMSNorm(columns).bfloat16())
    assert isinstance(norm, FusedNorm) and (norm.weight, norm.eps, norm.offset) == ("scale", "eps", 0.0)
    assert FLOATS in norm.dtypes and (torch.bfloat16, torch.bfloat16) in norm.dtypes


def test_offset_and_rounding() -> None:
    gemma = fused_forward(type("GemmaRMSNorm", (Norm,), {"forward": _gemma})())
    assert isinstance(gemma, FusedNorm) and (gemma.offset, gemma.rounded, len(gemma.dtypes)) == (1.0, False, 9)
    norm = fused_forward(nn.RMSNorm(24, eps=1e-6))
    assert isinstance(norm, FusedNorm) and (norm.offset, norm.rounded) == (0.0, False)


def _gemma(self: Any, x: Tensor) -> Tensor:
    wide = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
    return (wide * (1.0 + self.scale.float())).type_as(x)


def _with_noise(self: Any, x: Tensor) -> Tensor:
    return Norm.forward(self, x + 1e-3 * torch.randn(x.shape)) if self.training else Norm.forward(self, x)


def _capped(self: Any, x: Tensor) -> Tensor:
    wide = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True).clamp(min=1e-3) + self.eps)
    return self.scale * wide.to(x.dtype)


def _in_double(self: Any, x: Tensor) -> Tensor:
    wide = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + self.eps)
    return (self.scale.double() * wide).to(x.dtype) * 1.0001


def _fixed_eps(self: Any, x: Tensor) -> Tensor:
    return self.scale * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def _detached(self: Any, x: Tensor) -> Tensor:
    root = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps).detach()
    return self.scale * (x.float() * root).to(x.dtype)


def _centred(self: Any, x: Tensor) -> Tensor:
    wide = x.float() - x.float().mean(-1, keepdim=True)
    return self.scale * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


ALIKE = [_with_noise, _capped, _in_double, _fixed_eps, _detached, _centred]


@pytest.mark.parametrize("forward", ALIKE, ids=lambda forward: forward.__name__)
def test_norms_that_only_look_alike(forward: Any) -> None:
    assert fused_forward(type("OtherRMSNorm", (Norm,), {"forward": forward})()) is None


def test_modules_that_are_not_candidates() -> None:
    own = LlamaRMSNorm()
    own.forward = own.forward  # type: ignore[method-assign]
    buffered = LlamaRMSNorm()
    buffered.register_buffer("seen", torch.zeros(1))
    for module in (own, buffered, Norm(), nn.RMSNorm(24), nn.Linear(4, 4)):  # nn.RMSNorm: eps=None depends on the dtype
        assert fused_forward(module) is None


@pytest.mark.parametrize(
    ("act", "activation"), [(nn.SiLU(), "silu"), (nn.GELU(approximate="tanh"), "gelu_tanh")], ids=str
)
def test_gated_mlps(act: nn.Module, activation: str) -> None:
    mlp = fused_forward(Mlp(act).half())
    assert isinstance(mlp, FusedMLP) and mlp.activation == activation
    assert (mlp.gate, mlp.up, mlp.down, mlp.act) == ("gate_proj", "up_proj", "down_proj", "act_fn")
    assert mlp.dtypes == {torch.float32, torch.float16, torch.bfloat16}


def test_a_setting_of_the_activation_is_part_of_the_check() -> None:
    exact, tanh = fused_forward(nn.GELU()), fused_forward(nn.GELU(approximate="tanh"))
    assert isinstance(exact, FusedActivation) and exact.activation == "gelu"
    assert isinstance(tanh, FusedActivation) and tanh.activation == "gelu_tanh"


FORWARDS = {
    "ungated": lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x))) + 0 * self.up_proj(x).sum(),
    "a residual": lambda self, x: x + self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)),
    "scaled": lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * 2),
    "the other way": lambda self, x: self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x))),
    "in training": lambda self, x: self.down_proj(
        self.act_fn(self.gate_proj(x)) * (self.up_proj(x) if self.training else self.gate_proj(x))
    ),
    "limited": lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=1.0)) * self.up_proj(x)),
    "detached": lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x)).detach() * self.up_proj(x)),
    "without down": lambda self, x: self.act_fn(self.gate_proj(x)) * self.up_proj(x),
    "called twice": lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(self.up_proj(x))),
}


@pytest.mark.parametrize("name", list(FORWARDS))
def test_mlps_that_only_look_alike(name: str) -> None:
    assert fused_forward(type("OtherMLP", (Mlp,), {"forward": FORWARDS[name]})()) is None


@pytest.mark.parametrize("act", [nn.GELU(), nn.ReLU(), nn.Dropout(0.5), nn.Identity()], ids=str)
def test_other_activations(act: nn.Module) -> None:
    assert fused_forward(Mlp(act)) is None


def test_equal_modules_are_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []

    class CountedRMSNorm(Norm):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(self.eps)
            return super().forward(x)

    first = fused_forward(CountedRMSNorm())
    count = len(calls)
    assert count and fused_forward(CountedRMSNorm()) is first and len(calls) == count
    fused_forward(CountedRMSNorm(eps=0.5))
    assert len(calls) == 2 * count
    monkeypatch.setattr(CountedRMSNorm, "forward", lambda self, x: 2 * self.scale * x)
    assert fused_forward(CountedRMSNorm()) is None


def test_checks_leave_random_numbers_alone() -> None:
    mlp, norm = Mlp(), LlamaRMSNorm(eps=1e-4)  # not checked before
    mlp.scale = 1.0  # type: ignore[assignment]
    state = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        assert fused_forward(norm) is not None and fused_forward(mlp) is not None
    assert torch.equal(torch.get_rng_state(), state)
