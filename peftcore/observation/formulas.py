"""Modules that compute a known formula: norms, MLPs with a gated activation, activations, and dropout.

A module is recognized by what it computes, not by its class. A copy without its weights is called: with random
weights, settings and inputs a norm must give the formula's values and gradients in each dtype; an MLP must pass what
its children return on to its other children as the formula does. A class whose code stores anything, reads globals
other than PyTorch's, or has its own `__call__`, is not tried.
"""

from __future__ import annotations

import builtins
import dis
import functools
import inspect
import math
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from peftcore import ops
from peftcore.adaptation.base_modules import original_class
from peftcore.adaptation.fused_forward import (
    ActivationFormula,
    DropoutFormula,
    GateFormula,
    LayerNormFormula,
    NormFormula,
    Settings,
    setting,
)
from peftcore.ops.activated import ACTIVATIONS
from peftcore.ops.gated import ACTIVATIONS as GATES
from peftcore.ops.weight import DTYPES

_STORES = ("STORE_ATTR", "STORE_GLOBAL", "STORE_SUBSCR", "STORE_DEREF", "DELETE_", "IMPORT_", "MAKE_FUNCTION")
_SIMPLE = (bool, int, float, str, type(None), tuple, torch.Size)
_STEPS = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}  # distance of neighbouring values, at most, relative
_BUILTINS = (math, int, float, bool, len, tuple, isinstance, getattr, hasattr, range)
_EPSILONS = (1e-8, 1e-3, 0.3)
_VARIANTS = ((0.0, True), (0.0, False), (1.0, False), (1.0, True))  # offset, rounded


def kind(module: nn.Module) -> Any:
    """Return what the formula of a module depends on: its code, settings, shapes and children."""
    shapes = tuple((name, type(p), None if p is None else p.shape) for name, p in module._parameters.items())
    children = tuple(
        (name, child is None, None if child is None or _has_parameters(child) else _code_and_settings(child))
        for name, child in module._modules.items()
    )
    return _code_and_settings(module), shapes, children


def norm_formula(module: nn.Module) -> NormFormula | None:
    """Return how `module` computes RMSNorm, or None if it is not shown to."""
    parameters = [name for name, p in module._parameters.items() if p is not None]
    if module._modules or module._buffers or len(parameters) != len(module._parameters) or len(parameters) != 1:
        return None
    weight = module._parameters[parameters[0]]
    if type(weight) is not nn.Parameter or weight.dim() != 1 or not len(weight) or not _is_plain(module):
        return None
    settings = _settings(module)
    for eps, value in settings:
        if type(value) is float and 0 <= value < 1:
            with _apart():
                found = _try(functools.partial(_norm, module, parameters[0], len(weight), eps, settings))
            if found is not None:
                return found
    return None


def layer_norm_formula(module: nn.Module) -> LayerNormFormula | None:
    """Return how `module` computes LayerNorm, or None if it is not PyTorch's module."""
    is_one = original_class(module) is nn.LayerNorm and "forward" not in module.__dict__
    return LayerNormFormula() if is_one else None


def gate_formula(module: nn.Module) -> GateFormula | None:
    """Return how `module` computes a gated MLP, or None if it is not shown to."""
    if module._parameters or module._buffers or len(module._modules) != 4 or not _is_plain(module):
        return None
    without = [name for name, child in module._modules.items() if child is not None and not _has_parameters(child)]
    if len(without) != 1 or any(child is None for child in module._modules.values()):
        return None
    act: Any = module._modules[without[0]]
    if act._modules or act._buffers or not _is_plain(act) or "forward" in act.__dict__:
        return None
    with _apart():
        flow = _try(functools.partial(_flow, module, without[0]))
        activation = _try(functools.partial(_activation, act, GATES)) if flow is not None else None
    if flow is None or activation is None:
        return None
    return GateFormula(
        **flow,
        act=without[0],
        activation=activation[0],
        act_class=original_class(act),
        dtypes=activation[1],
        settings=_settings(module),
        act_settings=_settings(act),
    )


def activation_formula(module: nn.Module) -> ActivationFormula | None:
    """Return how `module` computes an activation, or None if it is not shown to."""
    if module._parameters or module._buffers or module._modules or not _is_plain(module):
        return None
    with _apart():
        found = _try(functools.partial(_activation, module, ACTIVATIONS))
    return None if found is None else ActivationFormula(found[0], found[1], _settings(module))


def dropout_formula(module: nn.Module) -> DropoutFormula | None:
    """Return how `module` computes dropout, or None if it is not PyTorch's module, or drops nothing."""
    cls: Any = original_class(module)
    own = module._parameters or module._buffers or module._modules or "forward" in module.__dict__
    return DropoutFormula() if not own and cls is nn.Dropout and module.__dict__.get("p") != 0 else None


def _norm(module: nn.Module, name: str, columns: int, eps: str, settings: Settings) -> NormFormula | None:
    """Return the variant of RMSNorm with the most dtypes in which `module` computes it."""
    best: NormFormula | None = None
    others = tuple(setting for setting in settings if setting[0] != eps)
    for offset, rounded in _VARIANTS:
        pairs = set[tuple[torch.dtype, torch.dtype]]()
        for dtypes in product(DTYPES, DTYPES):  # fp32 first
            if _is_norm(module, columns, NormFormula(name, eps, offset, rounded, frozenset([dtypes]), others)):
                pairs.add(dtypes)
            elif not pairs:
                break
        if pairs and (best is None or len(pairs) > len(best.dtypes)):
            best = NormFormula(name, eps, offset, rounded, frozenset(pairs), others)
    return best


def _is_norm(module: nn.Module, columns: int, formula: NormFormula) -> bool:
    """Return whether `module` computes the formula in its only pair of dtypes."""
    ((dtype, weight_dtype),) = formula.dtypes
    rows = 10 * max(1, -(-512 // columns))
    scales = torch.tensor([0.0, 1e-4, 1e-2, 1.0, 30.0]).repeat(rows // 5)[:, None]
    values = [getattr(module, formula.eps)]
    values += _EPSILONS if dtype is torch.float32 is weight_dtype else ()
    for number, value in enumerate(values):
        x = (scales * torch.randn(rows, columns)).to(dtype).requires_grad_()
        if number % 2:
            x = x.detach()[None].requires_grad_()
        weight = nn.Parameter(torch.randn(columns).to(weight_dtype))
        copy = _copy(module, {formula.weight: weight}, {formula.eps: value})
        copy.training = number % 2 == 0
        found = copy.forward(x)
        wanted = ops.rms_norm(x, weight, value, offset=formula.offset, rounded=formula.rounded)
        if not _same(found, wanted) or x._version or weight._version:
            return False
        grad = (0.01 * torch.randn(x.shape)).to(dtype)  # of fp16 small rows have large gradients
        for one, other in zip(
            torch.autograd.grad(found, (x, weight), grad), torch.autograd.grad(wanted, (x, weight), grad), strict=True
        ):
            close = 1e-4 if dtype is torch.float32 is weight_dtype else 0.1
            if not _near(one, other, close):
                return False
    return True


class _Child(nn.Module):
    """Child of a copied MLP, which records calls and returns random values."""

    def __init__(self, name: str, calls: list[tuple[str, Tensor, Tensor]]) -> None:
        super().__init__()
        self.name, self.calls = name, calls

    def forward(self, x: Tensor) -> Tensor:
        y = torch.randn(*x.shape[:-1], 6).to(x.dtype).requires_grad_()
        self.calls.append((self.name, x, y))
        return y


def _flow(module: nn.Module, act: str) -> dict[str, Any] | None:
    """Return which child of `module` is what, if it computes down(act(gate(x)) * up(x))."""
    found: dict[str, Any] | None = None
    for training, shape, dtype in ((True, (2, 3, 4), torch.float32), (False, (5, 6), torch.bfloat16)):
        calls: list[tuple[str, Tensor, Tensor]] = []
        copy = _copy(module, {}, {})
        copy._modules.update({name: _Child(name, calls) for name in module._modules})
        copy.training = training
        x = torch.randn(shape).to(dtype)
        output = copy.forward(x)
        made = {name: (given, y) for name, given, y in calls}
        if len(calls) != 4 or len(made) != 4 or act not in made:
            return None
        down = calls[-1][0]
        gates = [name for name, (_, y) in made.items() if y is made[act][0]]
        ups = [name for name in made if name not in (act, down, *gates)]
        if len(gates) != 1 or len(ups) != 1 or gates[0] == down or output is not made[down][1]:
            return None
        (gate,), (up,) = gates, ups
        value, activated, raised = made[down][0], made[act][1], made[up][1]
        if made[gate][0] is not x or made[up][0] is not x or x._version or not torch.equal(value, activated * raised):
            return None
        grad = torch.randn(value.shape).to(dtype)
        slopes = torch.autograd.grad(value, (activated, raised), grad)
        if not torch.equal(slopes[0], grad * raised) or not torch.equal(slopes[1], grad * activated):
            return None
        order = tuple(name for name, _, _ in calls if name in (gate, up))
        flow = {"calls": order, "gate": gate, "up": up, "down": down}
        if found not in (None, flow):
            return None
        found = flow
    return found


def _activation(act: nn.Module, names: Iterable[str]) -> tuple[Any, frozenset[torch.dtype]] | None:
    """Return the name of the activation, and the dtypes in which the results agree."""
    for name in names:
        dtypes = frozenset(dtype for dtype in DTYPES if _is_activation(act, name, dtype))
        if torch.float32 in dtypes:
            return name, dtypes
    return None


def _is_activation(act: nn.Module, name: Any, dtype: torch.dtype) -> bool:
    x = torch.cat([4 * torch.randn(2000), torch.tensor([-1e3, -30.0, 0.0, 30.0, 1e3])]).to(dtype).requires_grad_()
    found, wanted = act.forward(x), ops.activated(x, name)
    if not _same(found, wanted, absolute=2e-6) or x._version or found is x:
        return False
    grad = torch.randn(x.shape).to(dtype)
    (one,), (other,) = torch.autograd.grad(found, x, grad), torch.autograd.grad(wanted, x, grad)
    return _near(one, other, 1e-4 if dtype is torch.float32 else 0.1)


def _same(found: Any, wanted: Tensor, absolute: float = 0.0) -> bool:
    """Return whether the values agree: in fp32 within its rounding, in 16 bits all but a few, which are neighbours."""
    if type(found) is not Tensor or found.dtype is not wanted.dtype or found.shape != wanted.shape:
        return False
    step = _STEPS.get(found.dtype)
    if step is None:
        return torch.allclose(found, wanted, rtol=4e-6, atol=max(absolute, 1e-30))
    smallest = max(absolute, 2.0**-23 if found.dtype is torch.float16 else 0.0)
    different = (found.float() - wanted.float()).abs() > smallest
    near = torch.allclose(found.float(), wanted.float(), rtol=step, atol=smallest)
    return near and bool(different.float().mean() <= 0.01)


def _near(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """Return whether gradients agree relative to their size."""
    difference = (one.double() - other.double()).norm()
    return bool(difference <= tolerance * other.double().norm())


def _settings(module: nn.Module) -> Settings:
    """Return the plain attributes of `module` that are not PyTorch's or peftcore's."""
    theirs = {*nn.Module().__dict__, "training"}
    items = module.__dict__.items()
    return tuple((n, setting(v)) for n, v in items if n not in theirs and not n.startswith("_") and _is_setting(v))


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _code_and_settings(module: nn.Module) -> Any:
    cls: Any = original_class(module)
    members = [vars(each) for each in cls.__mro__ if each not in nn.Module.__mro__]  # libraries replace some of them
    code = tuple((n, m) for each in members for n, m in each.items() if isinstance(m, (types.FunctionType, property)))
    settings = _settings(module)
    others = frozenset(module.__dict__).difference(nn.Module().__dict__, (name for name, _ in settings))
    typed = tuple((name, type(value), value) for name, value in settings)
    return cls, code, typed, others, tuple(module._modules), tuple(module._buffers)


def _copy(module: nn.Module, parameters: dict[str, nn.Parameter], changed: dict[str, Any]) -> Any:
    """Return a module of the original class with plain attributes alone: reading any other one is an error."""
    copy: Any = object.__new__(original_class(module))
    nn.Module.__init__(copy)
    copy.__dict__.update({name: module.__dict__[name] for name, _ in _settings(module)} | changed)
    copy._parameters.update(parameters)
    return copy


def _is_plain(module: nn.Module) -> bool:
    """Return whether a call of `module` runs its class's forward and does nothing else that is not seen."""
    cls: Any = original_class(module)
    if "forward" in module.__dict__ or any(
        getattr(cls, name, None) is not getattr(nn.Module, name, None)
        for name in ("__call__", "_call_impl", "__getattr__", "__getattribute__", "__setattr__")
    ):
        return False
    return _stores_nothing(cls.forward, cls, module, set())


def _stores_nothing(function: Any, cls: type, module: nn.Module, seen: set[Any]) -> bool:
    """Return whether the code of a method, and of methods that it names, stores nothing and uses PyTorch alone."""
    if not isinstance(function, types.FunctionType) or hasattr(function, "__wrapped__") or function.__closure__:
        return False
    if function in seen:
        return True
    seen.add(function)
    for step in dis.get_instructions(function):
        if step.opname.startswith(_STORES):
            return False
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            value = function.__globals__.get(step.argval, vars(builtins).get(step.argval))
            if not _is_of_torch(value) and not any(value is each for each in _BUILTINS):
                return False
    for name in function.__code__.co_names:
        member = inspect.getattr_static(cls, name, None)
        if isinstance(member, property) or (name in module.__dict__ and not _is_setting(module.__dict__[name])):
            return False
        is_own = isinstance(member, types.FunctionType) and inspect.getattr_static(nn.Module, name, None) is not member
        if is_own and not _stores_nothing(member, cls, module, seen):
            return False
    return True


def _is_setting(value: Any) -> bool:
    return isinstance(value, _SIMPLE) or (callable(value) and _is_of_torch(value))


def _is_of_torch(value: Any) -> bool:
    while isinstance(value, functools.partial):
        value = value.func
    name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
    return isinstance(value, torch.dtype) or (isinstance(name, str) and name.partition(".")[0] == "torch")


@contextmanager
def _apart() -> Iterator[None]:
    """Compute on the CPU, with a seed of its own, with gradients, and without modes and warnings."""
    with (
        warnings.catch_warnings(),
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.device("cpu"),
        torch._C._DisableAutocast(),
    ):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        yield


def _try(probe: Callable[[], Any]) -> Any:
    """Return the probe's result, or None if the module fails on what the probe gives it."""
    try:
        return probe()
    except Exception:  # of any kind: it is the model's code
        return None
