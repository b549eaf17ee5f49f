"""Thread safety: a call sees one set of adapters from start to end, and changes of adapters wait for calls to end.

    call        of the model, or of a part of it: any number at once
    change      activate, apply, remove, merge, ...: waits for the calls of other threads, and new calls wait for it
    disabled    affects only the context that entered it (a thread, an asyncio task)

One `ModelLock`, a readers-writer lock, is shared by all modules of a model that are adapted or contain adapted ones. It
also hooks outputs: a backward pass after a change of adapters would lose gradients, so it raises an error.
"""

from __future__ import annotations

import threading
import time
from _thread import get_ident
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch.autograd import Variable
from torch.compiler import is_dynamo_compiling

from peftcore.errors import PeftcoreError
from peftcore.plugin.call import CallContext, current_frame, untraced
from peftcore.plugin.outputs import tensors_of

PATIENCE = 60.0  # seconds that a call or a change waits for other threads before it raises an error
_ADVICE = "Change adapters while no other thread runs the model, or run the model in fewer or shorter calls"


@dataclass(frozen=True)
class Activation:
    """Active adapters in order, the adapter of each sample (`per_sample`), and the adapters being trained.

    Modules read it at each call, so other adapters per sample need only a new object.

    Attributes:
        cache: values that modules derive from it.
    """

    active: tuple[str, ...] = ()
    samples: tuple[str | None, ...] | None = None
    training: tuple[str, ...] = ()
    cache: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def distinct_adapters(self) -> tuple[str, ...]:
        """The distinct adapters that the samples use."""
        return tuple(name for name in dict.fromkeys(self.samples or ()) if name is not None)

    def __reduce__(self) -> tuple[Any, ...]:
        return Activation, (self.active, self.samples, self.training)


class Block:
    """One `disabled` block."""

    __slots__ = ("lock", "open")

    def __init__(self, lock: ModelLock) -> None:
        self.lock = lock
        self.open = True


# The `disabled` blocks that a context has entered. PyTorch's tracer cannot read context variables, so the blocks are
# also stored per thread.
_BLOCKS: ContextVar[tuple[Block, ...]] = ContextVar("peftcore_disabled", default=())
_THREAD = threading.local()


def disabled_in_thread(lock: ModelLock) -> bool:
    """Return whether this thread is in a `disabled` block of the model, in a form that torch.compile can trace."""
    return any(block.lock is lock and block.open for block in getattr(_THREAD, "blocks", ()))


class ModelLock:
    """Readers-writer lock of one model.

    `calls` has an entry for every thread inside the model: whether adapters are disabled for this thread. The outermost
    call creates the entry (`enter`) and removes it (`leave`); nested calls only read it. A calling thread writes its
    entry before it checks for a change, and a change announces itself before it checks for entries, so at least one of
    them sees the other.
    """

    def __init__(self, activation: Activation = Activation(), context: CallContext | None = None) -> None:
        self.activation = activation
        self.context = context  # the facts of a call that adapters read, if any do
        self.retired = False  # the last adapter has been removed
        self.calls: dict[int, bool] = {}
        # {running backward pass: whether adapters were disabled in its forward, or an error message}
        self._backward: dict[int, bool | str] = {}
        self._condition = threading.Condition()
        self._changer: int | None = None  # the thread that changes the model or waits to change it
        self._turn: object = None  # the change that `_changer` makes
        self._queue: list[object] = []  # changes that wait for the current one
        self._excludes_calls = False  # the change no longer waits
        self.choosing = 0  # number of running calls, in all threads, with an adapter for each sample
        self._exclusive_block: Block | None = None  # the `disabled` block that prevents calls outside it
        self._blocks: set[Block] = set()  # the open `disabled` blocks that allow other calls

    def __reduce__(self) -> tuple[Any, ...]:
        if self.is_disabled():
            raise PeftcoreError(
                "cannot copy the model inside peftcore.disabled(model), because adapters would be active in the "
                "copy. Copy it outside the block, and deactivate the adapters of the copy: peftcore.activate(copy, "
                "[])"
            )
        return ModelLock, (self.activation, self.context)

    def for_replica(self) -> ModelLock:
        """Return the lock for an `nn.DataParallel` replica of the module, which is called once, in its own thread."""
        return ModelLock(self.activation, self.context and self.context.for_replica())

    @partial(untraced, within=True)
    def enter(self, thread: int) -> None:
        """Begin the outermost call of `thread`."""
        self.calls[thread] = False
        try:
            if self._changer is not None and (self._changer != thread or self._exclusive_block is not None):
                self._wait_for_change(thread)
            self.calls[thread] = self.is_disabled()
        except BaseException:
            self.leave(thread)
            raise

    @partial(untraced, within=True)
    def leave(self, thread: int) -> None:
        """End the outermost call of `thread`."""
        del self.calls[thread]
        if self._changer is not None:
            with self._condition:
                self._condition.notify_all()

    @contextmanager
    def calling(self) -> Iterator[None]:
        """Prevent other threads from changing the model in the block, which may make many calls."""
        thread = get_ident()
        if thread in self.calls:
            yield
            return
        self.enter(thread)
        try:
            yield
        finally:
            self.leave(thread)

    @contextmanager
    def choosing_by_sample(self, activation: Activation) -> Iterator[None]:
        """Use `activation`, which has an adapter for each sample, for this thread's calls in the block."""
        outer_choices = getattr(_THREAD, "choices", ())
        _THREAD.choices = (*outer_choices, (self, activation))
        with self._condition:
            self.choosing += 1
        try:
            yield
        finally:
            _THREAD.choices = outer_choices
            with self._condition:
                self.choosing -= 1

    def choice(self) -> Activation | None:
        """Return the activation of `choosing_by_sample` in this thread, or None."""
        for lock, activation in reversed(getattr(_THREAD, "choices", ())):
            if lock is self:
                return cast(Activation, activation)
        return None

    @contextmanager
    def changing(self, action: str, *, base: bool = False) -> Iterator[None]:
        """Prevent other threads from calling or changing the model in the block.

        Args:
            action: name of the change for error messages, such as `merge`.
            base: the change affects base tensors, so also wait for the `disabled` blocks of other threads.
        """
        thread = get_ident()
        if self._changer == thread and self._exclusive_block is None:  # nested in a larger change
            yield
            return
        if self.is_disabled():
            raise PeftcoreError(f"cannot {action} inside peftcore.disabled(model). Leave the block first")
        turn = object()
        try:
            self._acquire(action, base, turn)
            yield
        finally:
            self._release(turn)

    def open_block(self, block: Block) -> None:
        """Enter a `disabled` block in this context; it also affects calls of this thread that have begun.

        Call `close_block` afterwards, even if this raises.
        """
        with self._condition:
            if not self.is_disabled() and not (self._changer == get_ident() and self._exclusive_block is None):
                self._refuse_own_hold("disable adapters")
                # Otherwise a change waits for this thread.
                if get_ident() not in self.calls and not disabled_in_thread(self):
                    self._wait(lambda: self._changer is None and not self._queue, "disable adapters")
            self._blocks.add(block)
        self._show(block)

    def close_block(self, block: Block) -> None:
        """Leave a `disabled` block, from any context."""
        block.open = False
        _BLOCKS.set(tuple(open_block for open_block in _BLOCKS.get() if open_block is not block))
        _THREAD.blocks = tuple(open_block for open_block in getattr(_THREAD, "blocks", ()) if open_block is not block)
        if get_ident() in self.calls:
            self.calls[get_ident()] = self.is_disabled()
        with self._condition:
            self._blocks.discard(block)
            self._condition.notify_all()
        self._release(block)

    def hold(self, block: Block) -> None:
        """Wait for all calls outside the open `block`, and prevent new ones."""
        with self._condition:
            self._blocks.discard(block)
            self._condition.notify_all()
        self._acquire("disable adapters that train parameters of the base", base=True, turn=block)

    def is_disabled(self) -> bool:
        """Return whether adapters are disabled in this context; in a backward pass, as they were in its forward."""
        if not (_BLOCKS.get() or self._backward):
            return False
        task = torch._C._current_graph_task_id()
        if task < 0:
            return any(block.lock is self and block.open for block in _BLOCKS.get())
        was_disabled = self._backward.get(task, False)
        if isinstance(was_disabled, str):
            raise PeftcoreError(was_disabled)
        return was_disabled

    @partial(untraced, within=True)
    def watch(self, output: Any) -> None:
        """Register a hook on the output of a forward, so that no gradient of its adapters is lost silently."""
        nodes = {tensor.grad_fn for tensor in tensors_of(output) if tensor.grad_fn is not None}
        if nodes:
            watch = _Watch(self)
            for node in nodes:
                node.register_prehook(watch)

    def _show(self, block: Block) -> None:
        _BLOCKS.set((*_BLOCKS.get(), block))
        _THREAD.blocks = (*getattr(_THREAD, "blocks", ()), block)
        if get_ident() in self.calls:
            self.calls[get_ident()] = True

    def _acquire(self, action: str, base: bool, turn: object) -> None:
        """Wait until only this thread may call and change the model.

        `turn` is a `Block` or another new object. Call `_release` with it afterwards, even if this raises.
        """
        thread = get_ident()
        in_call = thread in self.calls

        def others() -> bool:
            return any(other_thread != thread for other_thread in list(self.calls)) or (
                base and any(block.open for block in list(self._blocks))
            )

        with self._condition:
            # Other changes may be waiting for the call that this thread is in.
            if in_call and (self._changer is not None or others()):
                raise PeftcoreError(
                    f"cannot {action} inside a call of the model while another thread calls or changes it. {_ADVICE}"
                )
            self._refuse_own_hold(action)
            # A queue keeps the order, since a thread that has just finished may return before others wake up.
            self._queue.append(turn)
            self._wait(lambda: self._changer is None and self._queue[0] is turn, action)
            self._changer, self._turn = thread, turn
            self._queue.remove(turn)
            self._condition.notify_all()
            self._wait(lambda: not others(), action)
            self._excludes_calls, self._exclusive_block = True, turn if isinstance(turn, Block) else None

    def _release(self, turn: object) -> None:
        with self._condition:
            if turn in self._queue:
                self._queue.remove(turn)
            if self._turn is turn:
                self._changer, self._turn, self._excludes_calls, self._exclusive_block = None, None, False, None
            self._condition.notify_all()

    def _wait_for_change(self, thread: int) -> None:
        in_backward = torch._C._current_graph_task_id() >= 0
        with self._condition:
            if self.is_disabled() and self._exclusive_block is not None:
                return
            # The change waits for a block of this thread.
            if not self._excludes_calls and (self.is_disabled() or disabled_in_thread(self)):
                return
            if self._exclusive_block is not None and in_backward:
                raise PeftcoreError(
                    "backward() recomputes a checkpointed module inside peftcore.disabled(model), but its forward "
                    "ran outside. Run backward() outside the block too"
                )
            self._refuse_own_hold("call the model")
            if (
                in_backward and not self._excludes_calls
            ):  # the change may wait for a call that waits for this backward pass
                return
            del self.calls[thread]
            self._condition.notify_all()
            try:
                self._wait(lambda: self._changer is None, "call the model")
            finally:
                self.calls[thread] = False

    def _refuse_own_hold(self, action: str) -> None:
        """Raise a PeftcoreError if another asyncio task or generator of this thread holds the model.

        Waiting would deadlock.
        """
        if self._exclusive_block is not None and self._changer == get_ident():
            raise PeftcoreError(
                f"cannot {action}: another task of this thread is inside peftcore.disabled(model), which has replaced "
                "the base parameters that adapters train. Leave the block first"
            )

    def _wait(self, ready: Callable[[], bool], action: str) -> None:
        """Wait until `ready()` is true; the caller holds the condition."""
        end = time.monotonic() + PATIENCE
        while not ready():
            if not self._condition.wait(end - time.monotonic()) and not ready():
                raise PeftcoreError(
                    f"cannot {action}: another thread has been calling, changing or disabling the model for "
                    f"{PATIENCE:g} s. {_ADVICE}"
                )


class _Watch:
    """Hook on the output of a forward: its backward pass checks that the same adapters are still active."""

    def __init__(self, lock: ModelLock) -> None:
        self._lock, self._activation, self._task = lock, lock.activation, -1
        self._disabled = lock.calls[get_ident()]
        self._frame = current_frame()

    def __call__(self, _gradients: Any) -> None:
        task = torch._C._current_graph_task_id()
        if task == self._task or is_dynamo_compiling():  # compiled autograd has no callbacks at its end
            return
        self._task = task
        if self._frame is not None:
            self._frame.reached = task
        self._check()
        backward_passes = self._lock._backward
        disabled: bool | str = self._disabled
        if self._lock.activation != self._activation:
            disabled = (
                "backward() recomputes a checkpointed module, but the active adapters have changed since its "
                f"forward, where they were {list(self._activation.active)}. Run backward() before changing adapters"
            )
        elif backward_passes.get(task, disabled) != disabled:
            disabled = (
                "one backward pass recomputes checkpointed modules of two forwards, only one of which ran inside "
                "peftcore.disabled(model). Run backward() separately for each forward"
            )
        backward_passes[task] = disabled
        Variable._execution_engine.queue_callback(self._end)

    def _end(self) -> None:
        self._lock._backward.pop(self._task, None)
        self._check()

    def _check(self) -> None:
        if self._disabled:
            return
        deactivated_names = [name for name in self._activation.training if name not in self._lock.activation.active]
        if deactivated_names:
            raise PeftcoreError(
                f"backward() would lose gradients: {deactivated_names} was active in the forward pass but has been "
                "deactivated since. Run backward() before peftcore.activate, merge or remove; gradients of several "
                "forward passes accumulate"
            )
