"""ReLoRA (Lialin et al. 2023, arXiv 2307.05695): y = W x + scale · (B1 A1 + ... + Bn An) x, one product after another.

every `restart_every` steps    the trained A and B join the frozen ones; A is drawn again, and B is 0
state of their optimizer       stays where both moments are among the share 1 - prune_ratio of largest magnitudes
learning rate                  times 1/(w + 1), ..., w/(w + 1) in the w = restart_warmup steps after a restart,
                               and times a/(a + 1), ..., 1/(a + 1) in the a = restart_anneal steps before it

The sum has rank n r. The paper adds each product to W. Here it stays apart: a base in 4 bits loses nothing, a file
holds the whole change, as a LoRA of rank n r, and removing the adapter restores the base.
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
    """Config with LoRA's fields; saved as a LoRA of all products, which other libraries read.

    Args:
        restart_every: steps between two restarts. None: a quarter of the training, and at least
            restart_warmup + restart_anneal + 1.
        restart_warmup: steps after a restart in which the learning rate rises.
        restart_anneal: steps before a restart in which it falls.
        prune_ratio: share of the optimizer's moments, those of smallest magnitude, that a restart sets to zero; an
            element of which one is zero loses both. 1: all, and the optimizer counts its steps again.
        rounds: number of products, of which the last is trained. Set by training, and in files.
        of_one: ranks and scales of one product, in files, where those of LoRA's fields are for all products.
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
        within = self.restart_warmup + self.restart_anneal
        validation.require(
            self.restart_every is None or within < self.restart_every,
            f"restart_warmup + restart_anneal = {within} steps must be less than restart_every={self.restart_every}, "
            "or the learning rate would never be whole",
        )

    def as_lora(self) -> peftcore_lora.LoraConfig:
        """Return LoRA's fields."""
        names = [each.name for each in dataclasses.fields(peftcore_lora.LoraConfig)]
        return peftcore_lora.LoraConfig(**{name: getattr(self, name) for name in names})

    def resolved(self, model: nn.Module, architecture: Architecture) -> ReloraConfig:
        config: Any = super().resolved(model, architecture)
        return dataclasses.replace(config, rounds=self.rounds or 1)


class Relora(LoraLinear):
    """LoRA of a linear layer, and the frozen products of earlier rounds: A `[(n - 1) r, in]`, B `[out, (n - 1) r]`."""

    past_A: Tensor
    past_B: Tensor

    def __init__(self, lora: LoraLinear, rounds: int, gaussian: bool) -> None:
        Adapter.__init__(self)  # the factors are those of `lora`
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
        """Freeze the product, and begin another."""
        a, b = ranks.whole(self.lora_A), ranks.whole(self.lora_B)
        self.past_A = torch.cat([self.past_A, a])
        self.past_B = torch.cat([self.past_B, b], dim=1)
        drawn, generator = torch.empty(a.shape, device="cpu"), torch.Generator().manual_seed(seed)
        if self.gaussian:
            drawn.normal_(std=1 / len(a), generator=generator)
        else:
            nn.init.kaiming_uniform_(drawn, a=5**0.5, generator=generator)
        ranks.fill(self.lora_A, drawn.to(a))
        ranks.fill(self.lora_B, torch.zeros_like(b))


def place(model: nn.Module, config: ReloraConfig, architecture: Architecture) -> list[Placement]:
    gaussian = config.init_lora_weights == "gaussian"

    def wrap(lora: Any) -> Relora | None:
        adaptable = isinstance(lora, LoraLinear) and not isinstance(lora, LoraOnWeight)
        return Relora(lora, config.rounds or 1, gaussian) if adaptable else None

    return wrap_adapters(place_lora(model, config, architecture), wrap, "ReLoRA")


def every(config: ReloraConfig, total_steps: int) -> int:
    """Return the steps between two restarts."""
    shortest = config.restart_warmup + config.restart_anneal + 1  # with one step at the whole learning rate
    return config.restart_every or max(shortest, -(-total_steps // 4))


def schedule(config: ReloraConfig, step: int, total_steps: int) -> float:
    """Return the factor of the learning rate at a step, counted from 1.

    For a loop of your own: `LambdaLR(optimizer, lambda done: schedule(config, done + 1, total_steps))`.
    """
    between = every(config, total_steps)
    after, factor = (step - 1) % between + 1, 1.0
    if step > between and after <= config.restart_warmup:
        factor = after / (config.restart_warmup + 1)
    before = between - after + 1  # steps until the restart, this one included
    if before <= config.restart_anneal and step + before - 1 < total_steps:
        factor = min(factor, before / (config.restart_anneal + 1))
    return factor


@torch.no_grad()
def after_step(adapters: Mapping[str, Any], config: ReloraConfig, step: int, total_steps: int) -> ReloraConfig | None:
    keep, between = 1 - config.prune_ratio, every(config, total_steps)
    factors = [parameter for adapter in adapters.values() for parameter in adapter.parameters()]
    if step == 1 and between < total_steps:  # an error that a restart would raise, and what it will take
        reset_optimizer_state(factors, keep=1.0)
        warn_of_rank(adapters, (total_steps - 1) // between)
    elif step == 1 and total_steps > 2:  # one or two steps try a config
        warn_of_no_restart(config, between, total_steps)
    if step % between or step >= total_steps:
        return None
    rounds = (config.rounds or 1) + 1
    for path, adapter in adapters.items():
        adapter.restart(zlib.crc32(f"{path} {rounds}".encode()))
    reset_optimizer_state(factors, keep=keep)
    return dataclasses.replace(config, rounds=rounds)


def warn_of_no_restart(config: ReloraConfig, between: int, total_steps: int) -> None:
    """Warn of a training that ends before its first restart."""
    between_by, smaller = f"restart_every={between} is", "a smaller restart_every"
    if config.restart_every is None:
        own = f"restart_warmup={config.restart_warmup} and restart_anneal={config.restart_anneal}"
        between_by, smaller = f"{own} put {between} steps between restarts,", "smaller ones"
    warn(
        f"{between_by} not less than the training's {total_steps} steps, so it has no restart, and trains what LoRA "
        f"trains. Train longer, or pass {smaller}"
    )


def warn_of_rank(adapters: Mapping[str, Any], restarts: int) -> None:
    """Warn if the products of all rounds will take more values than the weights that they change."""
    sizes = [(*ranks.shape_of(each.lora_A), ranks.shape_of(each.lora_B)[0]) for each in adapters.values()]
    products = (restarts + 1) * sum(r * (width + out_width) for r, width, out_width in sizes)
    weights = sum(width * out_width for _, width, out_width in sizes)
    if products > weights:
        warn(
            f"{restarts} restarts make products of {products:,} values, more than the {weights:,} of the weights that "
            "they change. Restart less often (restart_every), or with a smaller r"
        )


def read(model: nn.Module | None, tensors: dict[str, Tensor], fields: dict[str, Any]) -> tuple[Tensors, Fields]:
    rounds = max(1, int(fields.get("rounds") or 1))
    own = {name: fields[name] for name in OWN if name in fields}
    found, read = RULES.read(model, tensors, {name: value for name, value in fields.items() if name not in OWN})
    found = dict(found)
    for name in list(found):
        if name.endswith(".lora_A.weight"):
            r = len(found[name]) // rounds
            found[name], found[name.replace(".lora_A.", ".past_A.")] = found[name].split([r, len(found[name]) - r])
        elif name.endswith(".lora_B.weight"):
            r = found[name].shape[1] // rounds
            own_B, past = found[name].split([r, found[name].shape[1] - r], dim=1)
            found[name], found[name.replace(".lora_B.", ".past_B.")] = own_B, past
    one, sizes = own.pop("of_one", None) or {}, dict(read)
    if one.keys() != {*SIZES} or any(
        scale_rank({**sizes, **one}, rounds)[name] != sizes.get(name) for name in SIZES
    ):  # edited
        one = scale_rank(sizes, 1 / rounds)
    return found, {**sizes, **{name: one[name] for name in SIZES}, **own}


def write(model: nn.Module | None, tensors: dict[str, Tensor], fields: dict[str, Any]) -> tuple[Tensors, Fields]:
    own = {name: fields[name] for name in OWN}
    rest = {name: value for name, value in fields.items() if name not in OWN}
    pasts = {name: tensor for name, tensor in tensors.items() if re.search(r"\.past_[AB]\.", name)}
    joined = {name: tensor for name, tensor in tensors.items() if name not in pasts}
    for name, past in pasts.items():
        if past.numel():
            now = name.replace(".past_", ".lora_")
            joined[now] = torch.cat([tensors[now], past], dim=0 if ".past_A." in name else 1)
    found, fields_on_disk = RULES.write(model, joined, scale_rank(rest, own["rounds"] or 1))
    return found, {**fields_on_disk, **own, "of_one": {name: rest[name] for name in SIZES}}


SIZES = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
OWN = ("restart_every", "restart_warmup", "restart_anneal", "prune_ratio", "rounds", "of_one")


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = dataclasses.replace(
        RULES,
        read=read,
        write=write,
        formats=[each for each in RULES.formats if not isinstance(each, (FileFormat, FileLayout))],
        peft=dataclasses.replace(RULES.peft, flag="rounds", own_fields=RULES.peft.own_fields | {*OWN}),
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
