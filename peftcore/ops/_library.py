"""The operator namespace `torch.ops.peftcore`. Every schema is defined once, through `define`."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import _disable_current_modes

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

    The reference is registered below CPU and CUDA: a compiled kernel, where one is loaded, goes first. Results require
    no gradient, whatever the inputs require. An operator that `reads_host` takes numbers from the host that differ from
    call to call: a CUDA graph would repeat those of its capture, so that `torch.compile(mode="reduce-overhead")` leaves
    the operator out of its graphs.
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
    library.impl(name, torch.library.fallthrough_kernel, "Autograd")


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
