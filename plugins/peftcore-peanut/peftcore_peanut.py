"""PEANUT (Zhong et al. 2024, arXiv 2410.01870): y = (W + s · D) x + b, where a small network computes D from W.

    Wᵀ [in, out] --- A --- f ---.---.---.--- B --- Dᵀ [in, out]       A [r, out]; B [out, r], zero at the start
                                |   |   |                             after f, `depth` encoders f(E_i h), then `depth`
                                encoders, decoders [r, r]             decoders f(D_i h) + the matching encoder's input

D = B Hᵀ with H [in, r], so D itself is never built: y = base(x) + s · B (Hᵀ x).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

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
)

peftcore_api = ">=3.0,<4"


@dataclass(frozen=True)
class PeanutConfig(targets.LayersConfig):
    """Config with the field names of Hugging Face PEFT's `PeanutConfig`; the other fields are LoRA's.

    Args:
        depth: number of encoders and number of decoders between A and B.
        act_fn: f, by its name in transformers, such as "relu", "gelu" or "silu".
        init_weights: False: B is random too; the adapter then changes the model from the start.
    """

    r: int = 32
    depth: int = 0
    act_fn: str = "relu"
    scaling: float = 1.0
    init_weights: bool = True

    not_in_peft = frozenset({"fan_in_fan_out"})

    def __post_init__(self) -> None:
        from transformers.activations import ACT2FN  # not at module level, since it takes half a second

        super().__post_init__()
        validation.positive_whole(r=self.r)
        validation.require(self.depth >= 0, f"depth must not be negative, found {self.depth}")
        validation.one_of(sorted(ACT2FN), act_fn=self.act_fn)


class Peanut(Adapter):
    """Network that computes a linear layer's update; x `[..., in]` -> y `[..., out]`."""

    def __init__(self, config: PeanutConfig, out_width: int) -> None:
        from transformers.activations import ACT2FN

        super().__init__()
        r, self.scale, self.act = config.r, config.scaling, ACT2FN[config.act_fn]
        self.peanut_A = nn.Linear(out_width, r, bias=False)
        self.peanut_encoders = nn.ModuleList(nn.Linear(r, r, bias=False) for _ in range(config.depth))
        self.peanut_decoders = nn.ModuleList(nn.Linear(r, r, bias=False) for _ in range(config.depth))
        self.peanut_B = nn.Linear(r, out_width, bias=False)
        if config.init_weights:
            nn.init.zeros_(self.peanut_B.weight)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        h = self.hidden(base.weight()).to(x.dtype)
        return base(x) + self.scale * F.linear(x @ h, self.peanut_B.weight.to(x.dtype))

    def hidden(self, weight: Tensor) -> Tensor:
        """Return H `[in, r]` for W `[out, in]`."""
        h, skips = self.act(self.peanut_A(weight.T.to(self.peanut_A.weight))), []
        for encoder in self.peanut_encoders:
            skips.append(h)
            h = self.act(encoder(h))
        for decoder in self.peanut_decoders:
            h = self.act(decoder(h)) + skips.pop()
        return h

    @override
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.scale * (self.peanut_B.weight.float() @ self.hidden(weight).float().T), bias


def place(model: nn.Module, config: PeanutConfig, architecture: Architecture) -> list[Placement]:
    layers = config.selected(model, architecture).items()
    return [Around(path, Peanut(config, targets.sizes(layer)[1])) for path, layer in layers]


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(
        peft_type="PEANUT", peft=PeftRules(own_fields=PeanutConfig.not_in_peft, unreadable=targets.conv1d_paths)
    )
    return [Method("peanut", PeanutConfig, place, rules, learning_rate=1e-3)]
