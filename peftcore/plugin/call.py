"""Arguments of a model's current call, for adapters that depend on positions, padding or task ids.

    model(input_ids, task_ids=t)        outermost call: its arguments by name, `task_ids` for the adapters alone
      layer(h)                          current_call()["input_ids"], current_call().get("task_ids")

An adapter's class that reads the call declares it: `needs_call = True`, or `needs_call = ("task_ids",)` with the names
of keyword arguments that the model's forward does not take. If no class does, calls have no overhead.

A checkpointed module that is recomputed in a backward pass sees the call of its original forward: autograd numbers
nodes as they are created, so the number of the node that recomputes the module identifies the call.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from peftcore.errors import PeftcoreError
from peftcore.plugin.adapter import Adapter
from peftcore.plugin.modules import parts


def untraced(function: Callable[..., Any], *, within: bool = False) -> Callable[..., Any]:
    """Exclude `function` from torch.compile, or, with `within`, also the functions that it calls.

    A function that is already being traced is traced through it: `torch.compiler.disable` would break the graph.
    """
    frames = torch._C._dynamo.eval_frame
    inside = frames._FrameAction.SKIP if within else frames._FrameAction.DEFAULT
    strategy = frames._FrameExecStrategy(frames._FrameAction.SKIP, inside)
    frames.set_code_exec_strategy(function.__code__, strategy)
    return function


ROOT = "_peftcore_root"  # attribute of the model itself
SAMPLES = "peftcore_samples"  # keyword argument of calls made by `generate`: int64 `[rows]`, the sample of each row


class CallState(dict[Hashable, Any]):
    """Values that adapters share during one call of their model; each key is written once.

    A checkpointed module that is recomputed in the backward pass must read the same values as in its forward, so a
    value must not change: a value that each layer updates needs a key per layer.
    """

    def __setitem__(self, key: Hashable, value: Any) -> None:
        if key in self and not is_dynamo_compiling() and torch._C._current_graph_task_id() < 0:
            raise PeftcoreError(
                f"the state of this call already has {key!r}. A recomputed checkpointed module would read the new "
                "value, and two adapters of one method would read each other's values. Write each value once, under "
                "a key that identifies its adapter and layer, such as (a module that the adapter's layers share, "
                "layer)"
            )
        super().__setitem__(key, value)


class Call(Mapping[str, Any]):
    """Arguments of a call of the model by name, read-only, including arguments that only adapters take.

    Attributes:
        state: values that adapters share during this call, such as a value passed from one layer's adapter to the next.
            The state belongs to one call in one thread and starts empty. Keys must be unique to an adapter, such as
            `(module that its layers share, layer)`. If each sample of a batch has its own adapter, each adapter's
            samples have a separate state.
    """

    def __init__(self, values: dict[str, Any], samples: Tensor | None = None) -> None:
        self.state = CallState()
        # States of calls with a subset of the samples, by their indices
        self.states: dict[tuple[int, ...], CallState] = {}
        self._values = values
        self._samples = samples
        self._sample_numbers: tuple[int, ...] | None = None

    @property
    def samples(self) -> tuple[int, ...] | None:
        """Index of the sample that each row of the batch belongs to; None if row i is sample i.

        `generate` repeats samples, and adapters that act on some samples see a call with only these samples.
        """
        if self._sample_numbers is None and self._samples is not None:
            self._sample_numbers = tuple(self._samples.tolist())
        return self._sample_numbers

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def get(self, name: str, default: Any = None) -> Any:
        return self._values.get(name, default)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._values)})"


def current_call() -> Call:
    """Return the current call of the model, or of a submodule that is called on its own.

    Raises:
        PeftcoreError: no call is running, or no adapter declares that it reads the call (`needs_call`).
    """
    frame = getattr(_CURRENT, "frame", None)
    if frame is None or not (is_dynamo_compiling() or frame.task == torch._C._current_graph_task_id()):
        raise PeftcoreError(
            "current_call() only works in adapters while their model is being called. Declare in the adapter's class "
            "that it reads the call: needs_call = True"
        )
    return frame.call


class CallContext:
    """The call arguments that the adapters of one model read.

    Args:
        names: names of keyword arguments that only adapters take.
    """

    def __init__(self, names: frozenset[str] = frozenset()) -> None:
        self.names = names
        self._frames: WeakSet[Frame] = WeakSet()  # frames of calls whose graph is alive
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return CallContext, (self.names,)

    @partial(untraced, within=True)
    def inside(self) -> bool:
        """Return whether this thread is in a call of the model, in the same forward or backward pass."""
        frame = getattr(_CURRENT, "frame", None)
        if frame is None or frame.context is not self:
            return False
        return is_dynamo_compiling() or frame.task == torch._C._current_graph_task_id()

    def own(self, names: Sequence[str], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Remove keyword arguments that only adapters take from `kwargs`, and return them.

        Args:
            names: names of the arguments that the model's forward takes.
        """
        adapter_names = {*self.names, SAMPLES}
        return {name: kwargs.pop(name) for name in list(kwargs) if name in adapter_names and name not in names}

    @contextmanager
    def given(self, values: Mapping[str, Any]) -> Iterator[None]:
        """Add `values` to the arguments of all calls in the block."""
        block = _Given(self, dict(values))
        _GIVEN.set((*_GIVEN.get(), block))
        _CURRENT.given = (*getattr(_CURRENT, "given", ()), block)
        try:
            yield
        finally:
            _GIVEN.set(tuple(open_block for open_block in _GIVEN.get() if open_block is not block))
            _CURRENT.given = tuple(
                open_block for open_block in getattr(_CURRENT, "given", ()) if open_block is not block
            )

    @contextmanager
    def generating(self, names: Sequence[str], kwargs: dict[str, Any], samples: int = 0) -> Iterator[None]:
        """Run `generate` in the block with `kwargs`. It repeats their tensors for the beams of each row.

        The tensors are passed with the call of each step. Submodules that are called before, such as an encoder, get
        them unrepeated.

        Args:
            names: names of the arguments of forward.
            kwargs: keyword arguments of `generate`.
            samples: number of samples. Each call gets their indices, which `generate` repeats; 0 passes none.
        """
        if samples:
            kwargs[SAMPLES] = torch.arange(samples)
        values = {name: value for name, value in kwargs.items() if name in self.names and name not in names}
        for name, value in self.values().items():
            if name not in names and isinstance(value, Tensor) and value.dim():
                kwargs.setdefault(name, value)
        with self.given(values):
            yield

    def values(self) -> dict[str, Any]:
        """Return the arguments that the open blocks add; inner blocks take precedence."""
        blocks = getattr(_CURRENT, "given", ()) if is_dynamo_compiling() else _GIVEN.get()
        values: dict[str, Any] = {}
        for block in blocks:
            if block.context is self:
                values.update(block.values)
        return values

    def for_replica(self) -> CallContext:
        """Return the context for a replica of `nn.DataParallel`, which is called in another thread."""
        if self.values():
            raise PeftcoreError(
                "DataParallel only splits the arguments of the model's call among replicas, not the arguments of "
                f"call_arguments: {', '.join(self.values())}. Pass them to the call: model(..., name=tensor)"
            )
        return self

    def note(self, frame: Frame) -> None:
        """Record a call that has begun and builds a graph."""
        with self._lock:
            self._frames.add(frame)

    def call_of_forward(self) -> Call:
        """Return the call whose forward created the current node, in a backward pass that recomputes a module."""
        node: Any = torch._C._current_autograd_node()
        number = -1 if node is None else node._sequence_nr()
        with self._lock:
            frames = [frame for frame in self._frames if frame.first <= number < frame.last]
        # Each thread numbers its nodes from 0, so calls of other threads may match. Only calls that this backward pass
        # has reached are considered.
        if len({id(frame.call) for frame in frames}) > 1:
            task = torch._C._current_graph_task_id()
            frames = [frame for frame in frames if frame.reached == task]
        if len({id(frame.call) for frame in frames}) != 1:
            raise PeftcoreError(
                "a module is recomputed in a backward pass, and the call that it belongs to, which an adapter needs, "
                "cannot be identified. Checkpoint modules inside the model with use_reentrant=False, not the whole "
                "model and not nested modules, and compute the loss from the outputs of the model"
            )
        return frames[0].call


class _Given:
    def __init__(self, context: CallContext, values: dict[str, Any]) -> None:
        self.context = context
        self.values = values


_GIVEN: ContextVar[tuple[_Given, ...]] = ContextVar("peftcore_given", default=())
# The thread's innermost call (`frame`). PyTorch's tracer reads no context variables, so `given` is also here.
_CURRENT = threading.local()


class Frame:
    """A call of a model, run in the block. Keyword arguments that only adapters take are removed from `kwargs`.

    A frame lives as long as the graph of its call, since the hook on the call's outputs references it.
    """

    def __init__(self, module: nn.Module, context: CallContext, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        self.context = context
        self.module = module
        names: tuple[str, ...] = type(module)._peftcore_arguments  # type: ignore[attr-defined]
        adapter_kwargs = context.own(names, kwargs)
        # `reached`: the backward pass that has reached this call's outputs, set by `adaptation.concurrency`.
        self.first = self.last = self.task = self.reached = -1
        if is_dynamo_compiling():
            if ROOT not in module.__dict__:
                # The call of this module is only known outside graphs, since the module may be recomputed in a backward
                # pass.
                torch._dynamo.graph_break(
                    msg=("a submodule of a model whose adapters read the call is called on its own")
                )
            self.call = Call({**context.values(), **_named(names, args), **kwargs, **adapter_kwargs})
        else:
            self._enter(names, args, kwargs, adapter_kwargs)

    @partial(untraced, within=True)
    def _enter(
        self, names: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any], adapter_kwargs: dict[str, Any]
    ) -> None:
        self.task = torch._C._current_graph_task_id()
        self.first = torch._C._autograd._get_sequence_nr()
        if self.task >= 0:
            self.call = self.context.call_of_forward()
        else:
            samples = adapter_kwargs.pop(SAMPLES, None)
            self.call = Call({**self.context.values(), **_named(names, args), **kwargs, **adapter_kwargs}, samples)
        if torch.is_grad_enabled():
            self.context.note(self)

    def __enter__(self) -> Frame:
        self.outer = getattr(_CURRENT, "frame", None)
        _CURRENT.frame = self
        return self

    def __exit__(self, *_error: object) -> None:
        if not is_dynamo_compiling():
            self.last = torch._C._autograd._get_sequence_nr()
        _CURRENT.frame = self.outer
        self.outer = None


class _Replaced:
    """Frame that `current_frame` returns while adapters see a different call than the current one."""

    def __init__(self, frame: Frame, call: Call) -> None:
        self.context, self.module, self.task, self.call = frame.context, frame.module, frame.task, call


@contextmanager
def as_if_called(frame: Frame | None, call: Call | None) -> Iterator[None]:
    """Make `current_call` return `call` in the block instead of the call of `frame`. None changes nothing."""
    if frame is None or call is None:
        yield
        return
    _CURRENT.frame = _Replaced(frame, call)
    try:
        yield
    finally:
        _CURRENT.frame = frame


for _function in (CallContext.own, CallContext.values, Frame.__init__, Frame.__enter__, Frame.__exit__):
    untraced(_function, within=True)


@partial(untraced, within=True)
def current_frame() -> Frame | None:
    """Return the frame of this thread's innermost call of a model whose adapters read calls."""
    return getattr(_CURRENT, "frame", None)


def arguments_read(adapters: Iterable[nn.Module]) -> frozenset[str] | None:
    """Return the call arguments that these adapters read, or None if none of them reads calls."""
    needs = [
        module.needs_call
        for adapter in adapters
        for module in parts(adapter)
        if isinstance(module, Adapter) and module.needs_call
    ]
    return frozenset(name for need in needs if not isinstance(need, bool) for name in need) if needs else None


def arguments(cls: type[nn.Module]) -> tuple[str, ...]:
    """Return the names of the arguments of the forward of `cls`, with asterisks for `*args` and `**kwargs`."""
    try:
        parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return ()
    plain = (
        parameter.replace(annotation=inspect.Parameter.empty, default=inspect.Parameter.empty)
        for parameter in parameters
    )
    return tuple(str(parameter) for parameter in plain)


def _named(names: Sequence[str], args: Sequence[Any]) -> dict[str, Any]:
    values = {}
    for place, name in enumerate(names[: len(args)]):
        if name[:1] == "*":
            values[name[1:]] = args[place:]
            break
        values[name] = args[place]
    return values
