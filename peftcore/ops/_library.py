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

from peftcore.ops import _extension, _triton

library = torch.library.Library("peftcore", "DEF")


def _refuse_missing_tensors(schema: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the function to refuse None for a required tensor, which schemas accept as an undefined tensor."""
    name, _, arguments = schema.partition("(")
    parameters = re.sub(r"\([a-z]!\)", "", arguments.split(") ->")[0]).split(", ")
    names = [argument.split()[-1].split("=")[0] for argument in parameters]
    required = [name for name, argument in zip(names, parameters, strict=True) if argument.startswith("Tensor ")]

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        bound_arguments = dict(zip((n for n in names if n != "*"), args, strict=False)) | kwargs
        for argument in required:
            if bound_arguments[argument] is None:
                raise TypeError(f"{name}: {argument} must be a tensor, found None")
        return function(*args, **kwargs)

    return wrapper


def _without_autocast(reference: Callable[..., Any]) -> Callable[..., Any]:
    """Disable autocast inside the reference, as kernels do: the arguments have already been cast."""

    @functools.wraps(reference)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with torch._C._DisableAutocast():
            return reference(*args, **kwargs)

    return wrapper


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any], *, reads_host: bool = False) -> None:
    """Define an operator: its schema, its PyTorch reference for every device, and its shape rule.

    The reference is registered for all devices, and a compiled kernel for CPU or CUDA takes precedence over it. A call
    whose gradient would be lost raises a RuntimeError (see `_refuse_gradients`).

    Args:
        schema: the operator's schema, without namespace.
        reference: computes the results with PyTorch's operators.
        fake: returns empty results of the right shapes and dtypes.
        reads_host: the operator reads values on the host that change from call to call. A CUDA graph would replay the
            values of its capture, so `torch.compile(mode="reduce-overhead")` must not capture the operator.
    """
    name = schema.partition("(")[0]
    try:
        unsafe = (torch.Tag.cudagraph_unsafe,) if reads_host else ()
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag, *unsafe))
    except RuntimeError as error:
        if _extension.extension is None:
            raise
        raise RuntimeError(
            f"the compiled extension belongs to another version: its '{name}' takes different arguments. "
            f"Rebuild it: {_extension.REBUILD}"
        ) from error
    library.impl(name, _refuse_missing_tensors(schema, _without_autocast(reference)), "CompositeExplicitAutograd")
    torch.library.register_fake(f"peftcore::{name}", _refuse_missing_tensors(schema, fake), lib=library)
    _refuse_gradients(name)


def _refuse_gradients(name: str) -> None:
    """Register an autograd kernel that raises a RuntimeError where a gradient would be lost.

    Operators have no gradient of their own: the functions of `peftcore.ops` call them in a `torch.autograd.Function`.
    The extension has the same kernel in C++, because the Python version takes a tenth of a small model's decoding time.
    """
    if _extension.extension is not None:
        _extension.extension.refuse_gradients(name)
        return
    base, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.peftcore, base), overload or "default")
    below_autograd = torch._C._after_autograd_keyset

    def refuse_or_compute(keys: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() or forward_ad._current_level >= 0:
            for tensor in tree_iter((args, kwargs)):
                if isinstance(tensor, Tensor) and _is_differentiated(tensor):
                    raise RuntimeError(
                        f"torch.ops.peftcore.{name} computes no gradient, but an argument requires grad. Call the "
                        "function of peftcore.ops instead, or call the operator under torch.no_grad()"
                    )
        return operator.redispatch(keys & below_autograd, *args, **kwargs)

    library.impl(name, refuse_or_compute, "Autograd", with_keyset=True)


def _is_differentiated(tensor: Tensor) -> bool:
    """Return whether backward or forward-mode differentiation needs a gradient of the tensor."""
    if tensor.requires_grad and torch.is_grad_enabled():
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


class Call(Protocol):
    """One call of an operator. Its constructor takes the operator's arguments and checks them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def compute(self) -> Any:
        """Compute the results with PyTorch's operators."""

    def empty(self) -> Any:
        """Return uninitialized tensors with the results' shapes and dtypes."""


def define_by(schema: str, call: type[Call], *, triton: str = "") -> None:
    """Define an operator whose reference and shape rule are methods of one class, with the same arguments and checks.

    An operator with a `seed` is also defined as `NAME_seeded`, which CUDA graphs do not capture. A compiled model calls
    it if the seed is on the CPU. Without a seed, or with a seed on the GPU, CUDA graphs can capture the operator
    itself.

    Args:
        schema: the operator's schema, without namespace.
        call: the class.
        triton: module of `peftcore.ops.triton` with a kernel for CUDA tensors (see `_triton.add_kernel`).
    """

    def reference(*args: Any, **kwargs: Any) -> Any:
        instance = call(*args, **kwargs)
        with torch.no_grad():
            return instance.compute()

    def fake(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs).empty()

    define(schema, reference, fake)
    name, _, arguments = schema.partition("(")
    if triton and _triton.AVAILABLE:
        kernel = _without_autocast(_triton.add_kernel(name, triton, call))
        library.impl(name, _refuse_missing_tensors(schema, kernel), "CUDA")
    if "Tensor? seed" not in schema:
        return

    def seeded(*args: Any, **kwargs: Any) -> Any:
        return getattr(torch.ops.peftcore, name).default(*args, **kwargs)

    define(f"{name}_seeded({arguments}", seeded, fake, reads_host=True)


_CONSTANTS = RLock()


@contextmanager
def constants() -> Iterator[None]:
    """Create module-level tensors as ordinary fp32 CPU tensors.

    The module may first be imported under another default device or dtype, or in a fake, meta or inference mode.
    """
    # Overlapping threads would restore each other's default dtype.
    with _CONSTANTS:
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            with _disable_current_modes(), torch.inference_mode(False), torch.device("cpu"):
                yield
        finally:
            torch.set_default_dtype(default)
