"""The operator namespace `torch.ops.peftcore`. Every schema is defined once, through `define`."""

from __future__ import annotations

from collections.abc import Callable

import torch

library = torch.library.Library("peftcore", "DEF")


def define(schema: str, reference: Callable, fake: Callable, *, differentiable: bool = False) -> None:
    """Define an operator: its schema, its PyTorch reference for every device, and its shape rule.

    The reference is registered below CPU and CUDA: a compiled kernel, where one is loaded, goes first. An operator
    that is not `differentiable` gives results that require no gradient, whatever its inputs require.
    """
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.partition("(")[0]
    library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"peftcore::{name}", fake, lib=library)
    if not differentiable:
        library.impl(name, torch.library.fallthrough_kernel, "Autograd")
