"""The operator namespace `torch.ops.peftcore`. Every schema is defined once, through `define`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import _disable_current_modes

from peftcore.ops import _extension

library = torch.library.Library("peftcore", "DEF")


def define(schema: str, reference: Callable, fake: Callable, *, differentiable: bool = False) -> None:
    """Define an operator: its schema, its PyTorch reference for every device, and its shape rule.

    The reference is registered below CPU and CUDA: a compiled kernel, where one is loaded, goes first. An operator
    that is not `differentiable` gives results that require no gradient, whatever its inputs require.
    """
    name = schema.partition("(")[0]
    try:
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    except RuntimeError as error:
        if _extension.extension is None:
            raise
        raise RuntimeError(
            f"the compiled extension is another version's: its '{name}' takes other arguments. "
            f"Rebuild it: {_extension.REBUILD}"
        ) from error
    library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"peftcore::{name}", fake, lib=library)
    if not differentiable:
        library.impl(name, torch.library.fallthrough_kernel, "Autograd")


@contextmanager
def constants() -> Iterator[None]:
    """Tensors made within live as long as the process: fp32 on the CPU, ordinary ones.

    Whatever device, dtype or mode is in force where their module is first imported: a plan on meta tensors, a fake or
    an inference mode, a default dtype of float64.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with _disable_current_modes(), torch.inference_mode(False), torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(default)
