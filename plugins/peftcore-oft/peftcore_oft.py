"""OFT (Qiu et al. 2023, arXiv 2306.07280; 2025, OFTv2, arXiv 2506.19847): y = W (R x), with blocks of x rotated.

      x [in] in blocks of b:  .--R1--. .--R2--. .--R3--.      W keeps the angles between its rows, since each R is a
      x Wᵀ + bias             |______| |______| |______|      rotation, the Cayley transform of a skew-symmetric Q:

    R - 1 = -2 Q (1 + Q)⁻¹                                exactly, or by default for -Q, by a Neumann series
    R - 1 = 2 Q + 2 Q² + ... + 2 Qⁿ⁻² + Qⁿ⁻¹              of n terms (for n = 3 PEFT uses 4)

Trained: the upper triangle of each block's Q, zero at the start. In 16 bits (R - 1) x is added to x, so that small
rotations are not rounded away. COFT keeps Q within eps of zero. For an embedding the outputs are rotated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peftcore.plugin import (
    Adapter,
    Architecture,
    Around,
    Base,
    Fields,
    Method,
    PeftcoreError,
    PeftRules,
    Placement,
    StateRules,
    Tensors,
    hookimpl,
    override,
    targets,
    validation,
    warn,
)

peftcore_api = ">=3.0,<4"


@dataclass(frozen=True)
class OFTConfig(targets.LayersConfig):
    """Config with the field names of Hugging Face PEFT's `OFTConfig`; fields not listed choose layers.

    Args:
        r, oft_block_size: number or size of the blocks of x; exactly one is 0 and is computed from the other. A value
            that does not divide a layer's inputs is replaced by the nearest divisor, as in PEFT, with a warning.
        module_dropout: share of the blocks left unrotated in a training step. (PEFT 0.21 ignores it.)
        coft, eps: limit the norm of each block's Q to eps / √blocks. block_share: one rotation for all blocks.
        use_cayley_neumann, num_cayley_neumann_terms: use the series, and its number of terms.
        bias: biases that are also trained: "none", "all", or "oft_only" (of adapted modules).
        init_weights: False: random rotations, so the adapter changes the model from the start.
    """

    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    bias: Literal["none", "all", "oft_only"] = "none"
    init_weights: bool = True
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    kinds = nn.Conv2d, nn.Embedding

    def __post_init__(self) -> None:
        super().__post_init__()
        found = f"found r={self.r}, oft_block_size={self.oft_block_size}"
        one = min(self.r, self.oft_block_size) == 0 < max(self.r, self.oft_block_size)
        validation.require(one, f"one of r and oft_block_size must be 0, and the other above 0, {found}")
        validation.probability(module_dropout=self.module_dropout)
        validation.require(self.eps > 0, f"eps must be above 0, found {self.eps}")
        least = f"num_cayley_neumann_terms={self.num_cayley_neumann_terms} rotates nothing. Use 2 or more"
        validation.require(self.num_cayley_neumann_terms > 1, least)

    def misfit(self, path: str, module: nn.Module) -> str | None:
        if not isinstance(module, nn.Conv2d) or math.prod(module.kernel_size) == 1:
            return None
        return (
            f"'{path}' is a convolution with kernel_size={module.kernel_size}, where PEFT puts rotated patches back in "
            f"another order, which no weight can reproduce. Leave it out: exclude_modules=['{path}']"
        )


class Rotation(nn.Module):
    """Rotation of blocks `weight` `[blocks, b (b - 1) / 2]`, one row with `block_share`; x `[..., in]` -> rotated x."""

    def __init__(self, config: OFTConfig, blocks: int, block_size: int) -> None:
        super().__init__()
        self.config, self.block_size, self.width = config, block_size, blocks * block_size
        self.weight = nn.Parameter(torch.zeros(1 if config.block_share else blocks, block_size * (block_size - 1) // 2))
        if not config.init_weights:
            nn.init.normal_(self.weight, std=0.1)

    def within_eps(self) -> Tensor:
        """Return `weight` limited to eps for COFT; the gradient passes through unchanged."""
        limit = self.config.eps / len(self.weight) ** 0.5
        w = self.weight.detach()
        norms = 2**0.5 * torch.linalg.vector_norm(w, dim=1, keepdim=True)  # norm of Q, which contains each number twice
        return self.weight + (w * (limit / norms.clamp(min=limit)) - w)

    def turns(self) -> Tensor:
        """Return R - 1 of each block, fp32 `[blocks, b, b]`."""
        q = skew((self.within_eps() if self.config.coft else self.weight).float(), self.block_size)
        return neumann(q, self.config.num_cayley_neumann_terms) if self.config.use_cayley_neumann else cayley(q)

    def forward(self, x: Tensor) -> Tensor:
        turns = self.turns()
        if self.training and self.config.module_dropout and len(turns) > 1:
            dropped = torch.randperm(len(turns), device=x.device) < int(self.config.module_dropout * len(turns))
            turns = turns * ~dropped[:, None, None]
        turns = turns.to(x.dtype)
        if x.dtype in (torch.float32, torch.float64):  # R itself is exact enough
            return turned(x, turns + torch.eye(self.block_size, device=x.device, dtype=x.dtype))
        return x + turned(x, turns)


class OFT(Adapter):
    """Rotation `oft_R` of the inputs of a linear layer."""

    def __init__(self, config: OFTConfig, blocks: int, block_size: int) -> None:
        super().__init__()
        self.oft_R = Rotation(config, blocks, block_size)

    def forward(self, base: Base, x: Tensor) -> Any:
        return base(self.oft_R(x))

    @override
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + turned(weight, self.oft_R.turns().transpose(1, 2)), bias


class OFTConv(OFT):
    """Rotation of the channels of each pixel, of all groups, for a convolution with kernel size 1."""

    def forward(self, base: Base, x: Tensor) -> Any:
        return base(self.oft_R(x.movedim(-3, -1)).movedim(-1, -3))

    @override
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if weight.shape[1] != self.oft_R.width:
            raise PeftcoreError(
                f"OFT of a convolution in groups (weight {list(weight.shape)}) reaches across the groups, so it cannot "
                "be merged (in PEFT neither). Keep the adapter unmerged, or apply it with that layer in exclude_modules"
            )
        return super().merged(weight.flatten(1), bias)[0].view_as(weight), bias


class OFTEmbedding(Adapter):
    """Rotation `oft_embedding_R` of the outputs of an embedding."""

    def __init__(self, config: OFTConfig, blocks: int, block_size: int) -> None:
        super().__init__()
        self.oft_embedding_R = Rotation(config, blocks, block_size)

    def forward(self, base: Base, tokens: Tensor) -> Any:
        return self.oft_embedding_R(base(tokens))

    @override
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + turned(weight, self.oft_embedding_R.turns()), bias


def skew(upper: Tensor, size: int) -> Tensor:
    """Return the skew-symmetric matrices `[..., size, size]` with these numbers above the diagonal, row by row."""
    rows, columns = torch.triu_indices(size, size, 1, device=upper.device).unbind()
    q = upper.new_zeros(*upper.shape[:-1], size * size).index_copy(-1, rows * size + columns, upper)
    q = q.unflatten(-1, (size, size))
    return q - q.transpose(-1, -2)


def cayley(q: Tensor) -> Tensor:
    """Return R - 1 for R = (1 - Q) (1 + Q)⁻¹ and skew-symmetric Q."""
    return torch.linalg.solve(torch.eye(q.shape[-1], device=q.device, dtype=q.dtype) + q, -2 * q, left=False)


def neumann(q: Tensor, terms: int) -> Tensor:
    """Return R - 1 for R = (1 + Q) (1 - Q)⁻¹, from the first terms of its series."""
    if terms == 2:
        return 2 * q
    turns: Tensor = Series.apply(q, max(terms - 2, 2))  # type: ignore[no-untyped-call]
    return turns


class Series(torch.autograd.Function):
    """Result of the last of Horner's steps; saves only Q for the backward pass."""

    @staticmethod
    def forward(q: Tensor, count: int) -> Tensor:
        return horner(q, count)[-1]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.count = inputs[1]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (q,) = ctx.saved_tensors
        dq = torch.zeros_like(q)
        for r in reversed(horner(q, ctx.count - 1)):
            dq, dy = dq + 2 * dy + dy @ r.transpose(-1, -2), q.transpose(-1, -2) @ dy
        return dq + dy, None


def horner(q: Tensor, count: int) -> list[Tensor]:
    """Return r₀ = Q and `count` steps rₖ₊₁ = 2 Q + Q rₖ."""
    steps = [q]
    for _ in range(count):
        steps.append(2 * q + q @ steps[-1])
    return steps


def turned(x: Tensor, matrices: Tensor) -> Tensor:
    """Return x `[..., in]` with each block multiplied by its matrix of `[blocks, b, b]`, or by the only one."""
    x = x.unflatten(-1, (-1, matrices.shape[-1]))
    return (x @ matrices[0] if len(matrices) == 1 else torch.einsum("...rk,rkc->...rc", x, matrices)).flatten(-2)


def nearest_divisor(size: int, wanted: int) -> int:
    """Return the divisor of `size` nearest to `wanted`, the lower of two."""
    return min((d for d in range(1, size + 1) if size % d == 0), key=lambda d: (abs(d - wanted), d))


def place(model: nn.Module, config: OFTConfig, architecture: Architecture) -> list[Placement]:
    layers = config.selected(model, architecture)
    widths = {path: turned_width(module) for path, module in layers.items()}
    given = config.r or config.oft_block_size
    divisors = {width: nearest_divisor(width, given) for width in sorted(set(widths.values()))}
    if any(divisor != given for divisor in divisors.values()):
        what = "r" if config.r else "oft_block_size"
        others = ", ".join(f"{d} of {width} inputs" for width, d in divisors.items() if d != given)
        warn(f"{what}={given} does not divide all layers' inputs. Used instead: {others}")
    placed: list[Placement] = []
    for path, width in widths.items():
        other = width // divisors[width]
        blocks, block_size = (divisors[width], other) if config.r else (other, divisors[width])
        placed.append(Around(path, kind_for(layers[path])(config, blocks, block_size)))
    return placed + targets.trained_biases(model, config.bias, widths)


def turned_width(module: nn.Module) -> int:
    """Return how many numbers are rotated together."""
    if isinstance(module, nn.Conv2d):
        return module.in_channels
    return targets.sizes(module)[1 if isinstance(module, nn.Embedding) else 0]


def kind_for(module: nn.Module) -> type[OFT | OFTEmbedding]:
    return OFTEmbedding if isinstance(module, nn.Embedding) else OFTConv if isinstance(module, nn.Conv2d) else OFT


@torch.no_grad()
def after_step(adapters: Mapping[str, Any], config: OFTConfig, step: int, total_steps: int) -> None:
    """Store COFT's limited weights, so that training continues from them."""
    for adapter in adapters.values() if config.coft else ():
        (rotation,) = adapter.children()
        rotation.weight.copy_(rotation.within_eps())


def read(model: nn.Module | None, tensors: dict[str, Tensor], fields: dict[str, Any]) -> tuple[Tensors, Fields]:
    """Refuse files of PEFT before 0.14, whose blocks are different."""
    if "oft_block_size" not in fields:
        raise PeftcoreError("it is an OFT of PEFT before 0.14, whose blocks are different. Train it again")
    return tensors, fields


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(peft_type="OFT", read=read, peft=PeftRules(unreadable=targets.conv1d_paths))
    hooks: dict[str, Any] = {"after_step": after_step, "needs_after_step": lambda config: config.coft}
    return [Method("oft", OFTConfig, place, rules, **hooks, learning_rate=1e-3)]
