"""Ancestors of adapted modules: their calls take the model's lock, and their `forward` is unchanged.

A call of an ancestor counts as a call of the model: until it ends, adapters cannot change, and they see its arguments.
Since a submodule may be called alone, the class of every callable ancestor is swapped; only the outermost call takes
the lock.
"""

from __future__ import annotations

import functools
from _thread import get_ident
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling

from peftcore.engine.adaptation.class_swap import one_for_each_class, restore_class, subclass
from peftcore.engine.adaptation.concurrency import ModelLock
from peftcore.errors import PeftcoreError
from peftcore.model.base_modules import ROWS, original_class
from peftcore.plugin.call import ROOT, Frame, untraced
from peftcore.plugin.events import adapter_names_given, vocabulary_resizes

LOCK = "_peftcore_lock"
NAMES = "adapter_names"  # PEFT's call argument: the adapter of each sample


def enclose(module: nn.Module, lock: ModelLock, *, root: bool = False) -> None:
    """Swap the class of `module`, an ancestor of adapted modules, so that its calls take the model's `lock`.

    Args:
        root: `module` is the model itself.
    """
    module.__dict__[LOCK] = lock
    if root:
        module.__dict__[ROOT] = True
    is_adapted = hasattr(type(module), "_peftcore_original")  # its forward takes the lock
    if _is_called(module) and not is_enclosing(module) and not is_adapted:
        module.__class__ = _enclosing_class(type(module))


def release(module: nn.Module) -> None:
    """Restore the class of an ancestor.

    If `fully_shard` has subclassed the swapped class, leave it, which is harmless.
    """
    if is_enclosing(module) and not hasattr(module, "unshard"):
        restore_class(module, "_peftcore_enclosed")
        del module.__dict__[LOCK]
    elif not _is_called(module):
        module.__dict__.pop(LOCK, None)
    for name in (ROOT, ROWS):
        module.__dict__.pop(name, None)


def _is_called(module: nn.Module) -> bool:
    """Return whether `module` can be called: an `nn.ModuleList` cannot, unless its class defines a forward."""
    is_container = isinstance(module, (nn.ModuleList, nn.ModuleDict))
    return not is_container or original_class(module).forward is not nn.Module.forward


def is_enclosing(module: nn.Module) -> bool:
    """Return whether `module` contains adapted modules, so that its calls are calls of the model."""
    return hasattr(type(module), "_peftcore_enclosed")


def lock_of(module: nn.Module) -> ModelLock | None:
    """Return the lock of the model with adapters that contains `module`; None if there is none."""
    return module.__dict__.get(LOCK)


def takes_adapter_names(module: Any, kwargs: dict[str, Any]) -> bool:
    """Return whether a call passes `adapter_names`, which the module's forward does not accept."""
    return NAMES in kwargs and NAMES not in module._peftcore_arguments


@contextmanager
def adapter_for_each_sample(module: nn.Module, kwargs: dict[str, Any]) -> Iterator[int]:
    """Remove PEFT's `adapter_names` from the arguments of a call, and activate these adapters per sample in the block.

    Yields:
        The number of samples.

    Raises:
        PeftcoreError: a name is unknown, or `module` is not the model that adapters were applied to.
    """
    if ROOT not in module.__dict__:
        raise PeftcoreError(
            f"adapter_names were passed to a {type(module).__name__}, which is only a submodule of the model with "
            "adapters. Pass them to the model itself"
        )
    names = kwargs.pop(NAMES)
    if names is None:
        yield 0
        return
    activations: list[Any] = []
    adapter_names_given.announce(module, names, activations.append)
    with lock_of(module).choosing_by_sample(activations[0]):  # type: ignore[union-attr]  # the lock of a model with adapters
        yield len(activations[0].samples)


untraced(adapter_for_each_sample.__wrapped__, within=True)  # type: ignore[attr-defined]  # of contextmanager


def _resizes(
    module: nn.Module | None,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    *_: Any,
    **__: Any,
) -> bool:
    """Return whether `resize_token_embeddings` with these arguments changes the number of rows of `module`."""
    weight = getattr(module, "weight", None)
    if weight is None or not isinstance(pad_to_multiple_of, (int, type(None))):  # transformers refuses anything else
        return False
    row_counts = (
        getattr(module, name, None) for name in ("num_embeddings", "out_features")
    )  # the weight may be packed
    rows: int = next((rows for rows in row_counts if rows is not None), len(weight))
    new_rows = new_num_tokens or rows
    if pad_to_multiple_of:
        new_rows = -(-new_rows // pad_to_multiple_of) * pad_to_multiple_of  # rounded up
    return new_rows != rows


def _repeats_samples(model: Any, kwargs: dict[str, Any]) -> bool:
    """Return whether `generate` with these arguments runs each sample several times, for beams or several answers."""
    configs = [kwargs.get("generation_config"), getattr(model, "generation_config", None)]
    for name in ("num_beams", "num_return_sequences"):
        numbers = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
        if next((number for number in numbers if number is not None), 1) > 1:
            return True
    return False


@one_for_each_class
def _enclosing_class(cls: type[nn.Module]) -> type[nn.Module]:
    original: Any = cls  # it may have `generate`

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        if LOCK not in self.__dict__:  # torch.compile kept this bound method, and the adapters have been removed since
            return cls.__call__(self, *args, **kwargs)
        if NAMES in kwargs and takes_adapter_names(self, kwargs):
            with adapter_for_each_sample(self, kwargs):
                return __call__(self, *args, **kwargs)
        lock = self._peftcore_lock
        if lock.context is not None and not lock.context.inside():
            with Frame(self, lock.context, args, kwargs):
                return __call__(self, *args, **kwargs)
        if is_dynamo_compiling():
            return super(enclosing, self).__call__(*args, **kwargs)
        thread = get_ident()
        if thread in lock.calls:
            return super(enclosing, self).__call__(*args, **kwargs)
        lock.enter(thread)
        try:
            output = super(enclosing, self).__call__(*args, **kwargs)
            if torch.is_grad_enabled():
                lock.watch(output)
            return output
        finally:
            lock.leave(thread)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return cls.forward(self, *args, **kwargs)

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        if LOCK not in self.__dict__:  # as in __call__
            return original.generate(self, *args, **kwargs)
        if takes_adapter_names(self, kwargs):
            with torch.no_grad(), adapter_for_each_sample(self, kwargs):
                return generate(self, *args, **kwargs)
        lock = self._peftcore_lock
        with lock.calling():  # adapters do not change between the first token and the last
            if lock.context is None:
                return super(enclosing, self).generate(*args, **kwargs)
            samples = (lock.choice() or lock.activation).samples if _repeats_samples(self, kwargs) else None
            with lock.context.generating(self._peftcore_arguments, kwargs, len(samples or ())):
                return super(enclosing, self).generate(*args, **kwargs)

    def prepare_inputs_for_generation(self: Any, *args: Any, **kwargs: Any) -> Any:
        context = self._peftcore_lock.context
        adapter_arguments = {} if context is None else context.own(self._peftcore_arguments, kwargs)
        return {**super(enclosing, self).prepare_inputs_for_generation(*args, **kwargs), **adapter_arguments}

    def _validate_model_kwargs(self: Any, model_kwargs: dict[str, Any]) -> None:
        context = self._peftcore_lock.context
        if context is not None:
            context.own(self._peftcore_arguments, model_kwargs)  # transformers would reject them as misspelt
        super(enclosing, self)._validate_model_kwargs(model_kwargs)

    def resize_token_embeddings(self: Any, *args: Any, **kwargs: Any) -> Any:
        if LOCK in self.__dict__:
            modules = [self.get_input_embeddings(), self.get_output_embeddings()]
            vocabulary_resizes.announce(self, [module for module in modules if _resizes(module, *args, **kwargs)])
        return super(enclosing, self).resize_token_embeddings(*args, **kwargs)

    def _replicate_for_data_parallel(self: Any) -> nn.Module:
        replica = super(enclosing, self)._replicate_for_data_parallel()
        replica.__dict__[LOCK] = self._peftcore_lock.for_replica()
        return replica

    namespace: dict[str, Any] = {
        "__call__": __call__,
        "_replicate_for_data_parallel": _replicate_for_data_parallel,
        "_peftcore_enclosed": cls,
    }
    # `torch.compile(model)` starts tracing at the function that is called here, so compiled calls take the lock too.
    # For modules whose forward is PyTorch's, such as `nn.Sequential`, tracing would start further out.
    untraced(__call__)
    if cls.forward.__module__.partition(".")[0] == "torch":
        namespace["forward"] = functools.wraps(cls.forward)(forward)
    overriding: list[Any] = [
        generate,
        prepare_inputs_for_generation,
        _validate_model_kwargs,
        resize_token_embeddings,
    ]
    for function in overriding:
        own = getattr(cls, function.__name__, None)
        if callable(own):
            function.__wrapped__ = own  # as functools.wraps sets it
            function.__doc__ = own.__doc__
            namespace[function.__name__] = function
    enclosing: Any = subclass(cls, _enclosing_class, namespace)
    return enclosing
