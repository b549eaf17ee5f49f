"""Detection of convolutions that PEFT adapts differently from a change of the weight."""

from __future__ import annotations

from torch import nn

from peftcore.model.base_modules import original_class
from peftcore.plugin.layers import Convolution

_PLAIN = {nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward}


def odd_convolution(path: str, module: nn.Module, *, alike: bool = False, grouped: bool = True) -> str | None:
    """Return the error for a convolution that a method cannot adapt as PEFT does, or None, also for other layers.

    Args:
        alike: PEFT takes kernel, stride and padding to be the same in all directions, and dilation to be 1.
        grouped: the method adapts convolutions in groups.
    """
    why = _oddity(module, alike, grouped) if isinstance(module, Convolution) else None
    return why and (
        f"'{path}' is a convolution {why}, where PEFT computes something else, or nothing, from the same adapter. "
        f"Exclude it: exclude_modules=['{path}']"
    )


def _oddity(module: Convolution, alike: bool, grouped: bool) -> str | None:
    pads = isinstance(module.padding, str) or any(module.padding)
    if original_class(module).forward not in _PLAIN:
        return f"of the class {original_class(module).__name__}, which has a forward of its own"
    if pads and module.padding_mode != "zeros":
        return f"with padding_mode='{module.padding_mode}'"
    if module.groups > 1 and not grouped:
        return f"in {module.groups} groups"
    if alike and any(d > 1 and k > 1 for d, k in zip(module.dilation, module.kernel_size, strict=True)):
        return f"with dilation={module.dilation}"
    if alike and (isinstance(module.padding, str) or any(map(_differ, (module.stride, module.padding)))):
        return f"with stride={module.stride} and padding={module.padding!r}"
    return f"with kernel_size={module.kernel_size}" if alike and _differ(module.kernel_size) else None


def _differ(sizes: tuple[int, ...]) -> bool:
    return len(set(sizes)) > 1
