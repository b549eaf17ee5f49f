"""LoRA for each type of layer: B A x added to the output, or B A added to the weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore import ops
from peftcore.plugin import (
    Adapter,
    Base,
    Division,
    LowRank,
    PeftcoreError,
    embed_scale,
    override,
    targets,
)
from peftcore_lora.config import LoraConfig

CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}  # by spatial dimensions


_DROPOUT: ContextVar[nn.Dropout | None] = ContextVar("peftcore_lora_dropout", default=None)


@contextmanager
def shared_dropout(probability: float) -> Iterator[None]:
    """Make all layers that are created within the block share one dropout module."""
    token = _DROPOUT.set(nn.Dropout(probability))
    try:
        yield
    finally:
        _DROPOUT.reset(token)


class Lora(Adapter):
    """Base class with the factors A and B, their scale and dropout. Subclasses apply B A."""

    multiplier = 1.0  # set by `peftcore.scale`
    dropout: nn.Dropout
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_bias: nn.Parameter | None

    def __init__(
        self,
        config: LoraConfig,
        path: str,
        a_shape: Sequence[int],
        b_shape: Sequence[int],
        groups: int = 1,
        experts: int = 1,
    ) -> None:
        super().__init__()
        r = targets.pattern_value(config.rank_pattern, path, config.r)
        alpha = targets.pattern_value(config.alpha_pattern, path, config.lora_alpha)
        self.full_scale = alpha / (math.sqrt(r) if config.use_rslora else r)
        # Dropout is a module because trainers look for nn.Dropout to turn it off. One is shared by all layers because
        # each would take 2 KB.
        self.add_module("dropout", _DROPOUT.get() or nn.Dropout(config.lora_dropout))
        self.register_parameter("lora_A", nn.Parameter(torch.empty(r * experts, *a_shape)))
        self.register_parameter("lora_B", nn.Parameter(torch.zeros(b_shape[0], r * experts // groups, *b_shape[1:])))
        if config.init_lora_weights == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / r)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.lora_bias = nn.Parameter(torch.zeros(b_shape[0])) if config.lora_bias else None
        if config.init_lora_weights is False:
            nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))
            if self.lora_bias is not None:
                nn.init.uniform_(self.lora_bias, -1 / math.sqrt(r), 1 / math.sqrt(r))

    def extra_repr(self) -> str:
        return f"r={self.lora_A.shape[0]}, scale={self.scale:g}"

    @property
    def scale(self) -> float:
        return self.full_scale * self.multiplier

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return A and B as the forward uses them; subclasses compute them from other tensors."""
        # `self.lora_A` would call `nn.Module.__getattr__`, which is slow in Python, once per layer and token.
        parameters: dict[str, Any] = self._parameters
        if "lora_A" in parameters and "lora_B" in parameters:
            return parameters["lora_A"], parameters["lora_B"]
        return self.lora_A, self.lora_B

    @override
    def low_rank(self) -> list[LowRank]:
        return [LowRank(*self.pair(), self.scale)]

    def delta(self) -> Tensor:
        """Return scale · B A in the layout of the layer's weight, fp32."""
        a, b = self.pair()
        return (self.scale * b.float()) @ a.float()

    def add_bias(self, bias: Tensor | None) -> Tensor | None:
        """Return the layer's bias plus scale · B's bias, in float32 if B has one; None if neither has."""
        if self.lora_bias is None:
            return bias
        update_bias = self.scale * self.lora_bias
        return update_bias if bias is None else bias + update_bias

    @override
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.delta(), self.add_bias(bias)


class LoraLinear(Lora):
    """LoRA of nn.Linear and transformers' Conv1D. A `[r, in]`, B `[out, r]`; x `[..., in]` -> y `[..., out]`."""

    def forward(self, base: Base, x: Tensor) -> Tensor:
        p = self.dropout.p if self.training else 0.0
        a, b = self.pair()
        operands = None if x.is_nested else base.linear_operands(x)
        if operands is not None:
            weight, bias = operands
            bias = bias if self.lora_bias is None else self.add_bias(bias)
            return ops.lora_linear(x, weight, bias, a, b, self.full_scale * self.multiplier, p)
        y, bias = base(x), self.add_bias(None)
        # Not self.dropout(x): other layers share that module, and it may be in another mode than this layer.
        x = F.dropout(x, self.dropout.p, self.training)
        s = self.scale * F.linear(x, a.to(x.dtype))  # [..., r]
        return y + F.linear(s, b.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @override
    def on_parts(self, base: Callable[[Tensor], Tensor], division: Division, x: Tensor) -> Tensor:
        y, (a, b), bias = base(x), self.pair(), self.add_bias(None)
        x = self._apply_dropout(x, division.inputs if division.input_in_parts else x.shape[-1], division)
        if division.by_rows:  # each rank has some of A's inputs, so the ranks' products are summed
            if not division.input_in_parts:
                x = division.part(x)
            s = division.summed(F.linear(x, division.part(a, 1).to(x.dtype)))
        else:
            s = F.linear(x, a.to(x.dtype))
            if division.output_in_parts:  # each rank computes its outputs
                s, b = division.shared(s), division.part(b, 0)
                bias = None if bias is None else division.part(bias)
        return y + F.linear(self.scale * s, b.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @override
    def per_sample(adapters: Sequence[LoraLinear], index: Tensor, base: Base, *args: Any, **kwargs: Any) -> Any:
        """Compute all rows in one pass over the base; NotImplemented if gradients, dropout or a bias prevent that."""
        (x,) = args
        operands = base.linear_operands(x)
        a, b = zip(*(m.pair() for m in adapters), strict=True)
        needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *a, *b))
        needs_own_pass = any((m.training and m.dropout.p) or m.lora_bias is not None for m in adapters)
        if operands is None or needs_grad or needs_own_pass:
            return NotImplemented
        weight, bias = operands
        return ops.lora_linear_per_sample(x, weight, bias, list(a), list(b), [m.scale for m in adapters], index)

    def _apply_dropout(self, x: Tensor, width: int, division: Division) -> Tensor:
        """Apply dropout to x `[..., shard]` with this rank's part of the mask for the full input `[..., width]`."""
        if x.shape[-1] == width or not (self.training and self.dropout.p):
            return F.dropout(x, self.dropout.p, self.training)
        with torch.no_grad():
            # Every rank draws the full mask, so that the mask does not depend on the number of ranks.
            mask = F.dropout(x.new_ones(*x.shape[:-1], width), self.dropout.p, True)
            mask = division.part(mask)
        return x * mask


class LowRankLinear(LoraLinear):
    """Base class for methods whose A `[r, in]` and B `[out, r]` are computed from other parameters, by `pair()`."""

    def __init__(self, scale: float = 1.0, dropout: float = 0.0) -> None:
        Adapter.__init__(self)
        self.full_scale, self.dropout, self.lora_bias = scale, nn.Dropout(dropout), None

    def pair(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}"


class LoraFromStart(LoraLinear):
    """y = W x + scale · (B A - B0 A0) x: A and B start at the frozen A0 and B0, so y starts at W x."""

    start_A: Tensor
    start_B: Tensor

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("start_A", self.lora_A.detach().clone())
        self.register_buffer("start_B", self.lora_B.detach().clone())

    def pair(self) -> tuple[Tensor, Tensor]:
        return torch.cat([self.lora_A, self.start_A]), torch.cat([self.lora_B, -self.start_B], dim=1)


class LoraFrozenB(LoraLinear):
    """LoRA with frozen B; only A is trained."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        b = self.lora_B.detach()
        del self.lora_B
        self.register_buffer("lora_B", b)


class LoraConv(Lora):
    """LoRA of nn.Conv1d, 2d and 3d: A is a convolution with the layer's kernel to r channels, B a 1x1 convolution."""

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y = base(x)
        x = F.dropout(x, self.dropout.p, self.training)
        s = base.module._conv_forward(x, self.lora_A.to(x.dtype), None)  # with the layer's stride, padding and dilation
        return self.add_update(y, s)

    def add_update(self, y: Tensor, s: Tensor, groups: int = 1) -> Tensor:
        """Return y + scale · (B s + B's bias), for s `[batch, r, ...]`."""
        convolve, bias = CONVOLUTIONS[s.dim() - 2], self.add_bias(None)
        y = y + self.scale * convolve(s, self.lora_B.to(s.dtype), groups=groups)
        return y if bias is None else y + bias.to(s.dtype).view(-1, *(1 for _ in s.shape[2:]))

    def delta(self) -> Tensor:
        return self.scale * torch.einsum("or,ri...->oi...", self.lora_B.flatten(1).float(), self.lora_A.float())


class LoraGroupedConv(LoraConv):
    """LoRA of a convolution with g groups: A `[r, in, ...]` has no groups, B `[out, r / g, 1...]` has g.

    This is PEFT's definition. B A connects every input to every output, which a grouped weight cannot represent.
    """

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y, layer = base(x), base.module
        x = F.dropout(x, self.dropout.p, self.training)
        convolve = CONVOLUTIONS[self.lora_A.dim() - 2]
        s = convolve(x, self.lora_A.to(x.dtype), None, layer.stride, layer.padding)
        return self.add_update(y, s, layer.groups)

    @override
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise PeftcoreError(
            f"LoRA of a grouped convolution (weight {list(weight.shape)}) connects all groups, so it cannot be merged "
            "(nor can it in PEFT). Keep the adapter unmerged, or apply it with that layer in exclude_modules"
        )


class LoraEmbedding(Lora):
    """LoRA of nn.Embedding: A `[r, vocabulary]` is looked up, B `[dim, r]` maps to the embedding.

    Embeddings that multiply their output by `embed_scale` (Gemma, BART) also multiply B A by it.
    """

    def forward(self, base: Base, tokens: Tensor) -> Tensor:
        y, scale = base(tokens), embed_scale(base.module)
        if tokens.is_floating_point():  # Ovis passes probabilities over the vocabulary instead of token ids
            s = F.linear(tokens, self.lora_A.to(tokens.dtype)).to(self.lora_B.dtype)
        else:
            s = F.embedding(tokens, self.lora_A.T, base.module.padding_idx)  # [..., r]
        return y + (self.scale * F.linear(s, self.lora_B) * scale).to(y.dtype)

    def delta(self) -> Tensor:
        return super().delta().T  # [vocabulary, dim]

    @override
    def low_rank(self) -> list[LowRank]:
        return [LowRank(self.lora_A, self.lora_B, self.scale, transposed=True)]


class LoraOnWeight(Lora):
    """LoRA of layers that compute more than W x: their own forward runs with W + scale · B A. There is no dropout."""

    per_sample = staticmethod(Adapter.per_sample)

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        changes: dict[str, Any] = {"weight": self.add_delta}
        if self.lora_bias is not None:
            changes["bias"] = lambda bias: (bias + self.add_bias(None)).to(bias.dtype)
        return base.on_weights(changes)(*args, **kwargs)

    def add_delta(self, weight: Tensor) -> Tensor:
        return weight + self.delta().to(weight.dtype)


class LoraLinearOnWeight(LoraOnWeight, LoraLinear):
    """LoRA of linear layers with a custom forward, such as routers that return indices, and grouped products."""


class LoraConvOnWeight(LoraOnWeight, LoraConv):
    """LoRA of a convolution whose own forward pads or transposes the input."""


class LoraAttention(LoraOnWeight):
    """LoRA of nn.MultiheadAttention: A `[r, E]`, B `[3 E, r]` for `in_proj_weight`, and another pair for `out_proj`.

    PEFT adds scale · B A to `out_proj` twice (see `KNOWN_PEFT` in files.py), and its files are trained that way, so
    peftcore does the same.
    """

    def __init__(self, config: LoraConfig, path: str, width: int) -> None:
        super().__init__(config, path, [width], [3 * width])
        self.out_proj = LoraOnWeight(config, path, [width], [width])
        self.out_proj.full_scale *= 2

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        changes = {"in_proj_weight": self.add_delta, "out_proj.weight": self.out_proj.add_delta}
        return base.on_weights(changes)(*args, **kwargs)

    @override
    def low_rank(self) -> list[LowRank]:
        return [*super().low_rank(), *self.out_proj.low_rank()]

    @override
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + torch.cat([self.delta(), self.out_proj.delta()]), bias  # [4 E, E]
