"""Detect convolutions for which PEFT's adapters are not equivalent to a change of the weight."""

from __future__ import annotations

from torch import nn

from peftcore.model.base_modules import original_class
from peftcore.plugin.layers import Convolution

_PLAIN = {nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward}


def odd_convolution(path: str, module: nn.Module, *, alike: bool = False, grouped: bool = True) -> str | None:
    """Return an error message for a convolution that a method cannot adapt like PEFT, or None.

    Args:
        path: path of the module, for the error message.
        module: the module.
        alike: PEFT assumes the same kernel size, stride and padding in all directions, and a dilation of 1.
        grouped: whether the method supports grouped convolutions.
    """
    reason = _oddity(module, alike, grouped) if isinstance(module, Convolution) else None
    return reason and (
        f"'{path}' is a convolution {reason}, where PEFT fails or computes something else with the same adapter. "
        f"Exclude it: exclude_modules=['{path}']"
    )


def _oddity(module: Convolution, alike: bool, grouped: bool) -> str | None:
    pads = isinstance(module.padding, str) or any(module.padding)
    if original_class(module).forward not in _PLAIN:
        return f"of class {original_class(module).__name__}, which has a custom forward"
    if pads and module.padding_mode != "zeros":
        return f"with padding_mode='{module.padding_mode}'"
    if module.groups > 1 and not grouped:
        return f"in {module.groups} groups"
    if alike and any(d > 1 and k > 1 for d, k in zip(module.dilation, module.kernel_size, strict=True)):
        return f"with dilation={module.dilation}"
    if alike and (isinstance(module.padding, str) or any(map(_are_different, (module.stride, module.padding)))):
        return f"with stride={module.stride} and padding={module.padding!r}"
    return f"with kernel_size={module.kernel_size}" if alike and _are_different(module.kernel_size) else None


def _are_different(sizes: tuple[int, ...]) -> bool:
    return len(set(sizes)) > 1
