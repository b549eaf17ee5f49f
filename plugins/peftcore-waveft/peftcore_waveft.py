"""WaveFT (Bilican et al. 2025, arXiv 2505.12532): W + scaling · IDWT2(S), where S has n nonzero entries.

    S = [ LL  HL ]     entry c at (i, j) adds c · f_i ⊗ g_j to the change of W, where f and g are the wavelet's low- or
        [ LH  HH ]     high-pass filter of length L, from row 2 i - L + 2 and column 2 j - L + 2 on

The transform has one level. S exceeds W by L - 2 in both directions, rounded up to even. Entries are in its middle, and
what falls outside W is cropped. The n entries are trained. Their positions are drawn from a seed and equal for layers
of the same size. The change of W is computed as a sum of n small patches, without a transform.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.plugin import (
    Adapter,
    Architecture,
    Around,
    Base,
    Fields,
    Method,
    PeftcoreError,
    Placement,
    StateRules,
    Tensors,
    hookimpl,
    override,
    targets,
    validation,
)

peftcore_api = ">=3.0,<4"

# Coiflets 1 to 4 (Daubechies 1993) with sum 1, as in PEFT: PyWavelets' numbers, except the fourth, 2 % off.
_COIFLETS = {
    "coif1": (
        -0.05142972847077,
        0.2389297284708,
        0.6028594569415,
        0.2721405430585,
        -0.05142972847077,
        -0.01107027152923,
    ),
    "coif2": (
        0.01158759673872,
        -0.02932013798347,
        -0.04763959031101,
        0.2730210465348,
        0.5746823938569,
        0.2948671936956,
        -0.05408560709171,
        -0.04202648046077,
        0.01674441016328,
        0.003967883612962,
        -0.001289203356141,
        -0.0005095053991076,
    ),
    "coif3": (
        -0.002682418670922,
        0.005503126707831,
        0.01658356047917,
        -0.04650776447873,
        -0.04322076356021,
        0.2865033352736,
        0.5612852568703,
        0.3029835717728,
        -0.05077014075489,
        -0.05819625076159,
        0.02443409432117,
        0.01122924096204,
        -0.006369601011049,
        -0.001820458915566,
        0.0007902051009576,
        0.0003296651737932,
        -5.019277455328e-05,
        -2.446573425531e-05,
    ),
    "coif4": (
        0.0006309612114309,
        -0.00115222514377,
        -0.00519452516347,
        0.01136093089978,
        0.01894506104562,
        -0.05171984370582,
        -0.03448614047094,
        0.3022725105366,
        0.5545479062409,
        0.3079176680252,
        -0.04352500928127,
        -0.06488795097143,
        0.01988077364816,
        0.01763894787126,
        -0.007366054847173,
        -0.002312432307659,
        0.001426006344233,
        0.0004666984635537,
        -0.0001270007842387,
        -0.0001130536369789,
        3.048364879678e-05,
        1.266744808933e-05,
        -1.584926580757e-06,
        -1.123948088282e-06,
    ),
}
# For each pair of roots z, 1 / z of a symlet, ordered by the angle of z, "1" uses the root outside the unit circle
# (Daubechies 1992, section 8.1.1).
_OUTER = {2: "0", 3: "0", 4: "01", 5: "10", 6: "101", 7: "100", 8: "0101", 9: "0110", 10: "10101"}
FAMILIES = [f"db{n}" for n in range(1, 11)] + [f"sym{n}" for n in range(2, 11)] + list(_COIFLETS)


@dataclass(frozen=True)
class WaveFTConfig(targets.LayersConfig):
    """Config with the field names of Hugging Face PEFT's `WaveFTConfig`; the other fields select layers.

    Args:
        n_frequency: number of entries of S per layer.
        n_frequency_pattern: numbers for single layers, by name.
        proportional_parameters: distribute entries in proportion to the layers' sizes; n_frequency is then the mean.
        scaling: factor of the update.
        wavelet_family: "db1" (Haar) to "db10", "sym2" to "sym10", "coif1" to "coif4". Others also fail in PEFT.
        use_idwt: False: S itself is the change of W.
        random_loc_seed: seed of the entries' positions.
        bias: biases to train as well: "none", "all", or "waveft_only" (of adapted modules).
        init_weights: True: entries are zero at the start. False: normal, with standard deviation 0.01.
    """

    n_frequency: int = 2592
    scaling: float = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    random_loc_seed: int = 777
    bias: Literal["none", "all", "waveft_only"] = "none"
    n_frequency_pattern: dict[str, int] | None = field(default_factory=dict)
    proportional_parameters: bool = False
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.positive_whole(n_frequency=self.n_frequency, **(self.n_frequency_pattern or {}))
        message = f"wavelet_family must be one of {', '.join(FAMILIES)}, found {self.wavelet_family!r}"
        validation.require(self.wavelet_family in FAMILIES, message)

    def misfit(self, path: str, module: nn.Module) -> str | None:
        if self.proportional_parameters:
            return None  # `place` checks, since the number of entries depends on the other layers
        n = targets.pattern_value(self.n_frequency_pattern, path, self.n_frequency)
        return too_many_entries(n, path, *targets.sizes(module))


def too_many_entries(n: int, path: str, width: int, out_width: int) -> str | None:
    """Return an error message if a layer's weight has less than n entries, or None."""
    if n <= width * out_width:
        return None
    return (
        f"n_frequency={n} is too large: the weight of '{path}' has {width * out_width} entries. Choose a smaller number"
    )


@lru_cache
def filters(family: str) -> Tensor:
    """Return the low-pass and the high-pass filter of the inverse transform, fp64 `[2, L]`.

    The low-pass filter of a Daubechies wavelet or symlet is (1 + z)^n Π (z - root), scaled to the sum sqrt(2). Its
    n - 1 roots are one of each pair z, 1 / z that solves Σ_k C(n - 1 + k, k) y^k = 0 with y = (2 - z - 1 / z) / 4
    (Daubechies 1992, chapter 6).
    """
    if family in _COIFLETS:
        low_pass = math.sqrt(2) * np.array(_COIFLETS[family])
    else:
        n, roots = int(family.lstrip("dbsym")), []
        solutions = np.roots([math.comb(n - 1 + k, k) for k in reversed(range(n))])
        pairs = [sorted(np.roots([1, 4 * y - 2, 1]), key=abs) for y in solutions]
        pairs.sort(key=lambda pair: round(abs(np.angle(pair[0])), 6))
        upper_pairs = [pair for pair in pairs if abs(pair[0].imag) < 1e-6 or pair[0].imag > 0]
        choices = _OUTER[n] if family.startswith("sym") else "0" * len(upper_pairs)
        for pair, use_outer in zip(upper_pairs, choices, strict=True):
            root = pair[int(use_outer)]
            roots += [root.real] if abs(root.imag) < 1e-6 else [root, root.conjugate()]
        low_pass = np.poly([-1.0] * n + roots).real
        low_pass *= math.sqrt(2) / low_pass.sum()
    high_pass = low_pass[::-1] * (-1.0) ** np.arange(len(low_pass))
    return torch.tensor(np.stack([low_pass, high_pass]), device="cpu")


@lru_cache(maxsize=32)
def draw_positions(size: int, count: int, seed: int) -> Tensor:
    """Draw `count` of `size` positions without replacement, as PEFT does; int64 `[count]`."""
    return torch.randperm(size, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")[:count].clone()


class Patches(nn.Module):
    """First `rows` and `columns` `[n]` of the patches, and `high` `[2, n]`: whether a filter is the high-pass one.

    Layers of the same size share them.
    """

    rows: Tensor
    columns: Tensor
    high: Tensor

    def __init__(self, config: WaveFTConfig, n: int, width: int, out_width: int) -> None:
        super().__init__()
        self.filters = filters(config.wavelet_family).float() if config.use_idwt else torch.ones(2, 1, device="cpu")
        self.margin = max(self.filters.shape[1] - 2, 0)  # how far a patch may extend beyond W
        starts, high = torch.empty(2, n, dtype=torch.int64), torch.empty(2, n, dtype=torch.bool)
        if not starts.is_meta:
            positions = draw_positions(width * out_width, n, config.random_loc_seed).to(starts.device)
            starts, high = torch.stack([positions // width, positions % width]), high.fill_(False)
            if config.use_idwt:
                for axis, size in enumerate((out_width, width)):
                    # Positions count from W's corner; S begins earlier, and its second half is high-pass.
                    half = (size + self.margin + 1) // 2
                    index = starts[axis] + (2 * half - size) // 2
                    high[1 - axis], starts[axis] = index >= half, 2 * (index % half)
        self.register_buffer("rows", starts[0], persistent=False)
        self.register_buffer("columns", starts[1], persistent=False)
        self.register_buffer("high", high, persistent=False)


class WaveFT(Adapter):
    """Entries `waveft_spectrum` `[n]` of a linear layer, one per patch."""

    def __init__(self, config: WaveFTConfig, patches: Patches, width: int, out_width: int) -> None:
        super().__init__()
        self.scaling, self.width, self.out_width, self.patches = config.scaling, width, out_width, patches
        n = len(patches.rows)
        self.waveft_spectrum = nn.Parameter(torch.zeros(n) if config.init_weights else 0.01 * torch.randn(n))

    def delta(self) -> Tensor:
        """Return the change of the weight, fp32 `[out, in]`."""
        device, margin = self.waveft_spectrum.device, self.patches.margin
        taps, rows, columns, high = (
            t.to(device) for t in (self.patches.filters, self.patches.rows, self.patches.columns, self.patches.high)
        )
        row_filters, column_filters = taps[high.long()]  # [n, L]
        patches = (
            (self.scaling * self.waveft_spectrum.float())[:, None, None]
            * row_filters[:, :, None]
            * column_filters[:, None, :]
        )
        offsets = torch.arange(taps.shape[1], device=device)
        height, width = self.out_width + 2 * margin + 1, self.width + 2 * margin + 1
        indices = (rows[:, None] + offsets)[:, :, None] * width + (columns[:, None] + offsets)[:, None, :]
        padded = (
            patches.new_zeros(height * width).index_add(0, indices.flatten(), patches.flatten()).view(height, width)
        )
        return padded[margin : margin + self.out_width, margin : margin + self.width]

    def forward(self, base: Base, x: Tensor) -> Tensor:
        weight, bias = base.linear_operands(x) or (None, None)
        if isinstance(weight, Tensor) and weight.dtype == torch.float32:
            return F.linear(x, weight + self.delta(), bias)
        return base(x) + F.linear(x, self.delta().to(x.dtype))

    @override
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.delta(), bias

    @override
    def neutral(self) -> dict[str, Tensor]:
        return {"waveft_spectrum": torch.zeros_like(self.waveft_spectrum)}


def place(model: nn.Module, config: WaveFTConfig, architecture: Architecture) -> list[Placement]:
    layers = {path: targets.sizes(module) for path, module in config.selected(model, architecture).items()}
    total = sum(width * out_width for width, out_width in layers.values())
    placements: list[Placement] = []
    patches: dict[Any, Patches] = {}
    for path, (width, out_width) in layers.items():
        n = targets.pattern_value(config.n_frequency_pattern, path, config.n_frequency)
        if config.proportional_parameters:
            n = max(1, round(width * out_width / total * (config.n_frequency * len(layers))))
        if message := too_many_entries(n, path, width, out_width):
            raise PeftcoreError(message)
        size = (n, width, out_width)
        patches[size] = patches.get(size) or Patches(config, *size)
        placements.append(Around(path, WaveFT(config, patches[size], width, out_width)))
    return placements + targets.trained_biases(model, config.bias, layers)


def write(model: nn.Module | None, tensors: dict[str, Tensor], fields: dict[str, Any]) -> tuple[Tensors, Fields]:
    return tensors, {**fields, "n_frequency_pattern": fields["n_frequency_pattern"] or {}}


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(peft_type="WAVEFT", write=write)
    return [Method("waveft", WaveFTConfig, place, rules, learning_rate=3e-3)]
