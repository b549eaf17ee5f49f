"""AdaLoRA (Zhang et al. 2023, arXiv 2303.10512): y = W x + scale · B diag(E) A x, with one rank budget for all layers.

triplet i of a layer: row i of A, entry i of E, column i of B       scale = lora_alpha / init_r
importance            s(E_i) + mean s(A_i) + mean s(B_i),  s = sensitivity · uncertainty, both smoothed  (eq. 8-10)
budget                init_r per layer until step tinit, then a cubic decay to target_r at step total_step - tfinal
loss                  plus orth_reg_weight times the mean of |A Aᵀ - 1| and |Bᵀ B - 1|  (eq. 4)

For a convolution W is the matrix [out, in · k], with k numbers in a kernel.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peftcore_lora.layers import LoraLinear
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
    targets,
    tensor_name,
    validation,
)

peftcore_api = ">=3.0,<4"


@dataclass(frozen=True)
class AdaLoraConfig(targets.LayersConfig):
    """Config with the field names of Hugging Face PEFT's `AdaLoraConfig`; the other fields are LoRA's.

    Args:
        target_r, init_r: average number of triplets per layer at the end, and number at the start. If a file has
            target_r above init_r, which PEFT's defaults allow, all triplets are kept.
        tinit, tfinal, deltaT: steps before the schedule, after it, and between two allocations.
        beta1, beta2: decay of the moving averages of sensitivity and uncertainty.
        orth_reg_weight: weight of the orthogonality term in the loss.
        total_step: number of training steps. None: taken from the trainer.
        rank_pattern: in PEFT's files, a mask of the remaining triplets for each name of an E.
    """

    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: dict[str, list[bool]] | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    init_lora_weights: bool = True
    bias: Literal["none", "all", "lora_only"] = "none"

    kinds = (nn.Conv2d,)

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.positive_whole(target_r=self.target_r, init_r=self.init_r, deltaT=self.deltaT)
        validation.probability(lora_dropout=self.lora_dropout)

    def misfit(self, path: str, module: nn.Module) -> str | None:
        return targets.odd_convolution(path, module, grouped=False)


class AdaLora(LoraLinear):
    """A `[r, in]`, E `[r, 1]` and B `[out, r]` of a linear layer, and the statistics behind their importance."""

    def __init__(self, config: AdaLoraConfig, r: int, width: int, out_width: int) -> None:
        # LoraLinear.__init__ would create factors that are replaced below.
        nn.Module.__init__(self)
        self.full_scale = (config.lora_alpha if config.lora_alpha > 0 else config.init_r) / (config.init_r + 1e-5)
        self.dropout, self.lora_bias = nn.Dropout(config.lora_dropout), None
        std, init_e = (0.02, torch.zeros) if config.init_lora_weights else (1.0, torch.randn)
        self.lora_A = nn.Parameter(std * torch.randn(r, width))
        self.lora_B = nn.Parameter(std * torch.randn(out_width, r))
        self.lora_E = nn.Parameter(init_e(r, 1))
        self.register_buffer("seen", torch.zeros(2, r, width + out_width + 1))  # one row per triplet
        self.register_buffer("left", torch.ones(r, 1))

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.lora_A * self.lora_E, self.lora_B

    def observe(self, config: AdaLoraConfig) -> None:
        """Update the moving averages of sensitivity |p · dp| and of uncertainty, for each entry of A, B and E."""
        # A layer that was not called in this step has no gradient.
        a, b, e = (p * (0 if p.grad is None else p.grad) for p in self.parameters())
        sensitivity = torch.cat([a, b.T, e], dim=1).abs()
        mean, uncertainty = self.get_buffer("seen")
        mean.mul_(config.beta1).add_(sensitivity, alpha=1 - config.beta1)
        uncertainty.mul_(config.beta2).add_((sensitivity - mean).abs(), alpha=1 - config.beta2)

    def importance(self) -> Tensor:
        """Return the importance of each triplet, `[r]`."""
        widths = [self.lora_A.shape[1], self.lora_B.shape[0], 1]
        return sum(statistic.mean(1) for statistic in self.get_buffer("seen").prod(0).split(widths, dim=1))


class AdaLoraConv(AdaLora):
    """AdaLoRA of a convolution: A `[r, in · k]`."""

    per_sample = staticmethod(Adapter.per_sample)  # LoRA's version only handles linear layers

    def __init__(self, config: AdaLoraConfig, r: int, layer: nn.Conv2d) -> None:
        super().__init__(config, r, *targets.sizes(layer))
        self.shape = layer.weight.shape

    def delta(self) -> Tensor:
        return super().delta().view(self.shape)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        inputs = F.dropout(x, self.dropout.p, self.training)
        y: Tensor = base(x) + base.module._conv_forward(inputs, self.delta().to(x.dtype), None)
        return y


def place(model: nn.Module, config: AdaLoraConfig, architecture: Architecture) -> list[Placement]:
    ranks = {name.partition(".lora_E")[0]: sum(mask) for name, mask in (config.rank_pattern or {}).items()}
    layers = config.selected(model, architecture)
    placements = [Around(p, adapter_for(config, ranks.get(p, config.init_r), module)) for p, module in layers.items()]
    return [*placements, *targets.trained_biases(model, config.bias, layers)]


def adapter_for(config: AdaLoraConfig, r: int, module: nn.Module) -> AdaLora:
    if isinstance(module, nn.Conv2d):
        return AdaLoraConv(config, r, module)
    return AdaLora(config, r, *targets.sizes(module))


def refuse_growth(model: nn.Module, adapters: Mapping[str, Any], config: AdaLoraConfig, batches: Any) -> None:
    """Raise a PeftcoreError for a new adapter with target_r above init_r; loaded adapters may have that."""
    reason = f"target_r={config.target_r} is above init_r={config.init_r}, but AdaLoRA only removes triplets"
    raise PeftcoreError(f"{reason}. Choose a larger init_r, or a target_r of at most {config.init_r}")


def loss(adapters: Mapping[str, Any], config: AdaLoraConfig) -> Tensor | None:
    products = []
    for adapter in adapters.values():
        products += [adapter.lora_A @ adapter.lora_A.T, adapter.lora_B.T @ adapter.lora_B]
    norms = torch.stack([torch.linalg.norm(p - torch.eye(len(p), device=p.device)) for p in products])
    return config.orth_reg_weight * norms.mean() if config.orth_reg_weight else None


@torch.no_grad()
def after_step(adapters: Mapping[str, Any], config: AdaLoraConfig, step: int, total_steps: int) -> None:
    layers, total = list(adapters.values()), config.total_step or total_steps
    schedule_end = total - config.tfinal
    schedule = f"total_step={total}, tinit={config.tinit}, tfinal={config.tfinal}"
    validation.require(
        schedule_end > config.tinit, f"AdaLoRA's schedule has no step ({schedule}). Set max_steps or total_step=..."
    )
    parameters = itertools.chain.from_iterable(layer.parameters() for layer in layers)
    has_gradients = any(parameter.grad is not None for parameter in parameters)
    validation.require(
        has_gradients or step >= schedule_end,
        "AdaLoRA reads gradients in after_step, but no parameter has a gradient. Call after_step between "
        "optimizer.step() and optimizer.zero_grad(). DeepSpeed clears gradients in its step, so use another method "
        "with it, or shard the model with peftcore.shard(model)",
    )
    for layer in layers if step < schedule_end else ():
        layer.observe(config)
    allocates = config.tinit < step <= schedule_end and (step % config.deltaT == 0 or step == schedule_end)
    if allocates:
        start, end = config.init_r * len(layers), config.target_r * len(layers)
        budget = int((start - end) * (1 - (step - config.tinit) / (schedule_end - config.tinit)) ** 3 + end)
        scores = torch.cat([layer.importance() for layer in layers])
        limit = scores.kthvalue(len(scores) - budget)[0] if budget < len(scores) else -torch.inf
        for layer in layers:
            layer.left.copy_((layer.importance() > limit)[:, None])
    # As in PEFT, pruned entries of E may grow again until the next allocation, but not after the schedule.
    for layer in layers if allocates or step > schedule_end else ():
        layer.lora_E.mul_(layer.left)


def no_steps(fields: Mapping[str, Any]) -> int:
    """Return the total_step to write for None, which PEFT rejects: a value that leaves no steps for the schedule."""
    return int(fields.get("tinit", 0) + fields.get("tfinal", 0) + 1)


def read(model: nn.Module | None, tensors: dict[str, Tensor], fields: dict[str, Any]) -> tuple[Tensors, Fields]:
    return tensors, {n: v for n, v in fields.items() if n != "total_step" or v != no_steps(fields)}


def write(model: nn.Module | None, tensors: dict[str, Tensor], fields: dict[str, Any]) -> tuple[Tensors, Fields]:
    return tensors, {**fields, "total_step": fields["total_step"] or no_steps(fields)}


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(
        peft_type="ADALORA",
        export=lambda at: {tensor_name(at, name): p for name, p in at.adapter.named_parameters()},  # without buffers
        read=read,
        write=write,
    )
    return [
        Method(
            "adalora",
            AdaLoraConfig,
            place,
            rules,
            refuse_growth,
            initializes=lambda config: config.target_r > config.init_r,
            loss=loss,
            after_step=after_step,
            learning_rate=5e-3,
        )
    ]
