"""Layers whose weight is read while they are not called: what stands around or behind them would never run.

    fused(x, self.out_proj.weight)        and not        self.out_proj(x)

Such a read is seen in a forward, and in the code that a forward may run: a kernel for another device, another mode.
Code under a condition that the settings of its module rule out (`if self.slow_but_exact:`) is not such code.
"""

from __future__ import annotations

import ast
import dis
import inspect
import operator
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator
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
    """Yield (path, class, what its code takes of a weight) of all modules.

    Code that counts is in the forwards, and in the methods whose names that code uses, on whichever module.
    """
    alike: dict[Any, list[tuple[str, nn.Module]]] = defaultdict(list)  # to mypy a class is not hashable
    for path, module in base_modules(model):
        alike[original_class(module)].append((path, module))
    found: dict[str, dict[_Read, None]] = defaultdict(dict)
    seen, queue = {"forward"}, ["forward"]
    while queue:
        name = queue.pop()
        for cls, modules in alike.items():
            for part in _parts(cls, name):
                for path, _ in (each for each in modules if not part.is_ruled_out(each[1])):
                    found[path].update(dict.fromkeys(part.reads))
                    queue += [used for used in part.names if used not in seen]
                    seen.update(part.names)
    for cls, modules in alike.items():
        for path, _ in modules:
            yield from ((path, cls, read) for read in found.get(path, ()))


@dataclass(frozen=True)
class _Part:
    """The names that code of a method uses, and its reads of weights, under conditions that all must hold."""

    conditions: tuple[tuple[ast.expr, bool], ...]
    names: frozenset[str]
    reads: tuple[_Read, ...]

    def is_ruled_out(self, module: nn.Module) -> bool:
        """Return whether settings of `module` rule out one of the conditions."""
        for test, wanted in self.conditions:
            value = _value(test, module)
            if value is not _UNKNOWN and bool(value) is not wanted:
                return True
        return False


@cache
def _parts(cls: Any, name: str) -> tuple[_Part, ...]:
    """Return the parts of the method `name` of `cls`."""
    function = _function(cls, name)
    if function is None:
        return ()
    conditions = _conditions(function)
    names, reads = defaultdict[Any, set[str]](set), defaultdict[Any, list[_Read]](list)
    for code in _codes(function.__code__):
        for step, line in _lines(code):
            if isinstance(step.argval, str) and step.argval in code.co_names:
                names[conditions.get(line, ())].add(step.argval)
        for read, line in _weights(code):
            reads[conditions.get(line, ())].append(read)
    return tuple(_Part(under, frozenset(names[under]), tuple(reads[under])) for under in {**names, **reads})


def _lines(code: CodeType) -> Iterator[tuple[dis.Instruction, int]]:
    """Yield the instructions of `code` with their lines."""
    starts = dict(dis.findlinestarts(code))
    line = code.co_firstlineno
    for step in dis.get_instructions(code):
        line = starts.get(step.offset) or line
        yield step, line


def _conditions(function: Any) -> dict[int, tuple[tuple[ast.expr, bool], ...]]:
    """Return {line: (test, its value) of every `if` that leads to the line}; nothing without the source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return {}
    found: dict[int, tuple[tuple[ast.expr, bool], ...]] = {}
    first = function.__code__.co_firstlineno - 1

    def walk(statements: list[ast.stmt], under: tuple[tuple[ast.expr, bool], ...]) -> None:
        for statement in statements:
            for line in range(statement.lineno, (statement.end_lineno or statement.lineno) + 1):
                found[first + line] = under
            if isinstance(statement, ast.If) and statement.body[0].lineno > (statement.test.end_lineno or 0):
                walk(statement.body, (*under, (statement.test, True)))
                walk(statement.orelse, (*under, (statement.test, False)))
                if isinstance(statement.body[-1], ast.Return | ast.Raise):
                    under = (*under, (statement.test, False))
            elif not isinstance(statement, ast.ClassDef | ast.If):
                for name in ("body", "orelse", "finalbody"):
                    walk(getattr(statement, name, []), under)
                for handler in getattr(statement, "handlers", []):
                    walk(handler.body, under)

    walk(tree.body, ())
    return found


_UNKNOWN: Any = object()
_CHANGING = {"training", "gradient_checkpointing"}  # set by train() and by transformers, between two forwards
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not,
}  # fmt: skip


def _value(test: ast.expr, module: nn.Module) -> Any:
    """Return what `test` is with the settings of `module`, or `_UNKNOWN`."""
    if isinstance(test, ast.Constant):
        return test.value
    if isinstance(test, ast.Attribute):
        return _setting(test, module)
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        value = _value(test.operand, module)
        return value if value is _UNKNOWN else not value
    if isinstance(test, ast.BoolOp):
        values = [_value(each, module) for each in test.values]
        decides = isinstance(test.op, ast.Or)  # `or` with one that is true is true, whatever the others are
        if any(value is not _UNKNOWN and bool(value) is decides for value in values):
            return decides
        return _UNKNOWN if _UNKNOWN in values else not decides
    if isinstance(test, ast.Compare) and len(test.ops) == 1 and type(test.ops[0]) in _COMPARISONS:
        left, right = _value(test.left, module), _value(test.comparators[0], module)
        if left is not _UNKNOWN and right is not _UNKNOWN:
            try:
                return _COMPARISONS[type(test.ops[0])](left, right)
            except TypeError:
                return _UNKNOWN
    return _UNKNOWN


def _setting(attribute: ast.Attribute, module: nn.Module) -> Any:
    """Return the plain value of `self.name`, or `_UNKNOWN` where it may change between two forwards."""
    name, own = attribute.attr, module.__dict__
    cls: Any = original_class(module)
    if not (isinstance(attribute.value, ast.Name) and attribute.value.id == "self") or name not in own:
        return _UNKNOWN
    if name.startswith("_") or name in _CHANGING or name in _assigned(cls):
        return _UNKNOWN
    return own[name] if isinstance(own[name], bool | int | float | str | None) else _UNKNOWN


@cache
def _assigned(cls: type) -> frozenset[str]:
    """Return the names of attributes that methods of `cls` other than `__init__` assign, on whichever object."""
    functions = (inspect.unwrap(f) for c in cls.__mro__ for f in vars(c).values() if inspect.isfunction(f))
    codes = (code for f in functions if f.__name__ != "__init__" for code in _codes(f.__code__))
    steps = (step for code in codes for step in dis.get_instructions(code))
    return frozenset(step.argval for step in steps if step.opname == "STORE_ATTR")


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


def _weights(code: CodeType) -> Iterator[tuple[_Read, int]]:
    """Yield the reads of weights in `code`, with their lines."""
    if "weight" not in code.co_names:
        return
    lines = [(step, line) for step, line in _lines(code) if step.opname not in ("CACHE", "EXTENDED_ARG", "NOP")]
    steps = [step for step, _ in lines]
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
            yield _Read(".".join(path), then, owner == "self" or owner[-1:] == ("self",), tested), lines[i][1]
