"""What the call of a model was given, for adapters that depend on it: positions, padding, ids of tasks.

    model(input_ids, task_ids=t)        outermost call: its arguments by name, `task_ids` for the adapters alone
      layer(h)                          current_call()["input_ids"], current_call().get("task_ids")

An adapter's class that reads it says so: `needs_call = True`, or `needs_call = ("task_ids",)` with the names of keyword
arguments that the model's forward does not take. Where none does, a call costs nothing.

A checkpointed part that runs again in a backward pass sees the call of its forward: autograd numbers its nodes as they
are made, so the node that asks for the part to run again tells in which call it was made.
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

from peftcore.adaptation.light import parts
from peftcore.adapter import Adapter
from peftcore.errors import PeftcoreError


def untraced(function: Callable[..., Any], *, within: bool = False) -> Callable[..., Any]:
    """Let torch.compile begin with what `function` calls, or, `within`, not there either. Functions that it traces
    already go on into it.
    """
    frames = torch._C._dynamo.eval_frame
    inside = frames._FrameAction.SKIP if within else frames._FrameAction.DEFAULT
    strategy = frames._FrameExecStrategy(frames._FrameAction.SKIP, inside)
    frames.set_code_exec_strategy(function.__code__, strategy)
    return function


ROOT = "_peftcore_root"  # attribute of the model itself
SAMPLES = "peftcore_samples"  # int64 `[rows]`, a keyword argument of calls that `generate` makes: the sample of a row


class CallState(dict[Hashable, Any]):
    """Values that adapters share during one call of their model; each key is written once.

    A checkpointed part that runs again in the backward pass reads what its forward read, so a value must not change in
    between: what each layer updates is written under a key of that layer.
    """

    def __setitem__(self, key: Hashable, value: Any) -> None:
        if key in self and not is_dynamo_compiling() and torch._C._current_graph_task_id() < 0:
            raise PeftcoreError(
                f"the state of this call has {key!r} already. A checkpointed part that runs again would read the new "
                "value: write each value once, under a key of its layer"
            )
        super().__setitem__(key, value)


class Call(Mapping[str, Any]):
    """Arguments of a call of the model by name, read-only; those that are only for adapters are among them.

    Attributes:
        state: values that adapters share during this call, such as what one layer's adapter leaves for the next. It
            belongs to one call in one thread, and is empty at the beginning; keys are a method's own, such as
            `("ladder", layer)`. Where each sample of a batch has its own adapter, the samples of one adapter have a
            state of their own.
    """

    def __init__(self, values: dict[str, Any], samples: Tensor | None = None) -> None:
        self.state = CallState()
        self.states: dict[tuple[int, ...], CallState] = {}  # of calls of some of the samples, by their numbers
        self._values = values
        self._samples = samples
        self._repeated: tuple[int, ...] | None = None

    @property
    def samples(self) -> tuple[int, ...] | None:
        """The sample that each row of the batch is of, where they are not all in their order; else None.

        `generate` repeats samples, and adapters that act on some samples see a call of those alone.
        """
        if self._repeated is None and self._samples is not None:
            self._repeated = tuple(self._samples.tolist())
        return self._repeated

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
    """What the model was given in the call that is running: of the model itself, or of a part of it called alone.

    Raises:
        PeftcoreError: none is running, or no adapter has said that it reads it (`needs_call`).
    """
    frame = getattr(_CURRENT, "frame", None)
    if frame is None or not (is_dynamo_compiling() or frame.task == torch._C._current_graph_task_id()):
        raise PeftcoreError(
            "current_call() is for adapters while their model is called. The adapter's class says that it reads it: "
            "needs_call = True"
        )
    return frame.call


class CallContext:
    """What the adapters of one model ask of its calls.

    Args:
        names: of keyword arguments that are theirs alone.
    """

    def __init__(self, names: frozenset[str] = frozenset()) -> None:
        self.names = names
        self._frames: WeakSet[Frame] = WeakSet()  # of calls whose graph lives
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return CallContext, (self.names,)

    @partial(untraced, within=True)
    def inside(self) -> bool:
        """Return whether this thread is in a call of the model, in the same pass."""
        frame = getattr(_CURRENT, "frame", None)
        if frame is None or frame.context is not self:
            return False
        return is_dynamo_compiling() or frame.task == torch._C._current_graph_task_id()

    def own(self, names: Sequence[str], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Take those keyword arguments out of `kwargs` that are the adapters' alone. `names`: what forward takes."""
        there = {*self.names, SAMPLES}
        return {name: kwargs.pop(name) for name in list(kwargs) if name in there and name not in names}

    @contextmanager
    def given(self, values: Mapping[str, Any]) -> Iterator[None]:
        """Within the block calls that this context makes are given `values`, too."""
        block = _Given(self, dict(values))
        _GIVEN.set((*_GIVEN.get(), block))
        _CURRENT.given = (*getattr(_CURRENT, "given", ()), block)
        try:
            yield
        finally:
            _GIVEN.set(tuple(other for other in _GIVEN.get() if other is not block))
            _CURRENT.given = tuple(other for other in getattr(_CURRENT, "given", ()) if other is not block)

    @contextmanager
    def generating(self, names: Sequence[str], kwargs: dict[str, Any], samples: int = 0) -> Iterator[None]:
        """Within the block `generate` runs with `kwargs`, whose tensors it repeats for each row's beams.

        So they come with the call of each step; parts called alone before that, an encoder, get them as they are.

        Args:
            samples: number of samples whose numbers are to come with each call, since they are repeated; 0: none.
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
        """What the open blocks give, the inner ones first."""
        blocks = getattr(_CURRENT, "given", ()) if is_dynamo_compiling() else _GIVEN.get()
        values: dict[str, Any] = {}
        for block in blocks:
            if block.context is self:
                values.update(block.values)
        return values

    def for_replica(self) -> CallContext:
        """The context of a replica of `nn.DataParallel`, which is called in another thread."""
        if self.values():
            raise PeftcoreError(
                "DataParallel gives each replica its rows of the model's arguments, and cannot split those of "
                f"call_arguments: {', '.join(self.values())}. Give them with the call: model(..., name=tensor)"
            )
        return self

    def note(self, frame: Frame) -> None:
        """A call that makes a graph has begun."""
        with self._lock:
            self._frames.add(frame)

    def call_of_forward(self) -> Call:
        """In a backward pass that runs a part again: the call in whose forward the running node was made."""
        node: Any = torch._C._current_autograd_node()
        number = -1 if node is None else node._sequence_nr()
        with self._lock:
            frames = [frame for frame in self._frames if frame.first <= number < frame.last]
        if len({id(frame.call) for frame in frames}) > 1:  # of other threads, which number theirs alike
            task = torch._C._current_graph_task_id()
            frames = [frame for frame in frames if frame.reached == task]
        if len({id(frame.call) for frame in frames}) != 1:
            raise PeftcoreError(
                "a part of the model runs again in a backward pass, and which call of the model it belongs to is not "
                "known, which an adapter needs. Checkpoint parts inside the model, not the whole or one in another, "
                "with use_reentrant=False, and let the model return what the loss is made of"
            )
        return frames[0].call


class _Given:
    def __init__(self, context: CallContext, values: dict[str, Any]) -> None:
        self.context = context
        self.values = values


_GIVEN: ContextVar[tuple[_Given, ...]] = ContextVar("peftcore_given", default=())
# The thread's innermost call (`frame`); PyTorch's tracer reads no context variable, so `given` is here once more.
_CURRENT = threading.local()


class Frame:
    """Within the block a call of a model runs; keyword arguments that are the adapters' alone leave `kwargs`.

    A frame lives as long as the graph of its call: with the watch on the call's outputs.
    """

    def __init__(self, module: nn.Module, context: CallContext, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        self.context = context
        self.module = module
        names: tuple[str, ...] = type(module)._peftcore_arguments  # type: ignore[attr-defined]
        own = context.own(names, kwargs)
        self.first = self.last = self.task = self.reached = -1
        if is_dynamo_compiling():
            if ROOT not in module.__dict__:
                # Which call this part belongs to is known outside of graphs: it may run again in a backward pass.
                torch._dynamo.graph_break("a part of a model whose adapters read its call is called alone")
            self.call = Call({**context.values(), **_named(names, args), **kwargs, **own})
        else:
            self._enter(names, args, kwargs, own)

    @partial(untraced, within=True)
    def _enter(self, names: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any], own: dict[str, Any]) -> None:
        self.task = torch._C._current_graph_task_id()
        self.first = torch._C._autograd._get_sequence_nr()
        if self.task >= 0:
            self.call = self.context.call_of_forward()
        else:
            samples = own.pop(SAMPLES, None)
            self.call = Call({**self.context.values(), **_named(names, args), **kwargs, **own}, samples)
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
    """What `current_frame` gives while adapters are to see another call than the one that runs."""

    def __init__(self, frame: Frame, call: Call) -> None:
        self.context, self.module, self.task, self.call = frame.context, frame.module, frame.task, call


@contextmanager
def as_if_called(frame: Frame | None, call: Call | None) -> Iterator[None]:
    """Within the block `current_call` returns `call` in place of that of `frame`; None: it stays."""
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
    """The thread's innermost call of a model whose adapters ask for it."""
    return getattr(_CURRENT, "frame", None)


def asked(adapters: Iterable[nn.Module]) -> frozenset[str] | None:
    """The arguments that these adapters read of calls of their model; None where none asks for its calls."""
    needs = [
        module.needs_call
        for adapter in adapters
        for module in parts(adapter)
        if isinstance(module, Adapter) and module.needs_call
    ]
    return frozenset(name for need in needs if not isinstance(need, bool) for name in need) if needs else None


def context_for(names: Iterable[frozenset[str]], before: CallContext | None) -> CallContext | None:
    """What calls are noted in for adapters that read `names` of them, None where none does; `before` stays the same
    object."""
    each = list(names)
    if not each:
        return None
    context = before or CallContext()
    context.names = frozenset().union(*each)
    return context


def arguments(cls: type[nn.Module]) -> tuple[str, ...]:
    """The names of what the forward of `cls` takes; a name for all the rest has its asterisks."""
    try:
        parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return ()
    plain = (each.replace(annotation=inspect.Parameter.empty, default=inspect.Parameter.empty) for each in parameters)
    return tuple(str(each) for each in plain)


def _named(names: Sequence[str], args: Sequence[Any]) -> dict[str, Any]:
    values = {}
    for place, name in enumerate(names[: len(args)]):
        if name[:1] == "*":
            values[name[1:]] = args[place:]
            break
        values[name] = args[place]
    return values
