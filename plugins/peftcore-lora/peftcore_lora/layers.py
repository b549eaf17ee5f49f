"""LoRA for each kind of layer: B A added to the output, or to the weight."""

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
def one_dropout(probability: float) -> Iterator[None]:
    """Let all layers created within the block share one dropout module."""
    token = _DROPOUT.set(nn.Dropout(probability))
    try:
        yield
    finally:
        _DROPOUT.reset(token)


class Lora(Adapter):
    """Base of LoRA's layers: two factors, their scale and dropout. Subclasses apply B A."""

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
        # A module, since trainers look for modules when they turn dropout off. All layers share it, since it takes 2
        # KB.
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
        """Return the A and B to compute with."""
        # avoids `nn.Module.__getattr__`, which would run once per layer and token
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

    def with_bias(self, bias: Tensor | None) -> Tensor | None:
        """Return the layer's bias plus B's, which is in float32 if there is one."""
        if self.lora_bias is None:
            return bias
        own = self.scale * self.lora_bias
        return own if bias is None else bias + own

    @override
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.delta(), self.with_bias(bias)


class LoraLinear(Lora):
    """LoRA of nn.Linear and transformers' Conv1D. A `[r, in]`, B `[out, r]`; x `[..., in]` -> y `[..., out]`."""

    def forward(self, base: Base, x: Tensor) -> Tensor:
        p = self.dropout.p if self.training else 0.0
        operands, (a, b) = None if x.is_nested else base.linear_operands(x), self.pair()
        if operands is not None:
            weight, bias = operands
            bias = bias if self.lora_bias is None else self.with_bias(bias)
            return ops.lora_linear(x, weight, bias, a, b, self.full_scale * self.multiplier, p)
        y, bias = base(x), self.with_bias(None)
        x = F.dropout(x, self.dropout.p, self.training)  # other layers share the module and may be in another mode
        s = self.scale * F.linear(x, a.to(x.dtype))  # [..., r]
        return y + F.linear(s, b.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @override
    def on_parts(self, base: Callable[[Tensor], Tensor], division: Division, x: Tensor) -> Tensor:
        y, (a, b), bias = base(x), self.pair(), self.with_bias(None)
        x = self._dropped(x, division.inputs if division.input_in_parts else x.shape[-1], division)
        if division.by_rows:  # A's inputs are divided: the ranks' products are summed
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
        """Return all rows' outputs in one pass over the base; NotImplemented where gradients are needed."""
        (x,) = args
        operands, (a, b) = base.linear_operands(x), zip(*(m.pair() for m in adapters), strict=True)
        trains = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *a, *b))
        apart = any((m.training and m.dropout.p) or m.lora_bias is not None for m in adapters)
        if operands is None or trains or apart:
            return NotImplemented
        weight, bias = operands
        return ops.lora_linear_per_sample(x, weight, bias, list(a), list(b), [m.scale for m in adapters], index)

    def _dropped(self, x: Tensor, width: int, division: Division) -> Tensor:
        """Return x after dropout with the mask that the whole input, `width` wide, would get on every rank."""
        if x.shape[-1] == width or not (self.training and self.dropout.p):
            return F.dropout(x, self.dropout.p, self.training)
        with torch.no_grad():
            mask = F.dropout(x.new_ones(*x.shape[:-1], width), self.dropout.p, True)
            mask = division.part(mask)
        return x * mask


class LowRankLinear(LoraLinear):
    """Change of a linear layer that is a low-rank product of other parameters, as a base for other methods.

    Subclasses have their own parameters, and `pair()` computes A `[r, in]` and B `[out, r]` from them.
    """

    def __init__(self, scale: float = 1.0, dropout: float = 0.0) -> None:
        Adapter.__init__(self)
        self.full_scale, self.dropout, self.lora_bias = scale, nn.Dropout(dropout), None

    def pair(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}"


class LoraFromStart(LoraLinear):
    """y = W x + scale · (B A - B0 A0) x: A and B start at the frozen A0 and B0, so the start is the base."""

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
    """LoRA of nn.Conv1d, 2d and 3d: A convolves with the layer's kernel to r channels, B mixes them pointwise."""

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y = base(x)
        x = F.dropout(x, self.dropout.p, self.training)  # other layers share the module and may be in another mode
        s = base.module._conv_forward(x, self.lora_A.to(x.dtype), None)  # with the layer's stride, padding and dilation
        return self.mixed(y, s)

    def mixed(self, y: Tensor, s: Tensor, groups: int = 1) -> Tensor:
        """Return y + scale · (B s + its bias)."""
        mix, bias = CONVOLUTIONS[s.dim() - 2], self.with_bias(None)
        y = y + self.scale * mix(s, self.lora_B.to(s.dtype), groups=groups)
        return y if bias is None else y + bias.to(s.dtype).view(-1, *(1 for _ in s.shape[2:]))

    def delta(self) -> Tensor:
        return self.scale * torch.einsum("or,ri...->oi...", self.lora_B.flatten(1).float(), self.lora_A.float())


class LoraGroupedConv(LoraConv):
    """LoRA with g groups: A `[r, in, ...]` reads all channels, B `[out, r / g, 1...]` mixes r / g of them per group.

    This is PEFT's definition. B A connects every input to every output, which a weight in groups cannot represent.
    """

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y, layer = base(x), base.module
        x = F.dropout(x, self.dropout.p, self.training)  # other layers share the module and may be in another mode
        convolve = CONVOLUTIONS[self.lora_A.dim() - 2]
        s = convolve(x, self.lora_A.to(x.dtype), None, layer.stride, layer.padding)
        return self.mixed(y, s, layer.groups)

    @override
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise PeftcoreError(
            f"LoRA of a convolution in groups (weight {list(weight.shape)}) reaches across the groups, so it cannot be "
            "merged (in PEFT neither). Keep the adapter unmerged, or apply it with that layer in exclude_modules"
        )


class LoraEmbedding(Lora):
    """LoRA of nn.Embedding: A `[r, vocabulary]` is looked up, B `[dim, r]` maps to the embedding.

    Subclasses that multiply their output by `embed_scale` (Gemma, BART) multiply B A, too.
    """

    def forward(self, base: Base, tokens: Tensor) -> Tensor:
        y, scale = base(tokens), embed_scale(base.module)
        if tokens.is_floating_point():  # mixtures of entries, as in Ovis
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
    """LoRA of layers that do more than a product: their forward reads W + scale · B A. It has no dropout."""

    per_sample = staticmethod(Adapter.per_sample)

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        changes: dict[str, Any] = {"weight": self.changed}
        if self.lora_bias is not None:
            changes["bias"] = lambda bias: (bias + self.with_bias(None)).to(bias.dtype)
        return base.on_weights(changes)(*args, **kwargs)

    def changed(self, weight: Tensor) -> Tensor:
        return weight + self.delta().to(weight.dtype)


class LoraLinearOnWeight(LoraOnWeight, LoraLinear):
    """LoRA of routers, which return a choice with their logits, and of products in groups."""


class LoraConvOnWeight(LoraOnWeight, LoraConv):
    """LoRA of a convolution that pads or transposes its input itself."""


class LoraAttention(LoraOnWeight):
    """LoRA of nn.MultiheadAttention: A `[r, E]`, B `[3 E, r]` for `in_proj_weight`, and another pair for `out_proj`.

    PEFT adds scale · B A to `out_proj` twice (see `KNOWN_PEFT` in files.py). Files assume that, so it is done here,
    too.
    """

    def __init__(self, config: LoraConfig, path: str, width: int) -> None:
        super().__init__(config, path, [width], [3 * width])
        self.out_proj = LoraOnWeight(config, path, [width], [width])
        self.out_proj.full_scale *= 2

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        changes = {"in_proj_weight": self.changed, "out_proj.weight": self.out_proj.changed}
        return base.on_weights(changes)(*args, **kwargs)

    @override
    def low_rank(self) -> list[LowRank]:
        return [*super().low_rank(), *self.out_proj.low_rank()]

    @override
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + torch.cat([self.delta(), self.out_proj.delta()]), bias  # [4 E, E]
