"""Trace one forward pass: the calls of modules with their arguments, and the operators between values.

Values are numbered in order of creation. An in-place operator creates a new value for the same tensor.
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

from peftcore.model.base_modules import base_modules, caching_base_modules, original_class
from peftcore.model.inputs import example_inputs
from peftcore.model.meta import MetaFloats, meta_copy
from peftcore.plugin.outputs import first_of

Inputs = Callable[[nn.Module], dict[str, Any]]

SKIPPED = "layer"  # the "operator" that computes the output of a layer that was not traced
# Operators whose output is no longer just the weight in another form.
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "embedding", "native_layer_norm", "_grouped_mm"}


@dataclass(eq=False)
class Call:
    """One call of a module.

    Args:
        path: path of the module.
        module: the module.
        parent: the enclosing call; None for the call of the model.
        arguments: {name of a tensor argument: number of its value}.
        output: number of the value of the output, or of its first tensor.
        argument_shapes: {name: shapes of its tensors, in the same containers; None for non-tensors}.
        output_shapes: shapes of all tensors in the output.
    """

    path: str
    module: nn.Module
    parent: Call | None
    arguments: dict[str, int] = field(default_factory=dict)
    output: int | None = None
    argument_shapes: dict[str, Any] = field(default_factory=dict)
    output_shapes: Any = None

    def enclosing(self) -> Iterator[Call]:
        """Yield the calls that were running when this one began, innermost first."""
        call = self.parent
        while call is not None:
            yield call
            call = call.parent

    @property
    def first(self) -> int | None:
        """Return the number of the first tensor argument's value."""
        return next(iter(self.arguments.values()), None)


@dataclass(frozen=True)
class Value:
    """A tensor at one point in the forward: the operator that computed it, its inputs, and the enclosing call."""

    operator: str
    inputs: tuple[int, ...]
    call: Call | None
    shape: tuple[int, ...]
    is_weight: bool  # a parameter, buffer or constant, possibly transposed, cast or sliced
    moves_last: bool = False  # the operator moves its input's last dimension (transpose, permute)
    moves_first: bool = False  # the operator moves its input's first dimension


@dataclass
class Trace:
    """Record of one forward pass.

    Args:
        values, calls: in the order of execution.
        called: paths of the modules whose forward was called.
        with_gradients: paths of the modules whose forward was called with gradients enabled.
        in_function: paths of the modules called inside the forward of a `torch.autograd.Function` (RevNet's layers).
        own_reads: full names of the parameters that operators read during the forward of the parameter's module.
        other_reads: {full name of a parameter: paths of modules that read it outside the forward of its module}.
        rewritten: {full name of a parameter that the forward changes in place: path of the module that changes it}.
        dtype_reads: full names of the parameters whose dtype other modules read.
        alike: (path, path of the traced layer) for each layer with the same structure as a traced one. The sets above
            include its modules.
        error: the exception that ended the forward, or None.
        failed: paths of the modules in which the exception was raised.
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


_CACHE: WeakKeyDictionary[nn.Module, tuple[Any, dict[str, Any]]] = WeakKeyDictionary()


_UNCHANGED = threading.local()  # .model: (model inside `assuming_unchanged` in this thread, its structure)


@contextmanager
def assuming_unchanged(model: nn.Module) -> Iterator[None]:
    """Validate the caches of `model` only once within the block, which must not change the model."""
    previous = getattr(_UNCHANGED, "model", None)
    if previous is None or previous[0] is not model:
        _UNCHANGED.model = model, structure_of(model)
    try:
        with caching_base_modules(model):
            yield
    finally:
        _UNCHANGED.model = previous


def cached_by_model(find: Callable[[nn.Module], Any]) -> Callable[[nn.Module], Any]:
    """Cache a function of a model until its modules change."""

    @functools.wraps(find)
    def remembered(model: nn.Module) -> Any:
        unchanged = getattr(_UNCHANGED, "model", None)
        structure = unchanged[1] if unchanged is not None and unchanged[0] is model else structure_of(model)
        entry = _CACHE.get(model)
        if entry is None or entry[0] is not structure:
            entry = _CACHE[model] = structure, entry[1] if entry is not None and entry[0] == structure else {}
        results = entry[1]
        if find.__qualname__ not in results:
            results[find.__qualname__] = find(model)
        return results[find.__qualname__]

    return remembered


def share_cache(model: nn.Module, source: nn.Module, *, shared: bool = True) -> None:
    """Give `model` the cached facts of `other`, a model with the same modules and weights.

    Args:
        model: the model whose cache is replaced.
        source: the model whose cache is used.
        shared: share one cache from now on, instead of copying it once.
    """
    if source not in _CACHE:
        _CACHE[source] = structure_of(source), {}
    structure, facts = _CACHE[source]
    _CACHE[model] = structure, facts if shared else dict(facts)


def trace(
    model: nn.Module, *, training: bool = False, every_layer: bool = False, inputs: Inputs | None = None
) -> Trace:
    """Trace a forward pass of `model` with example inputs on a meta copy; the model is not changed.

    If the forward fails, for example because an input is missing, the trace ends there.

    Args:
        model: the model.
        training: put the copy into training mode.
        every_layer: also trace layers with the same structure as a traced one.
        inputs: (model) -> keyword arguments on the CPU; by default `example_inputs`.
    """
    try:
        meta_model = meta_copy(model).train(training)
    except (
        Exception
    ) as error:  # the model contains something that cannot be copied, such as a process group or an open file
        return Trace(error=error)
    result = _Tracer(meta_model, skips=not every_layer).run(inputs or partial(example_inputs, device="cpu"))
    return trace(model, training=training, every_layer=True, inputs=inputs) if result.error and result.alike else result


observe: Callable[[nn.Module], Trace] = cached_by_model(trace)  # the cached trace of a forward in evaluation mode


class _Tracer:
    def __init__(self, model: nn.Module, skips: bool) -> None:
        self.trace = Trace()
        self._skips = skips
        self._model = model
        self._numbers: dict[int, int] = {}  # {id of a tensor: number of its value}
        self._tensors: list[Tensor] = []  # by number; kept alive so that ids are not reused
        # {id of a parameter: [(id of a module with it, full name)]}
        self._owners: dict[int, list[tuple[int, str]]] = defaultdict(list)
        self._paths = {id(module): path for path, module in base_modules(model)}
        self._call: Call | None = None
        self._seen: dict[Any, tuple[str, Any, Any]] = {}  # (path, inputs, output) of traced layers
        self._running: dict[int, int] = defaultdict(int)  # {id of a module: number of running calls}
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
            # Enable gradients, so that modules which the model itself runs under no_grad are recognized. No memory is
            # used, because no parameter of the copy requires a gradient.
            with torch.enable_grad(), _DtypeReads(self._record_dtype), MetaFloats(self._record):
                self._model(**inputs)
        except Exception as error:  # the forward of a user's model may raise anything
            self.trace.error = error
        return self.trace

    def _wrap(self, module: nn.Module) -> None:
        forward = module.forward
        if isinstance(module, torch.jit.ScriptModule) or getattr(forward, "__name__", "") == "_forward_unimplemented":
            return
        path, names = self._paths.get(id(module), ""), _names(forward)
        numbers = list(map(str.isdigit, path.split(".")))
        is_layer = self._skips and numbers[-1] and sum(numbers) == 1 and any(True for _ in module.children())
        # Compute the structure before the forward, because it reads dtypes of parameters, which `_DtypeReads` records.
        structure = structure_of(module) if is_layer else None

        @functools.wraps(forward)
        def watched(*args: Any, **kwargs: Any) -> Any:
            call = Call(path, module, self._call)
            for name, value in [*zip(names, args, strict=False), *kwargs.items()]:
                if isinstance(value, Tensor):
                    call.argument_shapes[name] = value.shape
                    call.arguments[name] = self._number(value)
                else:
                    call.argument_shapes[name] = shapes_of(value)
            self.trace.calls.append(call)
            key = (path.rpartition(".")[0], structure, _kind(args, kwargs)) if is_layer else None
            if key in self._seen:
                output = self._replay(call, *self._seen[key], args, kwargs)
            else:
                self._call = call
                self._running[id(module)] += 1
                self.trace.called.add(path)
                if torch.is_grad_enabled():
                    self.trace.with_gradients.add(path)
                # autograd.Function.forward disables forward-mode AD, which no_grad does not.
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
            call.output_shapes = shapes_of(output)
            first_tensor = first_of(output)  # `After` placements change the first tensor of an output
            if isinstance(first_tensor, Tensor):
                call.output = self._number(first_tensor)
            return output

        module.__dict__["forward"] = watched

    def _replay(self, call: Call, path: str, traced_inputs: Any, output: Any, args: Any, kwargs: Any) -> Any:
        """Record the call of a layer that equals the traced one at `path`, without running it; return its output."""
        result = self.trace

        def renamed(name: str) -> str:
            return call.path + name[len(path) :] if is_inside(name) else name

        def is_inside(name: str) -> bool:
            return name == path or name.startswith(f"{path}.")

        for names in (result.called, result.with_gradients, result.in_function, result.own_reads, result.dtype_reads):
            names.update([renamed(name) for name in names if is_inside(name)])
        for name in filter(is_inside, list(result.other_reads)):
            result.other_reads.setdefault(renamed(name), set()).update(map(renamed, result.other_reads[name]))
        for name in filter(is_inside, list(result.rewritten)):
            result.rewritten[renamed(name)] = renamed(result.rewritten[name])
        result.alike.append((call.path, path))
        replacements = {
            id(old): new for old, new in zip(tree_leaves(traced_inputs), tree_leaves((args, kwargs)), strict=True)
        }
        inputs = tuple(call.arguments.values())

        def like(tensor: Tensor) -> Tensor:
            if id(tensor) in replacements:
                return replacements[id(tensor)]
            output_tensor = torch.zeros_like(tensor)
            self._new(output_tensor, SKIPPED, inputs, False)
            return output_tensor

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
            input_number = self._numbers.get(id(tensor))
            inputs += (self._new(tensor, "leaf", (), True) if input_number is None else input_number,)
            is_weight = is_weight and values[inputs[-1]].is_weight
            self._record_read(tensor)
        moves_last = name in _MOVES_DIMENSION and _MOVES_DIMENSION[name](-1, *args)
        moves_first = name in _MOVES_DIMENSION and _MOVES_DIMENSION[name](0, *args)
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                number = self._new(tensor, name, inputs, is_weight, moves_last, moves_first)
        if operator._schema.is_mutable and tensors and inputs:  # the base tensor of a view has changed as well
            root = inputs[0]
            while values[root].operator in _VIEWS:
                root = values[root].inputs[0]
                self._new(self._tensors[root], name, (root, number), is_weight)
            for _, parameter_name in self._owners.get(id(self._tensors[root]), ()):
                self.trace.rewritten[parameter_name] = self._reader

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
    """Call `record` with each tensor whose `dtype` is read, which runs no operator."""

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

# {operator: (0 or -1, arguments) -> whether it moves the first or the last dimension}
_MOVES_DIMENSION: dict[str, Callable[..., bool]] = {
    "t": lambda which, x: x.dim() > 1,
    "transpose": lambda which, x, a, b: a % x.dim() != b % x.dim() and which % x.dim() in (a % x.dim(), b % x.dim()),
    "permute": lambda which, x, dims: dims[which] % x.dim() != which % x.dim(),
}


def structure_of(module: nn.Module) -> Any:
    """Return a key that is equal for modules with the same submodules, sizes and settings, except their index."""
    is_setting: Callable[[Any], bool] = _is_setting  # to mypy a class is not hashable

    structure: list[Any] = []
    for path, part in base_modules(module):
        structure += path, original_class(part)
        for name, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None:
                structure.append((name, None if is_lazy(tensor) else tensor.shape, tensor.dtype))
        for name, value in part.__dict__.items():
            if is_setting(type(value)) and not _is_index(name):
                structure.append((name, value))
    return tuple(structure)


_SETTINGS = (bool, int, float, str, type(None))


@functools.lru_cache(1024)
def _is_setting(cls: type) -> bool:
    return issubclass(cls, _SETTINGS)


# Attributes that differ between otherwise equal layers, or depend on the mode or the adapters.
_INDEX = re.compile(r"(^|_)(idx|index|id|number)$|^training$|^_peftcore_")


@functools.lru_cache(4096)
def _is_index(name: str) -> bool:
    return _INDEX.search(name) is not None


def shapes_of(value: Any) -> Any:
    """Return the shapes of all tensors in nested containers; None for anything else."""
    return tree_map(lambda leaf: leaf.shape if isinstance(leaf, Tensor) else None, value)


def _kind(args: Any, kwargs: Any) -> Any:
    """Return a key that is equal for calls that differ only in the values of tensors."""
    leaves, structure = tree_flatten((args, kwargs))
    kinds: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            kinds.append((leaf.shape, leaf.dtype))
        else:
            kinds.append(leaf if isinstance(leaf, _SETTINGS) else type(leaf))
    return str(structure), tuple(kinds)


def _names(forward: Any) -> list[str]:
    return [
        name
        for name, parameter in inspect.signature(forward).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    ]
