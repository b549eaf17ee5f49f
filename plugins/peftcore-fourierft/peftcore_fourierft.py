"""FourierFT (Gao et al. 2024, arXiv 2405.03003): W + scaling · Re IDFT2(S), where S [out, in] has n nonzero entries.

    x [in] -- DFT --> [in / 2 + 1] -- n products with entries of S --> [out / 2 + 1] -- IDFT --> [out]

The change of W is never built: Re IDFT2(S) x is computed by a transform of x, a product with the sparse S, and a
transform back. Input and output are real, so half of each spectrum suffices. The n entries are trained. Their positions
are drawn from a seed and equal for layers of the same size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peftcore.plugin import (
    Adapter,
    Architecture,
    Around,
    Base,
    Method,
    Placement,
    StateRules,
    hookimpl,
    override,
    targets,
    validation,
)

peftcore_api = ">=3.0,<4"


@dataclass(frozen=True)
class FourierFTConfig(targets.LayersConfig):
    """Config with the field names of Hugging Face PEFT's `FourierFTConfig`; the other fields select layers.

    Args:
        n_frequency: number of entries of S per layer.
        n_frequency_pattern: numbers for single layers, by name.
        scaling: factor of the update; the paper uses 150 for encoders and 300 for Llama (appendix A).
        random_loc_seed: seed of the entries' positions.
        bias: biases to train as well: "none", "all", or "fourier_only" (of adapted modules).
        init_weights: True: entries are zero at the start. False, as in the paper: random, so the adapter changes
            the model from the start.
    """

    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int = 777
    bias: Literal["none", "all", "fourier_only", "fourierft_only"] = "none"
    n_frequency_pattern: dict[str, int] = field(default_factory=dict)
    init_weights: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.positive_whole(n_frequency=self.n_frequency, **self.n_frequency_pattern)


@lru_cache(maxsize=32)
def draw_positions(size: int, count: int, seed: int) -> Tensor:
    """Draw `count` of `size` positions without replacement, as PEFT does; int64 `[count]`."""
    return torch.randperm(size, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")[:count].clone()


class Update(torch.autograd.Function):
    """Computes Re IDFT2(S) x `[..., out]` for x `[..., in]` and n entries of S; saves only its inputs for backward."""

    @staticmethod
    def forward(x: Tensor, entries: Tensor, rows: Tensor, columns: Tensor, out_width: int) -> Tensor:
        return product(x, entries, rows, columns, out_width)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:4])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, entries, rows, columns = ctx.saved_tensors
        width, out_width, dx, dentries = x.shape[-1], dy.shape[-1], None, None
        if ctx.needs_input_grad[0]:
            dx = product(dy, entries, columns, rows, width)
        if ctx.needs_input_grad[1]:
            input_spectrum = half_spectrum(x, entries).index_select(1, half_index(columns, width))
            output_spectrum = half_spectrum(dy, entries).index_select(1, half_index(rows, out_width))
            real, imaginary = (input_spectrum * output_spectrum).sum(-1) / (width * out_width)
            # Frequencies above the middle are read as the conjugate of their mirror image.
            is_conjugated = (2 * columns > width) ^ (2 * rows > out_width)
            dentries = torch.where(is_conjugated, real + imaginary, real - imaginary)
        return dx, dentries, None, None, None


def half_spectrum(x: Tensor, entries: Tensor) -> Tensor:
    """Return real and imaginary part of DFT(x), `[2, in / 2 + 1, tokens]`; an entry then reads contiguous memory."""
    spectrum = torch.fft.rfft(x.to(entries.dtype).reshape(-1, x.shape[-1]))
    return torch.view_as_real(spectrum).permute(2, 1, 0).contiguous()


def half_index(frequencies: Tensor, width: int) -> Tensor:
    """Return each frequency's index in half a spectrum; above the middle, that of its mirror image."""
    return torch.minimum(frequencies, width - frequencies)


def product(x: Tensor, entries: Tensor, rows: Tensor, columns: Tensor, out_width: int) -> Tensor:
    """Return Re IDFT2(S) x, computed with half of each spectrum.

    IDFT(x) at v is the conjugate of DFT(x) at v, or DFT(x) itself at -v. A value added at u also appears conjugated at
    -u, so it counts half, except at 0 and in the middle.
    """
    width = x.shape[-1]
    is_conjugated = (2 * columns <= width) ^ (2 * rows > out_width)
    factor = (0.5 + 0.5 * ((rows == 0) | (2 * rows == out_width))) / width * entries
    entries_out = half_spectrum(x, entries).index_select(1, half_index(columns, width))
    entries_out = entries_out * torch.stack([factor, torch.where(is_conjugated, -factor, factor)])[:, :, None]
    spectrum = entries_out.new_zeros(2, out_width // 2 + 1, entries_out.shape[2])
    spectrum = spectrum.index_add(1, half_index(rows, out_width), entries_out)
    y = torch.fft.irfft(torch.view_as_complex(spectrum.permute(2, 1, 0).contiguous()), n=out_width)
    return y.view(*x.shape[:-1], out_width).to(x.dtype)


class Positions(nn.Module):
    """Positions of the entries, `rows` and `columns` `[n]`. Layers of the same size share one."""

    rows: Tensor
    columns: Tensor

    def __init__(self, n: int, width: int, out_width: int, seed: int) -> None:
        super().__init__()
        indices = torch.empty(n, dtype=torch.int64)
        # On meta tensors there is nothing to draw.
        indices = indices if indices.is_meta else draw_positions(width * out_width, n, seed).to(indices.device)
        self.register_buffer("rows", indices // width, persistent=False)
        self.register_buffer("columns", indices % width, persistent=False)


class FourierFT(Adapter):
    """Entries `fourierft_spectrum` `[n]` of a linear layer, and their positions."""

    def __init__(self, config: FourierFTConfig, positions: Positions, out_width: int) -> None:
        super().__init__()
        self.scaling, self.out_width, self.positions = config.scaling, out_width, positions
        n = len(positions.rows)
        self.fourierft_spectrum = nn.Parameter(torch.zeros(n) if config.init_weights else torch.randn(n))

    def forward(self, base: Base, x: Tensor) -> Tensor:
        entries = self.scaling * self.fourierft_spectrum.to(torch.promote_types(x.dtype, torch.float32))
        rows, columns = self.positions.rows.to(x.device), self.positions.columns.to(x.device)
        return base(x) + Update.apply(x, entries, rows, columns, self.out_width)  # type: ignore[no-untyped-call]

    @override
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        entries = self.fourierft_spectrum.float()
        indices = self.positions.rows.to(weight.device), self.positions.columns.to(weight.device)
        full_spectrum = entries.new_zeros(weight.shape).index_put(indices, entries)
        return weight + self.scaling * torch.fft.ifft2(full_spectrum).real, bias

    @override
    def neutral(self) -> dict[str, Tensor]:
        return {"fourierft_spectrum": torch.zeros_like(self.fourierft_spectrum)}


def place(model: nn.Module, config: FourierFTConfig, architecture: Architecture) -> list[Placement]:
    layers = {path: targets.sizes(module) for path, module in config.selected(model, architecture).items()}
    placements: list[Placement] = []
    positions: dict[Any, Positions] = {}
    for path, (width, out_width) in layers.items():
        n = targets.pattern_value(config.n_frequency_pattern, path, config.n_frequency)
        validation.require(
            n <= width * out_width,
            f"n_frequency={n} is too large: the weight of '{path}' has {width * out_width} entries. Choose a smaller "
            "number",
        )
        size = (n, width, out_width)
        positions[size] = positions.get(size) or Positions(*size, config.random_loc_seed)
        placements.append(Around(path, FourierFT(config, positions[size], out_width)))
    return placements + targets.trained_biases(model, config.bias, layers)


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(peft_type="FOURIERFT")
    return [Method("fourierft", FourierFTConfig, place, rules, learning_rate=3e-2)]
