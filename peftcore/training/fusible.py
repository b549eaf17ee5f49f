"""Decide which modules `peftcore.fuse` can fuse: a table of class names, and a numeric check.

Candidates are selected by class name. A copy of the module with random weights must then match the operator's values
and gradients in fp32. fp16 and bf16 are also checked, and are fused if they match. A module that fails the check is not
fused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from peftcore import ops
from peftcore.engine.adaptation.fused_forward import (
    FusedActivation,
    FusedDropout,
    FusedForward,
    FusedMLP,
    FusedNorm,
    RecomputedLayerNorm,
)
from peftcore.engine.adaptation.modes import numeric_check
from peftcore.model.base_modules import original_class
from peftcore.ops.activated import ACTIVATIONS, Activation
from peftcore.ops.gated import ACTIVATIONS as GATES
from peftcore.ops.weight import DTYPES

EPSILONS = ("variance_epsilon", "eps")
# (gate, up, down, activation) of gated MLPs
GATED_MLPS = (
    ("gate_proj", "up_proj", "down_proj", "act_fn"),
    ("gate_proj", "up_proj", "down_proj", "activation_fn"),  # Llama 4
    ("w1", "w3", "w2", "act_fn"),  # InternLM 2
)

_VARIANTS = ((0.0, True), (0.0, False), (1.0, False), (1.0, True))  # (offset, rounded) of `ops.rms_norm`
_OTHER_EPSILONS = (1e-8, 1e-3, 0.3)
_STEPS = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}  # largest relative distance between neighbouring values
_SETTINGS = (bool, int, float, str, type(None), tuple)
_MOST_REMEMBERED = 256
_remembered: dict[Hashable, FusedForward | None] = {}


def fused_forward(module: nn.Module) -> FusedForward | None:
    """Return the description of the fused computation of `module`, or None if it cannot be fused."""
    name = original_class(module).__name__
    find = next((find for pattern, find in _TABLE if re.fullmatch(pattern, name)), None)
    if find is None or "forward" in module.__dict__:
        return None
    key = _key(module)
    if key not in _remembered:
        if len(_remembered) >= _MOST_REMEMBERED:
            _remembered.clear()
        with numeric_check():
            try:
                _remembered[key] = find(module)
            except Exception:  # an unknown class of this name may raise anything on the check's input
                _remembered[key] = None
    return _remembered[key]


def _norm(module: nn.Module) -> FusedForward | None:
    """Return the variant of RMSNorm that matches the module in the most dtypes."""
    eps = next((name for name in EPSILONS if type(getattr(module, name, None)) is float), None)
    weight = _only_vector(module)
    if eps is None or weight is None:
        return None
    variants = [_checked_norm(module, weight, eps, offset=offset, rounded=rounded) for offset, rounded in _VARIANTS]
    best = max(variants, key=lambda norm: len(norm.dtypes))
    return best if best.dtypes else None


def _only_vector(module: nn.Module) -> str | None:
    """Return the name of a module's parameter if it is a vector and the module contains nothing else."""
    names = [name for name, parameter in module._parameters.items() if parameter is not None]
    if len(names) != 1 or module._modules or module._buffers:
        return None
    weight = module._parameters[names[0]]
    is_vector = type(weight) is nn.Parameter and weight.dim() == 1 and len(weight) > 0
    return names[0] if is_vector else None


def _checked_norm(module: nn.Module, weight: str, eps: str, *, offset: float, rounded: bool) -> FusedNorm:
    """Return a variant of RMSNorm with the pairs of dtypes (input, weight) in which `module` matches it."""
    columns = module.get_parameter(weight).numel()
    dtypes: set[tuple[torch.dtype, torch.dtype]] = set()
    for pair in product(DTYPES, DTYPES):  # fp32 first
        if _is_norm(module, columns, FusedNorm(weight, eps, offset, rounded, frozenset([pair]))):
            dtypes.add(pair)
        elif not dtypes:
            break
    return FusedNorm(weight, eps, offset, rounded, frozenset(dtypes))


def _is_norm(module: nn.Module, columns: int, norm: FusedNorm) -> bool:
    """Return whether `module` matches `norm` in its only pair of dtypes."""
    ((dtype, weight_dtype),) = norm.dtypes
    rows = 10 * max(1, -(-512 // columns))
    scales = torch.tensor([0.0, 1e-4, 1e-2, 1.0, 30.0]).repeat(rows // 5)[:, None]
    exact = dtype is torch.float32 is weight_dtype
    for eps in (getattr(module, norm.eps), *(_OTHER_EPSILONS if exact else ())):
        x = (scales * torch.randn(rows, columns)).to(dtype).requires_grad_()
        weight = nn.Parameter(torch.randn(columns).to(weight_dtype))
        copy = _copy(module, {norm.eps: eps}, {norm.weight: weight}, {})
        for copy.training in (True, False):
            y = copy.forward(x)
            expected = ops.rms_norm(x, weight, eps, offset=norm.offset, rounded=norm.rounded)
            grad = (0.01 * torch.randn(x.shape)).to(dtype)  # small rows have large gradients, which overflow fp16
            if not _same(y, expected) or not _same_gradients(y, expected, (x, weight), grad, exact):
                return False
    return True


def _layer_norm(module: nn.Module) -> FusedForward | None:
    return RecomputedLayerNorm() if original_class(module) is nn.LayerNorm else None


def _gated_mlp(module: nn.Module) -> FusedForward | None:
    names = next((names for names in GATED_MLPS if module._modules.keys() == set(names)), None)
    if names is None or module._parameters or module._buffers:
        return None
    act: Any = module._modules[names[3]]
    if act is None or any(True for _ in act.parameters()) or "forward" in act.__dict__:
        return None
    for activation in GATES:
        mlp = FusedMLP(*names, activation=activation, act_class=original_class(act), dtypes=frozenset())  # type: ignore[arg-type]
        dtypes = frozenset(dtype for dtype in DTYPES if _is_gated_mlp(module, mlp, dtype))
        if torch.float32 in dtypes:
            return FusedMLP(*names, activation=activation, act_class=original_class(act), dtypes=dtypes)  # type: ignore[arg-type]
    return None


class _Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def _is_gated_mlp(module: nn.Module, mlp: FusedMLP, dtype: torch.dtype) -> bool:
    """Return whether `module` computes down(act(gate(x)) * up(x)), tested with small layers in place of its own."""
    gate, up, down = nn.Linear(8, 600).to(dtype), nn.Linear(8, 600).to(dtype), _Doubled()
    up.weight.data *= 0.01  # errors of the activation, multiplied by `up`, stay absolute errors of the same size
    copy = _copy(module, {}, {}, {**module._modules, mlp.gate: gate, mlp.up: up, mlp.down: down})
    x = (torch.tensor([0.1, 1.0, 10.0, 100.0])[:, None] * torch.randn(4, 8)).to(dtype).requires_grad_()
    for copy.training in (True, False):
        y = copy.forward(x)
        expected = 2 * ops.gated(gate(x), up(x), mlp.activation)
        grad = (0.01 * torch.randn(expected.shape)).to(dtype)  # gradients of weights would overflow fp16
        if not _same(y, expected, absolute=2e-6):
            return False
        if not _same_gradients(y, expected, (x, gate.weight, up.weight), grad, dtype is torch.float32):
            return False
    return True


def _activation(module: nn.Module) -> FusedForward | None:
    if module._parameters or module._buffers or module._modules:
        return None
    for activation in ACTIVATIONS:
        dtypes = frozenset(dtype for dtype in DTYPES if _is_activation(module, activation, dtype))  # type: ignore[arg-type]
        if torch.float32 in dtypes:
            return FusedActivation(activation, dtypes)  # type: ignore[arg-type]
    return None


def _is_activation(module: nn.Module, activation: Activation, dtype: torch.dtype) -> bool:
    x = torch.cat([4 * torch.randn(2000), torch.tensor([-1e3, -30.0, 0.0, 30.0, 1e3])]).to(dtype).requires_grad_()
    y, expected = module.forward(x), ops.activated(x, activation)
    grad = torch.randn(x.shape).to(dtype)
    return _same(y, expected, absolute=2e-6) and _same_gradients(y, expected, (x,), grad, dtype is torch.float32)


def _dropout(module: nn.Module) -> FusedForward | None:
    return FusedDropout() if original_class(module) is nn.Dropout and module.__dict__["p"] != 0 else None


_TABLE: tuple[tuple[str, Callable[[nn.Module], FusedForward | None]], ...] = (
    (r"\w*RMSNorm", _norm),
    # T5 and its relatives have an RMSNorm of this name.
    (r"(T5|MT5|UMT5|LongT5|SwitchTransformers|Udop|Pop2Piano|Pix2Struct|Kosmos2_5|ImageGPT)LayerNorm", _norm),
    (r"LayerNorm", _layer_norm),
    (r"\w*(MLP|Mlp|FFN)", _gated_mlp),
    (r"GELU(Tanh|Activation)?|(New|Fast|Quick)GELUActivation|PytorchGELUTanh|SiLU(Activation)?", _activation),
    (r"Dropout", _dropout),
)


def _copy(
    module: nn.Module,
    attributes: dict[str, Any],
    parameters: dict[str, nn.Parameter],
    children: Mapping[str, nn.Module | None],
) -> nn.Module:
    """Return a module of the original class without hooks, with these attributes, parameters and children."""
    copy: nn.Module = object.__new__(original_class(module))
    nn.Module.__init__(copy)
    copy.__dict__.update({name: value for name, value in module.__dict__.items() if name not in copy.__dict__})
    copy.__dict__.update(attributes)
    copy._parameters.update(parameters)
    copy._modules.update(children)
    return copy


def _same(y: Any, expected: Tensor, absolute: float = 0.0) -> bool:
    """Return whether values agree: within rounding in fp32; in 16 bits at most 1 % differ, by one unit."""
    if type(y) is not Tensor or y.dtype is not expected.dtype or y.shape != expected.shape:
        return False
    step = _STEPS.get(y.dtype)
    if step is None:
        return torch.allclose(y, expected, rtol=4e-6, atol=max(absolute, 1e-30))
    smallest = max(absolute, 2.0**-23 if y.dtype is torch.float16 else 0.0)
    different = (y.float() - expected.float()).abs() > smallest
    near = torch.allclose(y.float(), expected.float(), rtol=step, atol=smallest)
    return near and bool(different.float().mean() <= 0.01)


def _same_gradients(y: Tensor, expected: Tensor, inputs: Iterable[Tensor], grad: Tensor, exact: bool) -> bool:
    """Return whether gradients agree relative to their norm: within 1e-4 if `exact`, else within 0.1."""
    inputs, tolerance = tuple(inputs), 1e-4 if exact else 0.1
    pairs = zip(torch.autograd.grad(y, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True)
    for gradient, expected_gradient in pairs:
        difference = (gradient.double() - expected_gradient.double()).norm()
        if not difference <= tolerance * expected_gradient.double().norm():
            return False
    return True


def _key(module: nn.Module) -> Hashable:
    """Return the key of a module in the cache of checks: everything that the result depends on."""
    shapes = tuple((name, type(p), getattr(p, "shape", None)) for name, p in module._parameters.items())
    children = tuple((name, _class_and_settings(child)) for name, child in module._modules.items())
    return _class_and_settings(module), shapes, children, tuple(module._buffers)


def _class_and_settings(module: nn.Module | None) -> Hashable:
    if module is None:
        return None
    cls: Any = original_class(module)
    settings = tuple((n, v) for n, v in module.__dict__.items() if type(v) in _SETTINGS and n != "training")
    return cls, cls.forward, settings
