"""Layers whose weight is read while they are not called: what stands around or behind them would never run.

    fused(x, self.out_proj.weight)        and not        self.out_proj(x)

Such a read is seen in a forward, and in the code that a forward may run: a kernel for another device, another mode.
"""

from __future__ import annotations

import dis
import inspect
from functools import cache
from types import CodeType
from typing import Any

from torch import nn

from peftcore.adapted import base_modules, original_class
from peftcore.observation.tracing import observe, once_a_model

# What one may ask of a weight without using its values.
_FACTS = {"dtype", "device", "shape", "ndim", "requires_grad", "is_meta", "is_cuda", "is_quantized", "numel", "size"}


@once_a_model
def bypassed(model: nn.Module) -> dict[str, str]:
    """{path: why} of the layers with a weight that are bypassed. What is not reached is not known, and left out.

    Those of `nn.MultiheadAttention` are not among them: it is adapted as a whole.
    """
    modules = dict(base_modules(model))
    found: dict[str, str] = {}
    for path, module in modules.items():
        cls = original_class(module)
        inside = (f"{path}.{name}" if path else name for name in _read_weights(cls))
        found.update(dict.fromkeys(inside, f"code of {cls.__name__} takes its weight without calling it"))
    seen = observe(model)
    for path in seen.read - seen.called:
        parent = path.rpartition(".")[0]
        if parent not in seen.failed and not isinstance(modules.get(parent), nn.MultiheadAttention):
            found[path] = "its weight is read, and it is not called"
    return {path: why for path, why in found.items() if path in modules and _has_matrix(modules[path])}


def _has_matrix(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and not isinstance(module, nn.Embedding)


@cache
def _read_weights(cls: type[nn.Module]) -> frozenset[str]:
    """The modules x, or x.y, of which the class's forward, or what it calls on itself, takes `self.x.weight`."""
    found: set[str] = set()
    seen, queue = {"forward"}, ["forward"]
    while queue:
        function = _function(cls, queue.pop())
        if function is None:
            continue
        for code in _codes(function.__code__):
            found |= _weights(code)
            called = {name for name in code.co_names if name not in seen and _function(cls, name) is not None}
            seen |= called
            queue += called
    return frozenset(found)


def _function(cls: type, name: str) -> Any:
    """The method of a class that is not PyTorch's, without its decorators."""
    owner = next((c for c in cls.__mro__ if name in c.__dict__), None)
    if owner is None or owner.__module__.split(".")[0] == "torch" or name == "__init__":
        return None
    function = inspect.unwrap(inspect.getattr_static(cls, name))
    return function if inspect.isfunction(function) else None


def _codes(code: CodeType) -> list[CodeType]:
    """A function's code, and that of the functions inside it."""
    return [code, *(c for const in code.co_consts if isinstance(const, CodeType) for c in _codes(const))]


def _weights(code: CodeType) -> set[str]:
    """x, x.y: of which modules it takes `self.x.weight`, not only to ask for a fact or a type."""
    if "weight" not in code.co_names:
        return set()
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "EXTENDED_ARG", "NOP")]
    found = set()
    for i, step in enumerate(steps[:-1]):
        if step.argval != "weight" or not step.opname.startswith("LOAD_"):
            continue
        first = i
        while first and steps[first - 1].opname.startswith("LOAD_ATTR"):
            first -= 1
        path, owner, then = [s.argval for s in steps[first:i]], steps[first - 1].argval, steps[i + 1]
        asks = then.opname.startswith(("LOAD_ATTR", "LOAD_METHOD")) and _is_fact(then.argval)
        tested = any(s.argval == "isinstance" for s in steps[max(0, first - 4) : first])
        if path and (owner == "self" or owner[-1:] == ("self",)) and not asks and not tested:
            found.add(".".join(path))
    return found


def _is_fact(attribute: str) -> bool:
    return attribute in _FACTS or attribute.startswith("_")
