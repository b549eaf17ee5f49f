"""C3A (Chen et al. 2024, arXiv 2407.19342): y = W x + block-wise circular convolutions of x, computed by FFT.

    x in blocks x₁ .. xₙ of b numbers, y in blocks y₁ .. yₘ        kernels w [m, n, b], trained
    yⱼ += 1/in · Σᵢ IDFT( DFT(xᵢ) · conj DFT(wⱼᵢ) )                real numbers, so half the spectrum suffices

With out · in / b parameters the update can have any rank. No matrix of the weight's size is built.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peftcore.plugin import (
    Adapter,
    Architecture,
    Around,
    Base,
    Method,
    PeftRules,
    Placement,
    StateRules,
    hookimpl,
    override,
    targets,
    validation,
    warn,
)

peftcore_api = ">=3.0,<4"


# Smallest block that `all-linear` chooses. With smaller ones an adapter has nearly as many parameters as the weight.
SMALLEST = 16


@dataclass(frozen=True)
class C3AConfig(targets.LayersConfig):
    """Config with the field names of Hugging Face PEFT's `C3AConfig`; the other fields select layers.

    Args:
        block_size: b, which must divide the inputs and outputs of each layer. Where it does not, `all-linear` uses the
            greatest common divisor if that is at least 16, and warns.
        block_size_pattern: block sizes of single layers, by name.
        bias: biases to train as well: "none", "all", or "c3a_only" (of adapted modules).
        init_weights: "xavier_uniform" (also for False), "kaiming_uniform" or "gaussian": random kernels, so that
            the adapter changes the model from the start. True: zero.
    """

    not_in_peft = frozenset({"exclude_modules", "fan_in_fan_out"})
    block_size: int = 256
    bias: Literal["none", "all", "c3a_only"] = "none"
    block_size_pattern: dict[str, int] = field(default_factory=dict)
    init_weights: bool | Literal["gaussian", "kaiming_uniform", "xavier_uniform"] = "xavier_uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.positive_whole(block_size=self.block_size, **self.block_size_pattern)

    def block_of(self, path: str) -> int:
        """Return the block size of the layer at `path`."""
        size: int = targets.pattern_value(self.block_size_pattern, path, self.block_size)
        return size

    def misfit(self, path: str, module: nn.Module) -> str | None:
        b, (width, out_width) = self.block_of(path), targets.sizes(module)
        sizes = f"'{path}' has {width} inputs and {out_width} outputs"
        if width % b == 0 and out_width % b == 0:
            return None
        return f"block_size={b} must divide both sizes, but {sizes}: choose {math.gcd(width, out_width)}"

    def resolved(self, model: nn.Module, architecture: Architecture) -> C3AConfig:
        """Return the config with block sizes that fit the layers of `all-linear`."""
        config = self
        if self.target_modules == "all-linear":
            smaller: dict[int, list[str]] = {}
            for path, module in targets.select_by(self, model, architecture).items():
                common = math.gcd(self.block_size, *targets.sizes(module))
                has_pattern = targets.pattern_value(self.block_size_pattern, path, None) is not None
                if SMALLEST <= common < self.block_size and not has_pattern:
                    smaller.setdefault(common, []).append(path)
            pattern: dict[str, int] = {}
            for block_size, paths in smaller.items():
                pattern.update(dict.fromkeys(targets.minimal_suffixes(model, paths), block_size))
            if pattern:
                warn(
                    f"block_size={self.block_size} does not divide the sizes of all layers; the others get "
                    f"block_size_pattern={pattern}"
                )
                config = replace(self, block_size_pattern={**self.block_size_pattern, **pattern})
        return targets.LayersConfig.resolved(config, model, architecture)


class Correlation(torch.autograd.Function):
    """Correlates x `[..., n b]` with kernels `[m, n, b]` to `[..., m b]`; saves only its inputs for backward."""

    @staticmethod
    def forward(x: Tensor, kernel: Tensor) -> Tensor:
        y = torch.einsum("...nf,mnf->...mf", spectrum(x, kernel), torch.fft.rfft(kernel).conj())
        return from_spectrum(y, x, kernel)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, kernel = ctx.saved_tensors
        dx, dkernel, g = None, None, spectrum(dy, kernel)
        if ctx.needs_input_grad[0]:
            dx = from_spectrum(torch.einsum("...mf,mnf->...nf", g, torch.fft.rfft(kernel)), x, kernel)
        if ctx.needs_input_grad[1]:
            spectra = torch.einsum("tmf,tnf->mnf", g.conj().flatten(0, -3), spectrum(x, kernel).flatten(0, -3))
            dkernel = torch.fft.irfft(spectra, n=kernel.shape[-1])
        return dx, dkernel


def fft_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype to transform x in: FFTs need at least fp32."""
    return torch.promote_types(x.dtype, torch.float32)


def spectrum(x: Tensor, kernel: Tensor) -> Tensor:
    """Return the spectrum of each block of x, `[..., blocks, b / 2 + 1]`."""
    return torch.fft.rfft(x.to(kernel.dtype).unflatten(-1, (-1, kernel.shape[-1])))


def from_spectrum(spectra: Tensor, x: Tensor, kernel: Tensor) -> Tensor:
    """Return the blocks with these spectra, joined to `[..., blocks · b]`, in x's dtype."""
    return torch.fft.irfft(spectra, n=kernel.shape[-1]).flatten(-2).to(x.dtype)


class C3A(Adapter):
    """Kernels `c3a_kernel` `[out / b, in / b, b]` of a linear layer."""

    def __init__(self, config: C3AConfig, block_size: int, width: int, out_width: int) -> None:
        super().__init__()
        self.width, self.block_size = width, block_size
        self.c3a_kernel = nn.Parameter(torch.zeros(out_width // block_size, width // block_size, block_size))
        if config.init_weights == "gaussian":
            nn.init.normal_(self.c3a_kernel)
        elif config.init_weights is not True:
            kaiming = config.init_weights == "kaiming_uniform"
            bound = math.sqrt(1 / width) if kaiming else math.sqrt(6 / (width + out_width))
            nn.init.uniform_(self.c3a_kernel, -bound, bound)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        return base(x) + Correlation.apply(x, self.c3a_kernel.to(fft_dtype(x)) / self.width)  # type: ignore[no-untyped-call]

    @override
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        steps = torch.arange(self.block_size, device=weight.device)
        circulant = self.c3a_kernel.float()[:, :, (steps - steps[:, None]) % self.block_size]  # [m, n, b out, b in]
        return weight + circulant.transpose(1, 2).reshape(weight.shape) / self.width, bias

    @override
    def neutral(self) -> dict[str, Tensor]:
        return {"c3a_kernel": torch.zeros_like(self.c3a_kernel)}


def place(model: nn.Module, config: C3AConfig, architecture: Architecture) -> list[Placement]:
    layers = {path: targets.sizes(module) for path, module in config.selected(model, architecture).items()}
    placements: list[Placement] = []
    for path, (width, out_width) in layers.items():
        placements.append(Around(path, C3A(config, config.block_of(path), width, out_width)))
    return placements + targets.trained_biases(model, config.bias, layers)


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(
        peft_type="C3A", peft=PeftRules(own_fields=C3AConfig.not_in_peft, unreadable=targets.conv1d_paths)
    )
    return [Method("c3a", C3AConfig, place, rules, learning_rate=3e-2)]
