"""FourierFT (Gao et al. 2024, arXiv 2405.03003): W + scaling · Re IDFT2(S), S [out, in] zero except n entries.

    x [in] -- DFT --> [in / 2 + 1] -- n entries, each times a number of S --> [out / 2 + 1] -- IDFT --> [out]

The change of W is never built: Re IDFT2(S) x is a transform of x, the sparse matrix S, and a transform back. They are
real, so half the spectrum suffices. Trained: the n entries, at positions drawn from a seed, equal for layers of one
size.
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
        n_frequency: entries of S per layer. n_frequency_pattern: values for single layers, by name.
        scaling: factor of the update; 150 for encoders, 300 for Llamas (appendix A of the paper).
        random_loc_seed: seed of the positions.
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
def places(size: int, count: int, seed: int) -> Tensor:
    """Return positions, int64 `[count]`, drawn without repetition from `size` as PEFT draws them."""
    return torch.randperm(size, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")[:count].clone()


class Update(torch.autograd.Function):
    """x `[..., in]` -> Re IDFT2(S) x `[..., out]`, for n entries of S; saves only the inputs for the backward pass."""

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
            taken = half_spectrum(x, entries).index_select(1, folded(columns, width))
            given = half_spectrum(dy, entries).index_select(1, folded(rows, out_width))
            real, imaginary = (taken * given).sum(-1) / (width * out_width)
            once = (2 * columns > width) ^ (2 * rows > out_width)  # one of the two is conjugated
            dentries = torch.where(once, real + imaginary, real - imaginary)
        return dx, dentries, None, None, None


def half_spectrum(x: Tensor, entries: Tensor) -> Tensor:
    """Return DFT(x), real and imaginary part, `[2, in / 2 + 1, tokens]`, so that an entry reads contiguous memory."""
    return (
        torch.view_as_real(torch.fft.rfft(x.to(entries.dtype).reshape(-1, x.shape[-1]))).permute(2, 1, 0).contiguous()
    )


def folded(at: Tensor, width: int) -> Tensor:
    """Return the indices in half a spectrum of these frequencies, or of their conjugates."""
    return torch.minimum(at, width - at)


def product(x: Tensor, entries: Tensor, rows: Tensor, columns: Tensor, out_width: int) -> Tensor:
    """Return Re IDFT2(S) x, computed with half of each spectrum.

    IDFT(x) at v is the conjugate of DFT(x) at v, or DFT(x) itself at -v. A value added at u appears conjugated at -u,
    too, so it counts half, except at 0 and in the middle.
    """
    width = x.shape[-1]
    conjugated = (2 * columns <= width) ^ (2 * rows > out_width)
    real = (0.5 + 0.5 * ((rows == 0) | (2 * rows == out_width))) / width * entries
    read = half_spectrum(x, entries).index_select(1, folded(columns, width))
    read = read * torch.stack([real, torch.where(conjugated, -real, real)])[:, :, None]
    h = read.new_zeros(2, out_width // 2 + 1, read.shape[2]).index_add(1, folded(rows, out_width), read)
    y = torch.fft.irfft(torch.view_as_complex(h.permute(2, 1, 0).contiguous()), n=out_width)
    return y.view(*x.shape[:-1], out_width).to(x.dtype)


class Places(nn.Module):
    """Positions of the entries, `rows` and `columns` `[n]`, shared by all layers of one size."""

    rows: Tensor
    columns: Tensor

    def __init__(self, n: int, width: int, out_width: int, seed: int) -> None:
        super().__init__()
        at = torch.empty(n, dtype=torch.int64)
        at = at if at.is_meta else places(width * out_width, n, seed).to(at.device)
        self.register_buffer("rows", at // width, persistent=False)
        self.register_buffer("columns", at % width, persistent=False)


class FourierFT(Adapter):
    """Entries `fourierft_spectrum` `[n]` of a linear layer, and their positions."""

    def __init__(self, config: FourierFTConfig, at: Places, out_width: int) -> None:
        super().__init__()
        self.scaling, self.out_width, self.at = config.scaling, out_width, at
        n = len(at.rows)
        self.fourierft_spectrum = nn.Parameter(torch.zeros(n) if config.init_weights else torch.randn(n))

    def forward(self, base: Base, x: Tensor) -> Tensor:
        entries = self.scaling * self.fourierft_spectrum.to(torch.promote_types(x.dtype, torch.float32))
        rows, columns = self.at.rows.to(x.device), self.at.columns.to(x.device)
        return base(x) + Update.apply(x, entries, rows, columns, self.out_width)  # type: ignore[no-untyped-call]

    @override
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        spectrum, at = self.fourierft_spectrum.float(), (self.at.rows, self.at.columns)
        dense = spectrum.new_zeros(weight.shape).index_put(tuple(t.to(weight.device) for t in at), spectrum)
        return weight + self.scaling * torch.fft.ifft2(dense).real, bias

    @override
    def neutral(self) -> dict[str, Tensor]:
        return {"fourierft_spectrum": torch.zeros_like(self.fourierft_spectrum)}


def place(model: nn.Module, config: FourierFTConfig, architecture: Architecture) -> list[Placement]:
    layers = {path: targets.sizes(module) for path, module in config.selected(model, architecture).items()}
    placed: list[Placement] = []
    at: dict[Any, Places] = {}
    for path, (width, out_width) in layers.items():
        n = targets.pattern_value(config.n_frequency_pattern, path, config.n_frequency)
        there = f"the weight of '{path}' has {width * out_width}"
        validation.require(n <= width * out_width, f"n_frequency={n} is more than there are: {there} entries")
        size = (n, width, out_width)
        at[size] = at.get(size) or Places(*size, config.random_loc_seed)
        placed.append(Around(path, FourierFT(config, at[size], out_width)))
    return placed + targets.trained_biases(model, config.bias, layers)


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(peft_type="FOURIERFT")
    return [Method("fourierft", FourierFTConfig, place, rules, learning_rate=3e-2)]
