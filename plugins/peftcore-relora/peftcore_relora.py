"""ReLoRA (Lialin et al. 2023, arXiv 2307.05695): y = W x + scale · (B1 A1 + ... + Bn An) x, one product after another.

every `restart_every` steps    the trained A and B join the frozen ones; A is drawn again, and B is 0
optimizer state                is kept only where both moments are among the 1 - prune_ratio largest in magnitude
learning rate                  times 1/(w + 1), ..., w/(w + 1) in the w = restart_warmup steps after a restart,
                               and times a/(a + 1), ..., 1/(a + 1) in the a = restart_anneal steps before it

The sum has rank n r. The paper adds each product to W. peftcore keeps the products separate: a 4-bit base loses
nothing, a file holds the whole change as a LoRA of rank n r, and removing the adapter restores the base.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import peftcore_lora
import torch
from peftcore_lora.config import refuse_fields
from peftcore_lora.files import RULES
from peftcore_lora.layers import LoraLinear, LoraOnWeight
from peftcore_lora.placing import place as place_lora, wrap_adapters
from peftcore_lora.starts import scale_rank
from torch import Tensor, nn

from peftcore.plugin import (
    Adapter,
    Architecture,
    Fields,
    FileFormat,
    FileLayout,
    Method,
    Placement,
    Tensors,
    hookimpl,
    ranks,
    reset_optimizer_state,
    validation,
    warn,
)

peftcore_api = ">=3.6,<4"


@dataclass(frozen=True)
class ReloraConfig(peftcore_lora.LoraConfig):
    """Config with LoRA's fields, and when and how to restart. The file is a LoRA of all products together.

    Args:
        restart_every: number of steps between two restarts. None: a quarter of all steps, but at least
            restart_warmup + restart_anneal + 1.
        restart_warmup: number of steps after a restart in which the learning rate rises.
        restart_anneal: number of steps before a restart in which it falls.
        prune_ratio: share of the optimizer's moments, the smallest in magnitude, that a restart sets to zero. If one
            moment of an element is zeroed, so is the other. 1: all, and the optimizer's step count starts again.
        rounds: number of products, of which the last is trained. Set by training and stored in files.
        of_one: r, lora_alpha and patterns of one product. Only in files, where LoRA's fields describe all products.
    """

    restart_every: int | None = None
    restart_warmup: int = 10
    restart_anneal: int = 0
    prune_ratio: float = 0.99
    rounds: int | None = None
    of_one: dict[str, Any] | None = None

    reaches_experts = False
    adapts_attention = False

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_fields(self.as_lora(), "ReLoRA")
        for name in ("restart_every", "rounds"):
            if (value := getattr(self, name)) is not None:
                validation.positive_whole(**{name: value})
        for name in ("restart_warmup", "restart_anneal"):
            value = getattr(self, name)
            validation.require(value >= 0, f"{name} must be at least 0, found {value}")
        validation.require(0 < self.prune_ratio <= 1, f"prune_ratio must be in (0, 1], found {self.prune_ratio}")
        reduced_steps = self.restart_warmup + self.restart_anneal
        validation.require(
            self.restart_every is None or reduced_steps < self.restart_every,
            f"restart_warmup + restart_anneal = {reduced_steps} steps must be less than "
            f"restart_every={self.restart_every}, or the learning rate would never reach its full value",
        )

    def as_lora(self) -> peftcore_lora.LoraConfig:
        """Return the LoRA config without the fields of ReLoRA."""
        names = [f.name for f in dataclasses.fields(peftcore_lora.LoraConfig)]
        return peftcore_lora.LoraConfig(**{name: getattr(self, name) for name in names})

    def resolved(self, model: nn.Module, architecture: Architecture) -> ReloraConfig:
        config: Any = super().resolved(model, architecture)
        return dataclasses.replace(config, rounds=self.rounds or 1)


class Relora(LoraLinear):
    """LoRA of a linear layer, plus the frozen earlier products: A `[(n - 1) r, in]`, B `[out, (n - 1) r]`."""

    past_A: Tensor
    past_B: Tensor

    def __init__(self, lora: LoraLinear, rounds: int, gaussian: bool) -> None:
        Adapter.__init__(self)  # not LoraLinear's, which would create new factors
        self.full_scale, self.dropout, self.lora_bias = lora.full_scale, lora.dropout, None
        self.lora_A, self.lora_B, self.gaussian = lora.lora_A, lora.lora_B, gaussian
        (r, width), out_width = self.lora_A.shape, len(self.lora_B)
        self.register_buffer("past_A", self.lora_A.new_zeros((rounds - 1) * r, width, requires_grad=False))
        self.register_buffer("past_B", self.lora_B.new_zeros(out_width, (rounds - 1) * r, requires_grad=False))

    def pair(self) -> tuple[Tensor, Tensor]:
        if not len(self.past_A):
            return super().pair()
        return torch.cat([self.lora_A, self.past_A]), torch.cat([self.lora_B, self.past_B], dim=1)

    def restart(self, seed: int) -> None:
        """Freeze the current product, and start a new one with A drawn from `seed` and B = 0."""
        a, b = ranks.whole(self.lora_A), ranks.whole(self.lora_B)
        self.past_A = torch.cat([self.past_A, a])
        self.past_B = torch.cat([self.past_B, b], dim=1)
        # Drawn on the CPU, so that all ranks and devices get the same values.
        new_a, generator = torch.empty(a.shape, device="cpu"), torch.Generator().manual_seed(seed)
        if self.gaussian:
            new_a.normal_(std=1 / len(a), generator=generator)
        else:
            nn.init.kaiming_uniform_(new_a, a=5**0.5, generator=generator)
        ranks.fill(self.lora_A, new_a.to(a))
        ranks.fill(self.lora_B, torch.zeros_like(b))


def place(model: nn.Module, config: ReloraConfig, architecture: Architecture) -> list[Placement]:
    gaussian = config.init_lora_weights == "gaussian"

    def wrap(lora: Any) -> Relora | None:
        is_supported = isinstance(lora, LoraLinear) and not isinstance(lora, LoraOnWeight)
        return Relora(lora, config.rounds or 1, gaussian) if is_supported else None

    return wrap_adapters(place_lora(model, config, architecture), wrap, "ReLoRA")


def restart_interval(config: ReloraConfig, total_steps: int) -> int:
    """Return the number of steps between two restarts."""
    shortest = config.restart_warmup + config.restart_anneal + 1  # leaves one step at the full learning rate
    return config.restart_every or max(shortest, -(-total_steps // 4))


def schedule(config: ReloraConfig, step: int, total_steps: int) -> float:
    """Return the factor of the learning rate at a step, counted from 1.

    In your own training loop: `LambdaLR(optimizer, lambda done: schedule(config, done + 1, total_steps))`.
    """
    interval = restart_interval(config, total_steps)
    step_in_round, factor = (step - 1) % interval + 1, 1.0
    if step > interval and step_in_round <= config.restart_warmup:  # no warmup in the first round
        factor = step_in_round / (config.restart_warmup + 1)
    steps_to_restart = interval - step_in_round + 1  # counting this one
    restart_step = step + steps_to_restart - 1
    if steps_to_restart <= config.restart_anneal and restart_step < total_steps:  # no restart after the last step
        factor = min(factor, steps_to_restart / (config.restart_anneal + 1))
    return factor


@torch.no_grad()
def after_step(adapters: Mapping[str, Any], config: ReloraConfig, step: int, total_steps: int) -> ReloraConfig | None:
    interval = restart_interval(config, total_steps)
    factors = [parameter for adapter in adapters.values() for parameter in adapter.parameters()]
    if step == 1 and interval < total_steps:
        # Raises now if the optimizer's state cannot be reset, instead of at the first restart.
        reset_optimizer_state(factors, keep=1.0)
        warn_of_size(adapters, (total_steps - 1) // interval)
    elif step == 1 and total_steps > 2:  # with one or two steps the user only tries the config
        warn_of_no_restart(config, interval, total_steps)
    if step % interval or step >= total_steps:
        return None
    rounds = (config.rounds or 1) + 1
    for path, adapter in adapters.items():
        adapter.restart(zlib.crc32(f"{path} {rounds}".encode()))
    reset_optimizer_state(factors, keep=1 - config.prune_ratio)
    return dataclasses.replace(config, rounds=rounds)


def warn_of_no_restart(config: ReloraConfig, interval: int, total_steps: int) -> None:
    """Warn that training ends before the first restart."""
    cause, advice = f"restart_every={interval} is", "a smaller restart_every"
    if config.restart_every is None:
        names = f"restart_warmup={config.restart_warmup} and restart_anneal={config.restart_anneal}"
        cause, advice = f"{names} put {interval} steps between restarts,", "smaller values"
    warn(
        f"{cause} not less than the training's {total_steps} steps, so there is no restart, and ReLoRA equals LoRA. "
        f"Train longer, or pass {advice}"
    )


def warn_of_size(adapters: Mapping[str, Any], restarts: int) -> None:
    """Warn if the products of all rounds will have more values than the weights that they adapt."""
    shapes = [(*ranks.shape_of(adapter.lora_A), ranks.shape_of(adapter.lora_B)[0]) for adapter in adapters.values()]
    products = (restarts + 1) * sum(r * (width + out_width) for r, width, out_width in shapes)
    weights = sum(width * out_width for _, width, out_width in shapes)
    if products > weights:
        warn(
            f"after {restarts} restarts the products have {products:,} values, more than the {weights:,} of the "
            "weights that they adapt. Restart less often (restart_every), or with a smaller r"
        )


def read(model: nn.Module | None, tensors: dict[str, Tensor], fields: dict[str, Any]) -> tuple[Tensors, Fields]:
    rounds = max(1, int(fields.get("rounds") or 1))
    relora_fields = {name: fields[name] for name in RELORA_FIELDS if name in fields}
    other_fields = {name: value for name, value in fields.items() if name not in RELORA_FIELDS}
    disk_factors, lora_fields = RULES.read(model, tensors, other_fields)
    factors = dict(disk_factors)
    for name, tensor in disk_factors.items():  # the trained product comes first, and then the frozen ones
        if name.endswith(".lora_A.weight"):
            r = len(tensor) // rounds
            factors[name], factors[name.replace(".lora_A.", ".past_A.")] = tensor.split([r, len(tensor) - r])
        elif name.endswith(".lora_B.weight"):
            r = tensor.shape[1] // rounds
            current, past = tensor.split([r, tensor.shape[1] - r], dim=1)
            factors[name], factors[name.replace(".lora_B.", ".past_B.")] = current, past
    sizes = relora_fields.pop("of_one", None) or {}
    is_consistent = sizes.keys() == {*SIZES}
    if is_consistent:
        scaled = scale_rank({**lora_fields, **sizes}, rounds)
        is_consistent = all(scaled[name] == lora_fields.get(name) for name in SIZES)
    if not is_consistent:  # the user edited LoRA's fields, which then apply
        sizes = scale_rank(dict(lora_fields), 1 / rounds)
    return factors, {**lora_fields, **{name: sizes[name] for name in SIZES}, **relora_fields}


def write(model: nn.Module | None, tensors: dict[str, Tensor], fields: dict[str, Any]) -> tuple[Tensors, Fields]:
    relora_fields = {name: fields[name] for name in RELORA_FIELDS}
    lora_fields = {name: value for name, value in fields.items() if name not in RELORA_FIELDS}
    past_factors = {name: tensor for name, tensor in tensors.items() if re.search(r"\.past_[AB]\.", name)}
    factors = {name: tensor for name, tensor in tensors.items() if name not in past_factors}
    for past_name, past in past_factors.items():
        if past.numel():
            name = past_name.replace(".past_", ".lora_")
            factors[name] = torch.cat([tensors[name], past], dim=0 if ".past_A." in past_name else 1)
    disk_factors, fields_on_disk = RULES.write(model, factors, scale_rank(lora_fields, relora_fields["rounds"] or 1))
    return disk_factors, {**fields_on_disk, **relora_fields, "of_one": {name: lora_fields[name] for name in SIZES}}


SIZES = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
RELORA_FIELDS = ("restart_every", "restart_warmup", "restart_anneal", "prune_ratio", "rounds", "of_one")


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = dataclasses.replace(
        RULES,
        read=read,
        write=write,
        formats=[f for f in RULES.formats if not isinstance(f, (FileFormat, FileLayout))],
        peft=dataclasses.replace(RULES.peft, flag="rounds", own_fields=RULES.peft.own_fields | {*RELORA_FIELDS}),
    )
    return [
        Method(
            "relora",
            ReloraConfig,
            place,
            rules,
            after_step=after_step,
            schedule=schedule,
            trained_fields=("rounds",),
            learning_rate=1e-3,
        )
    ]
