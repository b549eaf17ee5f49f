"""Layers whose weight is read while they are not called: what stands around or behind them would never run.

    fused(x, self.out_proj.weight)        and not        self.out_proj(x)

Such a read is seen in a forward, and in the code that a forward may run: a kernel for another device, another mode.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import CodeType
from typing import Any

from torch import nn

from peftcore.adaptation.adapted import base_modules
from peftcore.adaptation.class_swap import original_class
from peftcore.observation.tracing import observe, once_a_model

# What one may ask of a weight without using its values.
_FACTS = {"dtype", "device", "shape", "ndim", "requires_grad", "is_meta", "is_cuda", "is_quantized", "numel", "size",
          "requires_grad_", "register_hook"}  # fmt: skip


def bypassed(model: nn.Module) -> dict[str, str]:
    """{path: why} of the layers with a weight that are bypassed. What is not reached is not known, and left out.

    Those of `nn.MultiheadAttention` are not among them: it is adapted as a whole.
    """
    return {**_bypassed_in_code(model), **dict(_fused(dict(base_modules(model))))}


@once_a_model
def _bypassed_in_code(model: nn.Module) -> dict[str, str]:
    modules = dict(base_modules(model))
    found: dict[str, str] = {}
    for path, cls, read in _reads(model):
        if read.of_self and not read.is_fact and not read.is_change:
            found[_join(path, read.path)] = f"code of {cls.__name__} takes its weight without calling it"
    seen = observe(model)
    for path in seen.read - seen.called:
        parent = path.rpartition(".")[0]
        if parent not in seen.failed and not isinstance(modules.get(parent), nn.MultiheadAttention):
            found[path] = "its weight is read, and it is not called"
    return {path: why for path, why in found.items() if path in modules and _has_matrix(modules[path])}


# Projections that diffusers' attentions have made one of, by its name, once their `fused_projections` is True.
_FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_kv": ("add_k_proj", "add_v_proj"),
}


def _fused(modules: dict[str, nn.Module]) -> Iterator[tuple[str, str]]:
    """(path, why) of projections in whose place a fused one is called, or of one that was taken apart and stays."""
    for path, module in modules.items():
        if "fused_projections" not in module.__dict__ and not hasattr(type(module), "fused_projections"):
            continue  # a module that has none looks for it long
        if getattr(module, "fused_projections", False) is not True:
            continue
        processor = type(getattr(module, "processor", None)).__name__  # which alone changes where there is no method
        is_used = hasattr(module, "unfuse_projections") or processor.startswith("Fused")
        for whole, parts in _FUSED.items():
            if _join(path, whole) in modules and is_used:
                yield from ((_join(path, part), f"'{whole}' has its weight, and is called") for part in parts)
            elif _join(path, whole) in modules:
                yield _join(path, whole), f"{', '.join(parts)} are called in its place"


@once_a_model
def rewritten(model: nn.Module) -> dict[str, str]:
    """{path: why} of the layers whose weight the model itself changes in place: RWKV's, halved for evaluation."""
    modules = dict(base_modules(model))
    found: dict[str, str] = {}
    for path, cls, read in _reads(model):
        if read.is_change:  # also of a part of a part: `for block in self.blocks: block.output.weight.mul_(2)`
            inside = [p for p in modules if p.startswith(_join(path, "")) and f".{p}".endswith(f".{read.path}")]
            found.update(dict.fromkeys(inside, f"code of {cls.__name__} changes its weight in place"))
    return {path: why for path, why in found.items() if _has_matrix(modules[path])}


@once_a_model
def asked_for_dtype(model: nn.Module) -> list[str]:
    """The layers whose weight's dtype code of the model asks for, to bring an input to it (ColPali)."""
    return [_join(path, read.path) for path, _, read in _reads(model) if read.of_self and read.then[:1] == ("dtype",)]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _has_matrix(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and not isinstance(module, nn.Embedding)


@dataclass(frozen=True)
class _Read:
    """`self.path.weight.then`, or `of another name.path.weight.then`, in the code of a class."""

    path: str
    then: tuple[str, ...]
    of_self: bool
    is_tested: bool  # isinstance(self.path.weight, ...)

    @property
    def is_fact(self) -> bool:
        return self.is_tested or (bool(self.then) and (self.then[0] in _FACTS or self.then[0].startswith("_")))

    @property
    def is_change(self) -> bool:
        """Is it `weight.mul_(...)`, or `weight.data.mul_(...)`?"""
        last = self.then[-1] if self.then else ""
        return last.endswith("_") and last.strip("_") != "" and last not in _FACTS and not self.is_fact


def _reads(model: nn.Module) -> Iterator[tuple[str, type[nn.Module], _Read]]:
    """(path, class, what its code takes of a weight) of all modules."""
    classes = {path: original_class(module) for path, module in base_modules(model)}
    by_class = _reads_by_class(frozenset(classes.values()))
    for path, cls in classes.items():
        for read in by_class[cls]:
            yield path, cls, read


@cache
def _reads_by_class(classes: frozenset[type[nn.Module]]) -> dict[type[nn.Module], frozenset[_Read]]:
    """What the forwards of `classes` take of weights, and the methods whose names these use, on whichever module."""
    found: dict[type[nn.Module], set[_Read]] = {cls: set() for cls in classes}
    seen, queue = {"forward"}, ["forward"]
    while queue:
        name = queue.pop()
        for cls in classes:
            function = _function(cls, name)
            if function is None:
                continue
            for code in _codes(function.__code__):
                found[cls].update(_weights(code))
                queue += [called for called in code.co_names if called not in seen]
                seen.update(code.co_names)
    return {cls: frozenset(reads) for cls, reads in found.items()}


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


def _weights(code: CodeType) -> Iterator[_Read]:
    if "weight" not in code.co_names:
        return
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "EXTENDED_ARG", "NOP")]
    for i, step in enumerate(steps[:-1]):
        if step.argval != "weight" or not step.opname.startswith("LOAD_"):
            continue
        first = last = i
        while first and steps[first - 1].opname.startswith("LOAD_ATTR"):
            first -= 1
        while steps[last + 1].opname.startswith(("LOAD_ATTR", "LOAD_METHOD")):
            last += 1
        path, owner = [s.argval for s in steps[first:i]], steps[first - 1].argval
        if path and isinstance(owner, str | tuple):
            then = tuple(s.argval for s in steps[i + 1 : last + 1])
            tested = any(s.argval == "isinstance" for s in steps[max(0, first - 4) : first])
            yield _Read(".".join(path), then, owner == "self" or owner[-1:] == ("self",), tested)
