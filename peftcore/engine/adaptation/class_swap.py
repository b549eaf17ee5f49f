"""Swap the class of a module for a subclass of it, and restore it later.

The subclass keeps the original name, because transformers writes the class name into `config.json` and accelerate finds
blocks by class name. All modules of a class share one subclass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from peftcore.plugin.call import arguments

Maker = Callable[[type[nn.Module]], type[nn.Module]]  # class -> the subclass that replaces it

BUILT = ("_peftcore_chain", "_peftcore_base")  # attributes that are rebuilt in a copy


def one_for_each_class(make: Maker) -> Maker:
    """Cache `make`, so that it returns the same subclass whenever it is called with the same class."""
    return functools.cache(make)  # type: ignore[return-value]  # to mypy a class is not hashable


def subclass(
    cls: type[nn.Module], maker: Maker, namespace: dict[str, Any], mixins: tuple[type[nn.Module], ...] = ()
) -> type[nn.Module]:
    """Return a subclass with the name of `cls` that can be pickled, although its name refers to `cls`.

    Args:
        cls: the class.
        maker: the function that makes this subclass of `cls`; importable by name and decorated with
            `one_for_each_class`.
        namespace: attributes of the subclass.
        mixins: classes between the subclass and `cls`.
    """

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        self.__class__ = (
            cls  # a module created by `type(module)(...)`, such as a slice of `nn.Sequential`, has no adapters
        )
        self.__init__(*args, **kwargs)

    __init__.__wrapped__ = cls.__init__  # type: ignore[attr-defined]

    def __reduce_ex__(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        swapped_classes: list[Any] = [
            c for c in type(self).__mro__ if "_peftcore_maker" in c.__dict__
        ]  # the innermost last
        _, _, state, *remaining = super(swapped_classes[-1], self).__reduce_ex__(protocol)
        state = {key: value for key, value in state.items() if key not in BUILT}
        makers = [c.__dict__["_peftcore_maker"] for c in reversed(swapped_classes)]
        return (_rebuild, (swapped_classes[-1].__bases__[-1], *makers), state, *remaining)

    metaclass: Any = type(cls)
    return metaclass(
        cls.__name__,
        (*mixins, cls),
        {
            **namespace,
            "__init__": __init__,
            "__reduce_ex__": __reduce_ex__,
            "_peftcore_maker": maker,
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
            "_peftcore_arguments": arguments(cls),
        },
    )


def _rebuild(cls: type[nn.Module], *makers: Maker) -> nn.Module:
    for make in makers:
        cls = make(cls)
    return cls.__new__(cls)


def restore_class(module: nn.Module, marker: str) -> None:
    """Remove the swapped class that has the attribute `marker`; its subclasses (parametrizations) stay."""

    def without(cls: Any) -> Any:
        if marker in cls.__dict__:
            return cls.__dict__[marker]
        bases = tuple(without(base) if hasattr(base, marker) else base for base in cls.__bases__)
        attributes = {name: value for name, value in cls.__dict__.items() if name not in ("__dict__", "__weakref__")}
        return type(cls)(cls.__name__, bases, attributes)

    module.__class__ = without(type(module))
