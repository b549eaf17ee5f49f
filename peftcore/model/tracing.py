"""Trace of one forward pass: which modules were called with what, and where each value came from.

Values are numbered in the order of creation; an in-place operator makes a new value of the same tensor.
"""

from __future__ import annotations

import functools
import inspect
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only

from peftcore.model.base_modules import base_modules, original_class, walked_once
from peftcore.model.inputs import example_inputs
from peftcore.model.meta import MetaFloats, meta_copy
from peftcore.plugin.outputs import first_of

Inputs = Callable[[nn.Module], dict[str, Any]]

SKIPPED = "layer"  # the operator of the output of a layer that was not traced
# Operators whose output is not a weight in another form any more.
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "embedding", "native_layer_norm", "_grouped_mm"}


@dataclass(eq=False)
class Call:
    """One call of a module.

    Args:
        arguments: value of each argument that is a tensor, by name.
        output: value of the output, a tensor or a tuple's first.
        given: shapes of all tensors in the arguments, by name, in the same containers; None for non-tensors.
        gave: shapes of all tensors in the output.
    """

    path: str
    module: nn.Module
    parent: Call | None
    arguments: dict[str, int] = field(default_factory=dict)
    output: int | None = None
    given: dict[str, Any] = field(default_factory=dict)
    gave: Any = None

    def around(self) -> Iterator[Call]:
        """Yield the calls inside which this one ran, innermost first."""
        call = self.parent
        while call is not None:
            yield call
            call = call.parent

    @property
    def first(self) -> int | None:
        """Return the value of the first argument."""
        return next(iter(self.arguments.values()), None)


@dataclass(frozen=True)
class Value:
    """A tensor at one time: the operator that made it, from which values, inside which call."""

    operator: str
    inputs: tuple[int, ...]
    call: Call | None
    shape: tuple[int, ...]
    is_weight: bool  # a parameter, buffer or constant, also transposed, cast or sliced
    moves_last: bool = False  # the operator moved its input's last dimension (transpose, permute)
    moves_first: bool = False  # the operator moved its input's first dimension


@dataclass
class Trace:
    """Record of one forward pass.

    Args:
        values, calls: in their order.
        called: paths of the modules whose forward was called.
        with_gradients: paths of the modules whose forward was called with gradients enabled.
        in_function: paths of the modules that the forward of a `torch.autograd.Function` called (RevNet's layers).
        own_reads: full names of the parameters that an operator took while the forward of their module ran.
        other_reads: {full name of a parameter: paths of the modules that read it while its own module did not run}.
        rewritten: {full name of a parameter that the forward changes in place: path of the module that does}.
        dtype_reads: full names of the parameters whose dtype other modules read.
        alike: (path, path of the traced layer) of layers that do the same; all of the above include their modules.
        error: the exception that ended the forward early, or None.
        failed: paths of the modules in which it was raised.
    """

    values: list[Value] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    called: set[str] = field(default_factory=set)
    with_gradients: set[str] = field(default_factory=set)
    in_function: set[str] = field(default_factory=set)
    own_reads: set[str] = field(default_factory=set)
    other_reads: dict[str, set[str]] = field(default_factory=dict)
    rewritten: dict[str, str] = field(default_factory=dict)
    dtype_reads: set[str] = field(default_factory=set)
    alike: list[tuple[str, str]] = field(default_factory=list)
    error: Exception | None = None
    failed: set[str] = field(default_factory=set)


_REMEMBERED: WeakKeyDictionary[nn.Module, tuple[Any, dict[str, Any]]] = WeakKeyDictionary()


_HELD = threading.local()  # .model: (the model that this thread leaves as it is, its structure)


@contextmanager
def assumed_unchanged(model: nn.Module) -> Iterator[None]:
    """Promise that `model` does not change inside the block, so that caches are validated only once."""
    before = getattr(_HELD, "model", None)
    if before is None or before[0] is not model:
        _HELD.model = model, structure_of(model)
    try:
        with walked_once(model):
            yield
    finally:
        _HELD.model = before


def cached_by_model(find: Callable[[nn.Module], Any]) -> Callable[[nn.Module], Any]:
    """Cache the result of a function of a model while its modules stay the same."""

    @functools.wraps(find)
    def remembered(model: nn.Module) -> Any:
        held = getattr(_HELD, "model", None)
        like = held[1] if held is not None and held[0] is model else structure_of(model)
        known = _REMEMBERED.get(model)
        if known is None or known[0] is not like:
            known = _REMEMBERED[model] = like, known[1] if known is not None and known[0] == like else {}
        found = known[1]
        if find.__qualname__ not in found:
            found[find.__qualname__] = find(model)
        return found[find.__qualname__]

    return remembered


def share_facts(model: nn.Module, other: nn.Module, *, shared: bool = True) -> None:
    """Give `model` the cached facts of `other`, which has the same weights and parts.

    Args:
        model: model whose facts are replaced.
        other: model whose facts are known.
        shared: whether facts found later of one of the two are known of the other.
    """
    if other not in _REMEMBERED:
        _REMEMBERED[other] = structure_of(other), {}
    structure, facts = _REMEMBERED[other]
    _REMEMBERED[model] = structure, facts if shared else dict(facts)


def trace(
    model: nn.Module, *, training: bool = False, every_layer: bool = False, inputs: Inputs | None = None
) -> Trace:
    """Trace a forward pass of `model` with example inputs on a meta copy; the model is not changed.

    A forward that fails, for example because of a missing input, is traced up to there.

    Args:
        training: whether the copy is in training mode.
        every_layer: also trace layers that are like a traced one.
        inputs: (model) -> keyword arguments on the CPU; by default `example_inputs`.
    """
    try:
        copied = meta_copy(model).train(training)
    except Exception as error:  # something in it cannot be copied: a process group, an open file
        return Trace(error=error)
    found = _Watch(copied, skips=not every_layer).run(inputs or partial(example_inputs, device="cpu"))
    return trace(model, training=training, every_layer=True, inputs=inputs) if found.error and found.alike else found


observe: Callable[[nn.Module], Trace] = cached_by_model(trace)  # of a forward in evaluation mode, cached


class _Watch:
    def __init__(self, model: nn.Module, skips: bool) -> None:
        self.trace = Trace()
        self._skips = skips
        self._model = model
        self._numbers: dict[int, int] = {}  # of tensors, by their id
        self._tensors: list[Tensor] = []  # by number; alive, so that no id comes again
        # (id of a module, full name) of each module that has a parameter, by the parameter's id
        self._owners: dict[int, list[tuple[int, str]]] = defaultdict(list)
        self._paths = {id(module): path for path, module in base_modules(model)}
        self._call: Call | None = None
        self._seen: dict[Any, tuple[str, Any, Any]] = {}  # layers that were watched
        self._running: dict[int, int] = defaultdict(int)  # calls of a module that have begun, by its id
        for path, module in base_modules(model):
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    self._owners[id(parameter)].append((id(module), f"{path}.{name}" if path else name))

    def run(self, make_inputs: Inputs) -> Trace:
        inputs = {
            name: torch.empty_like(value, device="meta") if value.is_floating_point() else value
            for name, value in make_inputs(self._model).items()
        }
        for value in inputs.values():
            self._new(value, "input", (), False)
        for module in self._model.modules():
            self._wrap(module)
        try:
            # No parameter of the copy requires a gradient: this shows which modules the model itself runs without.
            with torch.enable_grad(), _DtypeReads(self._record_dtype), MetaFloats(self._record):
                self._model(**inputs)
        except Exception as error:  # anything may go wrong in a forward
            self.trace.error = error
        return self.trace

    def _wrap(self, module: nn.Module) -> None:
        forward = module.forward
        if isinstance(module, torch.jit.ScriptModule) or getattr(forward, "__name__", "") == "_forward_unimplemented":
            return
        path, names = self._paths.get(id(module), ""), _names(forward)
        numbers = list(map(str.isdigit, path.split(".")))
        is_layer = self._skips and numbers[-1] and sum(numbers) == 1 and any(True for _ in module.children())
        structure = structure_of(module) if is_layer else None  # here, since it reads the dtypes of parameters

        @functools.wraps(forward)
        def watched(*args: Any, **kwargs: Any) -> Any:
            call = Call(path, module, self._call)
            for name, value in [*zip(names, args, strict=False), *kwargs.items()]:
                if isinstance(value, Tensor):
                    call.given[name] = value.shape
                    call.arguments[name] = self._number(value)
                else:
                    call.given[name] = shapes_of(value)
            self.trace.calls.append(call)
            key = (path.rpartition(".")[0], structure, _kind(args, kwargs)) if is_layer else None
            if key in self._seen:
                output = self._again(call, *self._seen[key], args, kwargs)
            else:
                self._call = call
                self._running[id(module)] += 1
                self.trace.called.add(path)
                if torch.is_grad_enabled():
                    self.trace.with_gradients.add(path)
                # The forward of an autograd.Function runs with forward-mode derivatives off; no_grad leaves them on.
                if not torch._C._is_fwd_grad_enabled():
                    self.trace.in_function.add(path)
                try:
                    output = forward(*args, **kwargs)
                except Exception:
                    self.trace.failed.add(path)
                    raise
                finally:
                    self._call = call.parent
                    self._running[id(module)] -= 1
                if key is not None:
                    self._seen[key] = path, (args, kwargs), output
            call.gave = shapes_of(output)
            first = first_of(output)  # what an `After` gets
            if isinstance(first, Tensor):
                call.output = self._number(first)
            return output

        module.__dict__["forward"] = watched

    def _again(self, call: Call, path: str, before: Any, output: Any, args: Any, kwargs: Any) -> Any:
        """Return the output of the layer at `call`, which is like the traced one at `path`."""
        seen = self.trace

        def renamed(name: str) -> str:
            return call.path + name[len(path) :] if is_inside(name) else name

        def is_inside(name: str) -> bool:
            return name == path or name.startswith(f"{path}.")

        for names in (seen.called, seen.with_gradients, seen.in_function, seen.own_reads, seen.dtype_reads):
            names.update([renamed(name) for name in names if is_inside(name)])
        for name in filter(is_inside, list(seen.other_reads)):
            seen.other_reads.setdefault(renamed(name), set()).update(map(renamed, seen.other_reads[name]))
        for name in filter(is_inside, list(seen.rewritten)):
            seen.rewritten[renamed(name)] = renamed(seen.rewritten[name])
        seen.alike.append((call.path, path))
        given = {id(old): new for old, new in zip(tree_leaves(before), tree_leaves((args, kwargs)), strict=True)}
        inputs = tuple(call.arguments.values())

        def like(tensor: Tensor) -> Tensor:
            if id(tensor) in given:
                return given[id(tensor)]
            made = torch.zeros_like(tensor)
            self._new(made, SKIPPED, inputs, False)
            return made

        return tree_map_only(Tensor, like, output)

    def _new(
        self,
        tensor: Tensor,
        operator: str,
        inputs: tuple[int, ...],
        is_weight: bool,
        moves_last: bool = False,
        moves_first: bool = False,
    ) -> int:
        self._numbers[id(tensor)] = number = len(self._tensors)
        self._tensors.append(tensor)
        self.trace.values.append(
            Value(
                operator=operator,
                inputs=inputs,
                call=self._call,
                shape=tuple(tensor.shape),
                is_weight=is_weight,
                moves_last=moves_last,
                moves_first=moves_first,
            )
        )
        return number

    def _number(self, tensor: Tensor) -> int:
        number = self._numbers.get(id(tensor))
        return self._new(tensor, "leaf", (), True) if number is None else number

    def _record(self, operator: Any, args: tuple[Any, ...], tensors: list[Tensor], output: Any) -> None:
        values = self.trace.values
        name = operator._schema.name.partition("::")[2]
        inputs: tuple[int, ...] = ()
        is_weight = name not in _PRODUCTS
        for tensor in tensors:
            known = self._numbers.get(id(tensor))
            inputs += (self._new(tensor, "leaf", (), True) if known is None else known,)
            is_weight = is_weight and values[inputs[-1]].is_weight
            self._record_read(tensor)
        moves_last = name in _TURNS and _TURNS[name](-1, *args)
        moves_first = name in _TURNS and _TURNS[name](0, *args)
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                number = self._new(tensor, name, inputs, is_weight, moves_last, moves_first)
        if operator._schema.is_mutable and tensors and inputs:  # the tensor that it is a view of has changed, too
            of = inputs[0]
            while values[of].operator in _VIEWS:
                of = values[of].inputs[0]
                self._new(self._tensors[of], name, (of, number), is_weight)
            for _, changed in self._owners.get(id(self._tensors[of]), ()):
                self.trace.rewritten[changed] = self._reader

    @property
    def _reader(self) -> str:
        return "" if self._call is None else self._call.path

    def _is_running(self, owners: Iterable[tuple[int, str]]) -> bool:
        return any(self._running.get(module) for module, _ in owners)

    def _record_read(self, tensor: Tensor) -> None:
        owners = self._owners.get(id(tensor), ())
        is_own = self._is_running(owners)
        for _, name in owners:
            if is_own:
                self.trace.own_reads.add(name)
            else:
                self.trace.other_reads.setdefault(name, set()).add(self._reader)

    def _record_dtype(self, tensor: Any) -> None:
        owners = self._owners.get(id(tensor), ())
        if not self._is_running(owners):
            self.trace.dtype_reads.update(name for _, name in owners)


class _DtypeReads(TorchFunctionMode):
    """Call `record` with each tensor whose dtype is read, which no operator shows."""

    def __init__(self, record: Callable[[Any], None]) -> None:
        super().__init__()
        self._record = record

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function == _DTYPE:
            self._record(args[0])
        return function(*args, **(kwargs or {}))


_DTYPE: Any = Tensor.dtype.__get__  # type: ignore[attr-defined]

_VIEWS = {
    "alias", "as_strided", "detach", "diagonal", "expand", "permute", "select", "slice", "split", "split_with_sizes",
    "squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze", "view", "_unsafe_view",
}  # fmt: skip

# Whether an operator moves the first (0) or the last (-1) dimension.
_TURNS: dict[str, Callable[..., bool]] = {
    "t": lambda which, x: x.dim() > 1,
    "transpose": lambda which, x, a, b: a % x.dim() != b % x.dim() and which % x.dim() in (a % x.dim(), b % x.dim()),
    "permute": lambda which, x, dims: dims[which] % x.dim() != which % x.dim(),
}


def structure_of(module: nn.Module) -> Any:
    """Return a value that is equal for modules with the same parts, sizes and settings, whatever their index is."""
    is_setting: Callable[[Any], bool] = _is_setting  # to mypy a class is not hashable

    found: list[Any] = []
    for path, part in base_modules(module):
        found += path, original_class(part)
        for name, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None:
                found.append((name, None if is_lazy(tensor) else tensor.shape, tensor.dtype))
        for name, value in part.__dict__.items():
            if is_setting(type(value)) and not _is_index(name):
                found.append((name, value))
    return tuple(found)


_SETTINGS = (bool, int, float, str, type(None))


@functools.lru_cache(1024)
def _is_setting(cls: type) -> bool:
    return issubclass(cls, _SETTINGS)


_INDEX = re.compile(r"(^|_)(idx|index|id|number)$|^training$|^_peftcore_")  # or what a change of adapters changes


@functools.lru_cache(4096)
def _is_index(name: str) -> bool:
    return _INDEX.search(name) is not None


def shapes_of(value: Any) -> Any:
    """Return the shape of each tensor in nested tuples, lists and dictionaries; None for anything else."""
    return tree_map(lambda leaf: leaf.shape if isinstance(leaf, Tensor) else None, value)


def _kind(args: Any, kwargs: Any) -> Any:
    """Return a value that is equal for calls that differ only in the values of tensors."""
    leaves, structure = tree_flatten((args, kwargs))
    return str(structure), tuple(
        (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf if isinstance(leaf, _SETTINGS) else type(leaf)
        for leaf in leaves
    )


def _names(forward: Any) -> list[str]:
    return [name for name, each in inspect.signature(forward).parameters.items() if each.kind is not each.VAR_KEYWORD]
