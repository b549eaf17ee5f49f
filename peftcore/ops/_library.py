"""The operator namespace `torch.ops.peftcore`. Every schema is defined once, through `define`."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_iter

from peftcore.ops import _extension

library = torch.library.Library("peftcore", "DEF")


def _tensors_there(schema: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the function in a check that schemas lack: they accept None as an undefined tensor."""
    name, _, arguments = schema.partition("(")
    declared = re.sub(r"\([a-z]!\)", "", arguments.split(") ->")[0]).split(", ")
    names = [argument.split()[-1].split("=")[0] for argument in declared]
    needed = [name for name, argument in zip(names, declared, strict=True) if argument.startswith("Tensor ")]

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip((n for n in names if n != "*"), args, strict=False)) | kwargs
        for argument in needed:
            if given[argument] is None:
                raise TypeError(f"{name}: {argument} must be a tensor, found None")
        return function(*args, **kwargs)

    return checked


def _outside_autocast(reference: Callable[..., Any]) -> Callable[..., Any]:
    """Disable autocast, as in a kernel: arguments have been cast, and results have their dtypes."""

    @functools.wraps(reference)
    def computed(*args: Any, **kwargs: Any) -> Any:
        with torch._C._DisableAutocast():
            return reference(*args, **kwargs)

    return computed


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any], *, reads_host: bool = False) -> None:
    """Define an operator: its schema, its PyTorch reference for every device, and its shape rule.

    The reference is registered below CPU and CUDA: a compiled kernel, where one is loaded, goes first. A call whose
    gradient would be lost raises a RuntimeError, see `_refuse_gradients`. An operator that `reads_host` takes numbers
    from the host that differ from call to call: a CUDA graph would repeat those of its capture, so that
    `torch.compile(mode="reduce-overhead")` leaves the operator out of its graphs.
    """
    name = schema.partition("(")[0]
    try:
        unsafe = (torch.Tag.cudagraph_unsafe,) if reads_host else ()
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag, *unsafe))
    except RuntimeError as error:
        if _extension.extension is None:
            raise
        raise RuntimeError(
            f"the compiled extension is another version's: its '{name}' takes other arguments. "
            f"Rebuild it: {_extension.REBUILD}"
        ) from error
    library.impl(name, _tensors_there(schema, _outside_autocast(reference)), "CompositeExplicitAutograd")
    torch.library.register_fake(f"peftcore::{name}", _tensors_there(schema, fake), lib=library)
    _refuse_gradients(name)


def _refuse_gradients(name: str) -> None:
    """Give the operator the kernel for autograd that raises a RuntimeError where a gradient would be lost.

    Operators have no gradient of their own: the functions of `peftcore.ops` call them in a `torch.autograd.Function`.
    The extension has the same kernel in C++: in Python it takes a tenth of the time that a small model decodes in.
    """
    if _extension.extension is not None:
        _extension.extension.refuse_gradients(name)
        return
    base, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.peftcore, base), overload or "default")
    after = torch._C._after_autograd_keyset

    def refuse_or_compute(keys: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() or forward_ad._current_level >= 0:
            for tensor in tree_iter((args, kwargs)):
                if isinstance(tensor, Tensor) and _is_differentiated(tensor):
                    raise RuntimeError(
                        f"torch.ops.peftcore.{name} has no gradient, and an argument requires one. Call the function "
                        "of peftcore.ops in its place, or call it under torch.no_grad()"
                    )
        return operator.redispatch(keys & after, *args, **kwargs)

    library.impl(name, refuse_or_compute, "Autograd", with_keyset=True)


def _is_differentiated(tensor: Tensor) -> bool:
    """Return whether a gradient of the tensor is asked for, backward or forward."""
    if tensor.requires_grad and torch.is_grad_enabled():
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


class Call(Protocol):
    """One call of an operator: made of its arguments, by name, which it checks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def compute(self) -> Any:
        """Return the results, computed by PyTorch's operators."""

    def empty(self) -> Any:
        """Tensors of the results' shapes and dtypes."""


def define_by(schema: str, call: type[Call]) -> None:
    """Define an operator whose reference and shape rule come from one class, with the same arguments and checks.

    An operator with a `seed` is also defined as `NAME_seeded`, which a compiled model calls if the seed is on the CPU:
    without one, or with one on the card, the operator may be in a CUDA graph.
    """

    def reference(*args: Any, **kwargs: Any) -> Any:
        made = call(*args, **kwargs)
        with torch.no_grad():
            return made.compute()

    def fake(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs).empty()

    define(schema, reference, fake)
    if "Tensor? seed" not in schema:
        return
    name, _, arguments = schema.partition("(")

    def seeded(*args: Any, **kwargs: Any) -> Any:
        return getattr(torch.ops.peftcore, name).default(*args, **kwargs)

    define(f"{name}_seeded({arguments}", seeded, fake, reads_host=True)


_CONSTANTS = RLock()


@contextmanager
def constants() -> Iterator[None]:
    """Tensors made within live as long as the process: fp32 on the CPU, ordinary ones.

    Whatever device, dtype or mode is in force where their module is first imported: a plan on meta tensors, a fake or
    an inference mode, a default dtype of float64.
    """
    with _CONSTANTS:  # threads that overlap would restore each other's default dtype
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            with _disable_current_modes(), torch.inference_mode(False), torch.device("cpu"):
                yield
        finally:
            torch.set_default_dtype(default)
