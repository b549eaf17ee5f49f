"""Modules that are recognized by what they compute, and those that only look alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftcore.observation.formulas import gate_formula, norm_formula

FLOATS = (torch.float32, torch.float32)


class Norm(nn.Module):
    """As Llama has it."""

    def __init__(self, columns: int = 24, eps: float = 1e-5) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(columns))
        self.tiny = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.tiny)
        return self.scale * wide.to(x.dtype)


class Mlp(nn.Module):
    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(4, 6)
        self.act, self.c = act or nn.SiLU(), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.act(self.a(x)) * self.b(x))


@pytest.mark.parametrize("columns", [1, 24, 700])
def test_norms_whatever_their_class_and_dtype(columns: int) -> None:
    found = norm_formula(Norm(columns).bfloat16())
    assert found is not None and (found.weight, found.eps, found.offset) == ("scale", "tiny", 0.0)
    assert FLOATS in found.dtypes and (torch.bfloat16, torch.bfloat16) in found.dtypes


def test_offset_and_rounding() -> None:
    gemma = type("Gemma", (Norm,), {"forward": _gemma})()
    found, late = norm_formula(gemma), norm_formula(nn.RMSNorm(24, eps=1e-6))
    assert found is not None and (found.offset, found.rounded, len(found.dtypes)) == (1.0, False, 9)
    assert late is not None and (late.offset, late.rounded) == (0.0, False)
    assert late.settings == (("normalized_shape", (24,)), ("elementwise_affine", True))


def _gemma(self: Any, x: Tensor) -> Tensor:
    wide = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.tiny)
    return (wide * (1.0 + self.scale.float())).type_as(x)


def _with_noise(self: Any, x: Tensor) -> Tensor:
    return Norm.forward(self, x + 1e-3 * torch.randn(x.shape)) if self.training else Norm.forward(self, x)


def _capped(self: Any, x: Tensor) -> Tensor:
    wide = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True).clamp(min=1e-3) + self.tiny)
    return self.scale * wide.to(x.dtype)


def _in_double(self: Any, x: Tensor) -> Tensor:
    wide = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + self.tiny)
    return (self.scale.double() * wide).to(x.dtype) * 1.0001


def _fixed_eps(self: Any, x: Tensor) -> Tensor:
    return self.scale * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def _detached(self: Any, x: Tensor) -> Tensor:
    root = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.tiny).detach()
    return self.scale * (x.float() * root).to(x.dtype)


def _centred(self: Any, x: Tensor) -> Tensor:
    wide = x.float() - x.float().mean(-1, keepdim=True)
    return self.scale * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.tiny)).to(x.dtype)


def _counting(self: Any, x: Tensor) -> Tensor:
    self.calls = 1
    wide = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.tiny)
    return self.scale * wide.to(x.dtype)


def _printing(self: Any, x: Tensor) -> Tensor:
    print("called")
    wide = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.tiny)
    return self.scale * wide.to(x.dtype)


def _in_place(self: Any, x: Tensor) -> Tensor:
    x.detach().add_(0)
    wide = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.tiny)
    return self.scale * wide.to(x.dtype)


ALIKE = [_with_noise, _capped, _in_double, _fixed_eps, _detached, _centred, _counting, _printing, _in_place]


@pytest.mark.parametrize("forward", ALIKE, ids=lambda forward: forward.__name__)
def test_norms_that_only_look_alike(forward: Any) -> None:
    assert norm_formula(type("Other", (Norm,), {"forward": forward})()) is None


def test_norms_with_more_than_a_forward() -> None:
    def call(self: Any, *args: Any) -> Any:
        return nn.Module.__call__(self, *args)

    own = Norm()
    own.forward = own.forward  # type: ignore[method-assign]
    buffered = Norm()
    buffered.register_buffer("seen", torch.zeros(1))
    called = type("Called", (Norm,), {"__call__": call})()
    for module in (own, buffered, called, nn.LayerNorm(24), nn.RMSNorm(24), nn.Linear(4, 4)):
        assert norm_formula(module) is None


@pytest.mark.parametrize(
    ("act", "activation"), [(nn.SiLU(), "silu"), (nn.GELU(approximate="tanh"), "gelu_tanh")], ids=str
)
def test_gates(act: nn.Module, activation: str) -> None:
    found = gate_formula(Mlp(act).half())
    assert found is not None and (found.calls, found.down) == (("a", "b"), "c")
    assert (found.gate, found.up, found.act, found.activation) == ("a", "b", "act", activation)
    assert found.dtypes == {torch.float32, torch.float16, torch.bfloat16}
    other = gate_formula(
        type("Swapped", (Mlp,), {"forward": lambda self, x: self.c(self.a(x) * self.act(self.b(x)))})()
    )
    assert other is not None and (other.gate, other.up, other.calls) == ("b", "a", ("a", "b"))


FORWARDS = {
    "ungated": lambda self, x: self.c(self.act(self.a(x))) + 0 * self.b(x).sum(),
    "a residual": lambda self, x: x + self.c(self.act(self.a(x)) * self.b(x)),
    "scaled": lambda self, x: self.c(self.act(self.a(x)) * self.b(x) * 2),
    "in training": lambda self, x: self.c(self.act(self.a(x)) * (self.b(x) if self.training else self.a(x))),
    "limited": lambda self, x: self.c(self.act(self.a(x).clamp(max=1.0)) * self.b(x)),
    "detached": lambda self, x: self.c(self.act(self.a(x)).detach() * self.b(x)),
    "a weight": lambda self, x: self.c(self.act(self.a(x)) * self.b(x)).to(self.a.weight.dtype),
    "another input": lambda self, x: self.c(self.act(self.a(x)) * self.b(x * 1)),
    "called twice": lambda self, x: self.c(self.act(self.a(x)) * self.b(self.b(x))),
    "a config": lambda self, x: self.c(self.act(self.a(x)) * self.b(x)) if self.config.yes else x,
}


@pytest.mark.parametrize("name", list(FORWARDS))
def test_mlps_that_only_look_alike(name: str) -> None:
    assert gate_formula(type("Other", (Mlp,), {"forward": FORWARDS[name]})()) is None


@pytest.mark.parametrize("act", [nn.GELU(), nn.ReLU(), nn.Dropout(0.5), nn.SiLU(inplace=True), nn.Identity()], ids=str)
def test_other_activations(act: nn.Module) -> None:
    assert gate_formula(Mlp(act)) is None


def test_probes_leave_random_numbers_alone() -> None:
    state = torch.get_rng_state()
    with torch.device("meta"), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert norm_formula(Norm()) is not None and gate_formula(Mlp()) is not None
    assert torch.equal(torch.get_rng_state(), state)
