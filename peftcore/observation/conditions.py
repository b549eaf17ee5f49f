"""Conditions in the code of a method, and what is known about them from settings and from arguments never passed.

if self.pieces > 1:                     a plain attribute, set once, in `__init__`
if self.config.pretraining_tp > 1:      a field of the config
if query_states is None:                a parameter of `forward` to which no code that runs passes a value
"""

from __future__ import annotations

import ast
import builtins
import dis
import inspect
import math
import operator
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from types import CodeType
from typing import Any

from torch import nn

from peftcore.adaptation.base_modules import base_modules, original_class

Conditions = tuple[tuple[ast.expr, bool], ...]  # tests, and the value that each of them must have

Known = dict[tuple[int, str], tuple[Any, Any]]  # {(id of a config, field): (the config, its value)}
ANY = "*"  # a callee that is not an attribute with a name, and a keyword that `**` may pass
UNKNOWN: Any = object()


@dataclass(frozen=True)
class Pass:
    """An argument of a call: `callee(.., keyword=value)`, or the count of the positional ones."""

    callee: str
    of_self: bool
    keyword: str | None
    value: ast.expr | None = None
    positional: float = 0


class Source:
    """The source of a method. Lines are those of its code object."""

    def __init__(self, function: Any) -> None:
        self._function = function
        self._first = function.__code__.co_firstlineno - 1
        try:
            self._tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, TypeError, SyntaxError):
            self._tree = ast.Module([], [])

    @property
    def all_conditions(self) -> Iterable[Conditions]:
        """Return the conditions of all lines."""
        return self._conditions.values()

    def under(self, line: int) -> Conditions:
        """Return the conditions that lead to `line`."""
        return self._conditions.get(line, ())

    @cached_property
    def passes(self) -> dict[Conditions, list[tuple[int, Pass]]]:
        """Return {conditions: (line, argument of a call of what may be a module)}."""
        if self._definition is None:
            return {(): [(0, Pass(ANY, False, ANY))]}
        found = defaultdict[Conditions, list[tuple[int, Pass]]](list)
        for call, outside in self._calls():
            for passed in _passes(call) if outside is None else self._through(outside):
                found[self.under(self.line(call))].append((self.line(call), passed))
        return found

    def _calls(self) -> Iterator[tuple[ast.Call, str | None]]:
        """Yield each call in the code, and the name of a global or builtin that it calls; None for anything else."""
        code = self._function.__code__
        outside = (self._function.__globals__.keys() | dir(builtins)) - {*code.co_varnames, *code.co_cellvars}
        for call in (node for node in ast.walk(self._tree) if isinstance(node, ast.Call)):
            is_outside = isinstance(call.func, ast.Name) and call.func.id in outside
            yield call, call.func.id if isinstance(call.func, ast.Name) and is_outside else None

    def _through(self, name: str) -> Iterator[Pass]:
        """Yield what the function `name` passes on to modules; the values are unknown."""
        called = self._function.__globals__.get(name)
        if "checkpoint" in getattr(called, "__name__", ""):
            yield Pass(ANY, False, ANY)
        elif inspect.isfunction(called) and not called.__module__.startswith("torch."):
            for call, outside in source(inspect.unwrap(called))._calls():
                given = _passes(call) if outside is None else ()
                yield from (replace(each, of_self=False, value=None) for each in given)

    @cached_property
    def stores(self) -> dict[Conditions, list[tuple[str, int]]]:
        """Return {conditions: (name that is assigned, the first line at which it may have another value)}."""
        found = defaultdict[Conditions, list[tuple[str, int]]](list)
        for line, name, since in _stores(self._definition) if self._definition is not None else ():
            found[self.under(self._first + line)].append((name, self._first + since))
        return found

    def asks_arguments(self, conditions: Conditions) -> bool:
        """Return whether the conditions depend on optional parameters."""
        nodes = (node for test, _ in conditions for node in ast.walk(test))
        return any(isinstance(node, ast.Name) and node.id in self.optional for node in nodes)

    @cached_property
    def _conditions(self) -> dict[int, Conditions]:
        return {self._first + line: under for line, under in _conditions(self._tree.body)}

    @cached_property
    def optional(self) -> dict[str, int]:
        """Return {parameter whose default is None: its index behind `self`}."""
        try:
            parameters = inspect.signature(self._function).parameters.values()
        except (TypeError, ValueError):
            return {}
        return {parameter.name: index - 1 for index, parameter in enumerate(parameters) if parameter.default is None}

    @property
    def _definition(self) -> ast.FunctionDef | None:
        body = self._tree.body
        return body[0] if body and isinstance(body[0], ast.FunctionDef) else None

    def line(self, node: ast.expr) -> int:
        """Return the line of a node of its source."""
        return self._first + node.lineno


source = cache(Source)


def _conditions(body: list[ast.stmt]) -> list[tuple[int, Conditions]]:
    """Return (line, conditions that lead to it) of statements; the last one of a line counts."""
    found: list[tuple[int, Conditions]] = []

    def walk(statements: list[ast.stmt], under: Conditions) -> None:
        for statement in statements:
            for line in range(statement.lineno, (statement.end_lineno or statement.lineno) + 1):
                found.append((line, under))
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

    walk(body, ())
    return found


def _passes(call: ast.Call) -> Iterator[Pass]:
    """Yield the arguments of a call, by the attribute that is called."""
    callee, of_self = ANY, False
    if isinstance(call.func, ast.Attribute) and call.func.attr not in ("forward", "__call__"):
        callee = call.func.attr
        of_self = isinstance(call.func.value, ast.Name) and call.func.value.id == "self"
    starred = any(isinstance(each, ast.Starred) for each in call.args)
    yield Pass(callee, of_self, None, positional=math.inf if starred else len(call.args))
    for keyword in call.keywords:
        yield Pass(callee, of_self, keyword.arg or ANY, keyword.value)


def _stores(definition: ast.FunctionDef) -> Iterator[tuple[int, str, int]]:
    """Yield (line, name, line from which on it may have another value) of what a function assigns.

    In a loop that is the loop's first line, and of names in functions inside it the function's own.
    """

    def walk(node: ast.AST, since: int | None) -> Iterator[tuple[int, str, int]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Name) and not isinstance(child.ctx, ast.Load):
                yield child.lineno, child.id, child.lineno + 1 if since is None else since
            if isinstance(child, ast.arg) and node is not definition.args:
                yield child.lineno, child.arg, definition.lineno
            if isinstance(child, ast.FunctionDef | ast.Lambda):
                yield from walk(child, definition.lineno)
            elif isinstance(child, ast.For | ast.While) and since is None:
                yield from walk(child, child.lineno)
            else:
                yield from walk(child, since)

    yield from walk(definition, None)


class Knowledge:
    """Knowledge about the conditions in a model's code.

    By default only plain settings are known. With `follows_arguments`, every parameter is assumed to keep its default
    until `called` or `stored` shows another value. Pass all code that is not ruled out to both, and repeat while
    `shrank` is true.
    """

    def __init__(self, model: nn.Module, follows_arguments: bool = False) -> None:
        self.asked: Known = {}
        self._modules = dict(base_modules(model))
        self.shrank = False
        self.follows_arguments = follows_arguments
        self._keywords: set[tuple[str, str]] = set()
        self._positional: dict[str, float] = defaultdict(float)
        self._changed: dict[tuple[Source, str], int] = {}

    def reaches(
        self, conditions: Conditions, within: Source, modules: Sequence[tuple[str, nn.Module]]
    ) -> list[tuple[str, nn.Module]]:
        """Return those of `modules` in which every condition may have the value that it must have."""
        reached = []
        for path, module in modules:
            for test, wanted in conditions:
                value = self._value(test, within, path, module)
                if value is not UNKNOWN and bool(value) is not wanted:
                    break
            else:
                reached.append((path, module))
        return reached

    def stored(self, name: str, since: int, within: Source) -> None:
        """Count the variable `name` as changed from the line `since` on."""
        if since < self._changed.get((within, name), math.inf):
            self._changed[within, name], self.shrank = since, True

    def called(
        self, line: int, passed: Pass, within: Source, cls: Any, modules: Sequence[tuple[str, nn.Module]]
    ) -> None:
        """Count a parameter as given what a call at `line` passes, in `modules` of the class `cls`."""
        held = inspect.getattr_static(cls, passed.callee, None) if passed.of_self else None
        if inspect.isfunction(held):
            return  # a method, whose own calls are visible
        callee = ANY if held is not None else passed.callee
        if passed.keyword is None:
            if passed.positional > self._positional[callee]:
                self._positional[callee], self.shrank = passed.positional, True
            return
        if (callee, passed.keyword) in self._keywords:
            return
        value = passed.value
        is_none = isinstance(value, ast.Constant) and value.value is None
        if isinstance(value, ast.Name):
            is_none = all(self._is_none(value.id, line, within, path, module) for path, module in modules)
        if not is_none:
            self._keywords.add((callee, passed.keyword))
            self.shrank = True

    def _is_none(self, name: str, line: int, within: Source, path: str, module: nn.Module) -> bool:
        """Return whether the parameter `name` of a module's `forward` is None at `line`."""
        index = within.optional.get(name) if self.follows_arguments else None
        if index is None or not path or hasattr(module, "main_input_name") or not _is_forward(within, module):
            return False  # the model itself, and parts that `generate` calls, get their arguments from elsewhere
        if self._is_called_by_torch(path):
            return False
        if line >= self._changed.get((within, name), math.inf):
            return False
        for callee in (path.rpartition(".")[2], ANY):
            if {(callee, name), (callee, ANY)} & self._keywords or self._positional[callee] > index:
                return False
        return True

    def _is_called_by_torch(self, path: str) -> bool:
        """Return whether the module is inside a PyTorch container that calls its children, such as `nn.Sequential`."""
        parent = path.rpartition(".")[0]
        while isinstance(self._modules.get(parent), nn.ModuleList | nn.ModuleDict):
            parent = parent.rpartition(".")[0]
        cls: Any = original_class(self._modules[parent]) if parent in self._modules else nn.Module
        return bool(cls.__module__.startswith("torch."))

    def _value(self, test: ast.expr, within: Source, path: str, module: nn.Module) -> Any:
        """Return the value of `test`, or `UNKNOWN`."""
        if isinstance(test, ast.Constant):
            return test.value
        if isinstance(test, ast.Attribute):
            return self._setting(test, module)
        if isinstance(test, ast.Name):
            return None if self._is_none(test.id, within.line(test), within, path, module) else UNKNOWN
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            value = self._value(test.operand, within, path, module)
            return value if value is UNKNOWN else not value
        if isinstance(test, ast.BoolOp):
            decides = isinstance(test.op, ast.Or)  # `or` with one that is true is true, whatever the others are
            found: Any = not decides
            for each in test.values:
                value = self._value(each, within, path, module)
                if value is UNKNOWN:
                    found = UNKNOWN
                elif bool(value) is decides:
                    return decides
            return found
        if isinstance(test, ast.Compare) and len(test.ops) == 1 and type(test.ops[0]) in _COMPARISONS:
            left = self._value(test.left, within, path, module)
            right = self._value(test.comparators[0], within, path, module)
            if left is not UNKNOWN and right is not UNKNOWN:
                try:
                    return _COMPARISONS[type(test.ops[0])](left, right)
                except TypeError:
                    return UNKNOWN
        return UNKNOWN

    def _setting(self, attribute: ast.Attribute, module: nn.Module) -> Any:
        """Return the value of `self.name` or `self.config.name`, or `UNKNOWN` if a forward may see another one."""
        name, owner = attribute.attr, attribute.value
        cls: Any = original_class(module)
        if name.startswith(("_", "output_")) or name in _CHANGING or _assigns(cls, name):
            return UNKNOWN
        if isinstance(owner, ast.Name) and owner.id == "self":
            value = module.__dict__.get(name, UNKNOWN)
            return value if isinstance(value, _PLAIN) else UNKNOWN
        if not isinstance(owner, ast.Attribute) or not isinstance(owner.value, ast.Name) or owner.value.id != "self":
            return UNKNOWN
        config = module.__dict__.get(owner.attr)
        if not hasattr(config, "model_type") or _assigns(cls, owner.attr):
            return UNKNOWN
        value = getattr(config, name, UNKNOWN)
        if not isinstance(value, _PLAIN):
            return UNKNOWN
        self.asked[id(config), name] = config, value
        return value


_PLAIN = (bool, int, float, str, type(None))
# Set by train() and by transformers, between two forwards.
_CHANGING = {"training", "gradient_checkpointing", "use_cache", "return_dict", "use_return_dict"}
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not,
}  # fmt: skip


def _is_forward(within: Source, module: nn.Module) -> bool:
    cls: Any = original_class(module)
    function = function_of(cls, "forward")
    return function is not None and source(function) is within


@cache
def _assigns(cls: type, name: str) -> bool:
    """Return whether a method of `cls` other than `__init__` assigns an attribute `name`, of whichever object."""
    functions = (inspect.unwrap(f) for c in cls.__mro__ for f in vars(c).values() if inspect.isfunction(f))
    codes = (code for f in functions if f.__name__ != "__init__" for code in codes_of(f.__code__))
    steps = (step for code in codes if name in code.co_names for step in dis.get_instructions(code))
    return any(step.opname == "STORE_ATTR" and step.argval == name for step in steps)


@cache
def function_of(cls: type, name: str) -> Any:
    """Return a method of a class outside PyTorch without its decorators, or None."""
    owner = next((c for c in cls.__mro__ if name in c.__dict__), None)
    if owner is None or owner.__module__.split(".")[0] == "torch" or name == "__init__":
        return None
    function = inspect.unwrap(inspect.getattr_static(cls, name))
    return function if inspect.isfunction(function) else None


def codes_of(code: CodeType) -> list[CodeType]:
    """Return a function's code, and that of the functions inside it."""
    return [code, *(c for const in code.co_consts if isinstance(const, CodeType) for c in codes_of(const))]
