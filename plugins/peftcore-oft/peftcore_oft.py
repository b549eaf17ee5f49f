"""OFT (Qiu et al. 2023, arXiv 2306.07280; OFTv2, 2025, arXiv 2506.19847): y = W (R x), where R rotates blocks of x.

      x [in] in blocks of b:  .--R1--. .--R2--. .--R3--.      Rotations keep the angles between the rows of W. Each Rᵢ
      x Wᵀ + bias             |______| |______| |______|      is the Cayley transform of a skew-symmetric Q:

    R - 1 = -2 Q (1 + Q)⁻¹                                exact, with use_cayley_neumann=False
    R - 1 = 2 Q + 2 Q² + ... + 2 Qⁿ⁻² + Qⁿ⁻¹              default: the first n terms of the Neumann series, with -Q in
                                                          place of Q (for n = 3 PEFT uses 4 terms)

The upper triangle of each block's Q is trained and starts at zero. In 16 bits (R - 1) x is added to x, so that small
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
    """Config with the field names of Hugging Face PEFT's `OFTConfig`; the other fields select layers.

    Args:
        r, oft_block_size: number or size of the blocks of x. One is 0 and computed from the other. A value that does
            not divide a layer's inputs is replaced by the nearest divisor, as in PEFT, with a warning.
        module_dropout: share of the blocks left unrotated in a training step. (PEFT 0.21 ignores it.)
        coft, eps: limit the norm of each block's Q to eps / √blocks.
        block_share: use one rotation for all blocks.
        use_cayley_neumann, num_cayley_neumann_terms: use the Neumann series, and its number of terms.
        bias: biases to train as well: "none", "all", or "oft_only" (of adapted modules).
        init_weights: False: random rotations; the adapter then changes the model from the start.
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
        values = f"found r={self.r}, oft_block_size={self.oft_block_size}"
        exactly_one = min(self.r, self.oft_block_size) == 0 < max(self.r, self.oft_block_size)
        validation.require(exactly_one, f"one of r and oft_block_size must be 0 and the other positive, {values}")
        validation.probability(module_dropout=self.module_dropout)
        validation.require(self.eps > 0, f"eps must be positive, found {self.eps}")
        message = f"num_cayley_neumann_terms={self.num_cayley_neumann_terms} rotates nothing. Use 2 or more"
        validation.require(self.num_cayley_neumann_terms > 1, message)

    def misfit(self, path: str, module: nn.Module) -> str | None:
        if not isinstance(module, nn.Conv2d) or math.prod(module.kernel_size) == 1:
            return None
        return (
            f"'{path}' is a convolution with kernel_size={module.kernel_size}, whose rotated patches PEFT puts back in "
            f"a different order, which no weight can reproduce. Leave it out: exclude_modules=['{path}']"
        )


class Rotation(nn.Module):
    """Rotates blocks of x `[..., in]` by `weight` `[blocks, b (b - 1) / 2]`, a single row with `block_share`."""

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
        # Q has each number twice, so its norm is √2 times the norm of w.
        norms = 2**0.5 * torch.linalg.vector_norm(w, dim=1, keepdim=True)
        return self.weight + (w * (limit / norms.clamp(min=limit)) - w)

    def deltas(self) -> Tensor:
        """Return R - 1 of each block, fp32 `[blocks, b, b]`."""
        q = skew((self.within_eps() if self.config.coft else self.weight).float(), self.block_size)
        return neumann(q, self.config.num_cayley_neumann_terms) if self.config.use_cayley_neumann else cayley(q)

    def forward(self, x: Tensor) -> Tensor:
        deltas = self.deltas()
        if self.training and self.config.module_dropout and len(deltas) > 1:
            mask = torch.randperm(len(deltas), device=x.device) < int(self.config.module_dropout * len(deltas))
            deltas = deltas * ~mask[:, None, None]
        deltas = deltas.to(x.dtype)
        if x.dtype in (torch.float32, torch.float64):
            return rotate_blocks(x, deltas + torch.eye(self.block_size, device=x.device, dtype=x.dtype))
        # A 16-bit R would round small rotations away.
        return x + rotate_blocks(x, deltas)


class OFT(Adapter):
    """Rotation `oft_R` of the inputs of a linear layer."""

    def __init__(self, config: OFTConfig, blocks: int, block_size: int) -> None:
        super().__init__()
        self.oft_R = Rotation(config, blocks, block_size)

    def forward(self, base: Base, x: Tensor) -> Any:
        return base(self.oft_R(x))

    @override
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + rotate_blocks(weight, self.oft_R.deltas().transpose(1, 2)), bias


class OFTConv(OFT):
    """Rotation of each pixel's channels, across groups, for a convolution with kernel size 1."""

    def forward(self, base: Base, x: Tensor) -> Any:
        return base(self.oft_R(x.movedim(-3, -1)).movedim(-1, -3))

    @override
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if weight.shape[1] != self.oft_R.width:
            raise PeftcoreError(
                f"OFT rotates channels across the groups of a convolution (weight {list(weight.shape)}), which cannot "
                "be merged, also not in PEFT. Keep the adapter unmerged, or apply it with that layer in exclude_modules"
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
        return weight + rotate_blocks(weight, self.oft_embedding_R.deltas()), bias


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
    """Return R - 1 for R = (1 + Q) (1 - Q)⁻¹ = 1 + 2 Q + 2 Q² + ..., from the first terms of this series."""
    if terms == 2:
        return 2 * q
    delta: Tensor = Series.apply(q, max(terms - 2, 2))  # type: ignore[no-untyped-call]
    return delta


class Series(torch.autograd.Function):
    """The last of `horner`'s steps; saves only Q for the backward pass, which computes the steps again."""

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


def rotate_blocks(x: Tensor, matrices: Tensor) -> Tensor:
    """Multiply each block of x `[..., in]` by its matrix of `[blocks, b, b]`; a single matrix serves all blocks."""
    x = x.unflatten(-1, (-1, matrices.shape[-1]))
    if len(matrices) == 1:
        return (x @ matrices[0]).flatten(-2)
    return torch.einsum("...rk,rkc->...rc", x, matrices).flatten(-2)


def nearest_divisor(size: int, requested: int) -> int:
    """Return the divisor of `size` nearest to `requested`; of two equally near, the smaller."""
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    return min(divisors, key=lambda d: (abs(d - requested), d))


def place(model: nn.Module, config: OFTConfig, architecture: Architecture) -> list[Placement]:
    layers = config.selected(model, architecture)
    widths = {path: rotated_width(module) for path, module in layers.items()}
    field, value = ("r", config.r) if config.r else ("oft_block_size", config.oft_block_size)
    divisors = {width: nearest_divisor(width, value) for width in sorted(set(widths.values()))}
    replaced = {width: divisor for width, divisor in divisors.items() if divisor != value}
    if replaced:
        substitutes = ", ".join(f"{divisor} for {width} inputs" for width, divisor in replaced.items())
        warn(f"{field}={value} does not divide the inputs of all layers. Used instead: {substitutes}")
    placements: list[Placement] = []
    for path, width in widths.items():
        divisor, quotient = divisors[width], width // divisors[width]
        blocks, block_size = (divisor, quotient) if config.r else (quotient, divisor)
        placements.append(Around(path, adapter_class(layers[path])(config, blocks, block_size)))
    return placements + targets.trained_biases(model, config.bias, widths)


def rotated_width(module: nn.Module) -> int:
    """Return the width of the vectors that are rotated: channels, outputs of an embedding, inputs of a linear layer."""
    if isinstance(module, nn.Conv2d):
        return module.in_channels
    return targets.sizes(module)[1 if isinstance(module, nn.Embedding) else 0]


def adapter_class(module: nn.Module) -> type[OFT | OFTEmbedding]:
    if isinstance(module, nn.Embedding):
        return OFTEmbedding
    return OFTConv if isinstance(module, nn.Conv2d) else OFT


@torch.no_grad()
def after_step(adapters: Mapping[str, Any], config: OFTConfig, step: int, total_steps: int) -> None:
    """Store the limited weights of COFT, so that the optimizer continues from them."""
    for adapter in adapters.values() if config.coft else ():
        (rotation,) = adapter.children()
        rotation.weight.copy_(rotation.within_eps())


def read(model: nn.Module | None, tensors: dict[str, Tensor], fields: dict[str, Any]) -> tuple[Tensors, Fields]:
    """Refuse files of PEFT before 0.14, whose blocks are different."""
    if "oft_block_size" not in fields:
        raise PeftcoreError("this OFT was saved by PEFT before 0.14, which used different blocks. Train it again")
    return tensors, fields


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(peft_type="OFT", read=read, peft=PeftRules(unreadable=targets.conv1d_paths))
    hooks: dict[str, Any] = {"after_step": after_step, "needs_after_step": lambda config: config.coft}
    return [Method("oft", OFTConfig, place, rules, **hooks, learning_rate=1e-3)]
