"""Poly (arXiv 2202.13914) and multi-head routing (MHR): a router mixes LoRAs that all tasks share.

Poly: Ponti et al. 2023, EACL, section 2. MHR: Caccia et al. 2023, arXiv 2211.03831.

    y = W x + b + B_t A_t x / r       for task t, separately for each of the s splits of x and y:
    A_t = Σ_k w_tk A_k,  B_t = Σ_k w_tk B_k         A_k [in / s, r] and B_k [r, out / s]: skill k, shared by all tasks
    w_t = z_t / Σ_k z_tk,  z_t = sigmoid(Z_t)       Z [tasks, s · skills]: the router, one per layer

In training z is drawn: sigmoid(Z_t + log u - log(1 - u)) with uniform u (a relaxed Bernoulli variable). The call names
each row's task: `model(..., task_ids=t)`, `model.generate(..., task_ids=t)`, or
`with peftcore.call_arguments(model, task_ids=t)`; t int64 [batch], or one number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from peftcore.plugin import (
    Adapter,
    Architecture,
    Around,
    Base,
    Method,
    PeftRules,
    Placement,
    StateRules,
    current_call,
    hookimpl,
    override,
    targets,
    validation,
)

peftcore_api = ">=3.0,<4"


@dataclass(frozen=True)
class PolyConfig(targets.LayersConfig):
    """Config with the field names of Hugging Face PEFT's `PolyConfig`; the other fields select layers.

    Args:
        r: rank of a skill.
        n_tasks, n_skills: number of tasks, and of skills that they share.
        n_splits: number of splits of inputs and outputs, each with its own router weights (MHR). 1: Poly.
        poly_type: "poly", the only type.
        init_weights: False: B is random too; the adapter then changes the model from the start.
    """

    not_in_peft: ClassVar[frozenset[str]] = frozenset({"layers_to_transform", "layers_pattern", "fan_in_fan_out"})
    r: int = 8
    init_weights: bool = True
    poly_type: Literal["poly"] = "poly"
    n_tasks: int = 1
    n_skills: int = 4
    n_splits: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.positive_whole(r=self.r, n_tasks=self.n_tasks, n_skills=self.n_skills, n_splits=self.n_splits)


class Router(nn.Module):
    """Router Z `[tasks, splits · skills]`."""

    def __init__(self, config: PolyConfig) -> None:
        super().__init__()
        self.skills = config.n_skills
        self.module_logits = nn.Parameter(torch.empty(config.n_tasks, config.n_splits * config.n_skills))
        nn.init.uniform_(self.module_logits, -1e-3, 1e-3)

    def forward(self, tasks: Tensor, draws: bool) -> Tensor:
        """Return w `[rows, splits, skills]` for the rows' tasks `[rows]`; `draws`: sample z as in training."""
        z = self.module_logits.float().index_select(0, tasks).unflatten(1, (-1, self.skills))
        if draws:
            u = torch.rand_like(z).clamp(torch.finfo(z.dtype).tiny, 1 - torch.finfo(z.dtype).eps)
            z = z + u.log() - (-u).log1p()
        z = z.sigmoid()
        return z / (z.sum(-1, keepdim=True) + 1e-12)


class Poly(Adapter):
    """A `[splits, skills, in / splits, r]`, B `[splits, skills, r, out / splits]` and Z of a linear layer."""

    needs_call = ("task_ids",)

    def __init__(self, config: PolyConfig, width: int, out_width: int) -> None:
        super().__init__()
        splits, skills, r = config.n_splits, config.n_skills, config.r
        self.poly_lora_A = nn.Parameter(torch.empty(splits, skills, width // splits, r))
        self.poly_lora_B = nn.Parameter(torch.zeros(splits, skills, r, out_width // splits))
        self.poly_router = Router(config)
        nn.init.uniform_(self.poly_lora_A, -((width // splits) ** -0.5), (width // splits) ** -0.5)
        if not config.init_weights:
            nn.init.uniform_(self.poly_lora_B, -(r**-0.5), r**-0.5)

    def task_factors(self, tasks: Tensor, draws: bool) -> tuple[Tensor, Tensor]:
        """Return A `[rows, in, r]` and B `[rows, r, out]`, with the splits concatenated."""
        w = self.poly_router(tasks, draws)
        a = torch.einsum("bqs,qsdr->bqdr", w, self.poly_lora_A.float()).flatten(1, 2)
        b = torch.einsum("bqs,qsrd->brqd", w, self.poly_lora_B.float()).flatten(2)
        return a, b / a.shape[-1]

    def forward(self, base: Base, x: Tensor) -> Tensor:
        call, count = current_call(), len(self.poly_router.module_logits)
        tasks = call.get("task_ids")
        if tasks is None:
            validation.require(
                count == 1,
                f"the adapter has {count} tasks, but the call names none. Use model(..., task_ids=t); transformers' "
                "Trainer drops that column unless remove_unused_columns=False",
            )
            tasks = 0
        index = validation.task_ids(tasks, count, x.device, on_card=False)
        a, b = self.task_factors(index, self.training)
        rows = math.prod(x.shape[:-1])
        fits = len(a) == 1 or (x.shape[0] == len(a) if x.dim() > 2 else rows % len(a) == 0)
        message = f"the call names {len(a)} tasks, one for each row, but this layer's input is {list(x.shape)}"
        validation.require(fits, f"{message}. Leave such a layer out: exclude_modules=[...]")
        inputs = x.reshape(len(a), -1, x.shape[-1])
        change = inputs @ a.to(x.dtype) @ b.to(x.dtype)
        y = base(x)
        return y + change.reshape(y.shape)

    @override
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        count = len(self.poly_router.module_logits)
        message = f"Poly changes the weights differently for each of {count} tasks, so it cannot be merged"
        validation.require(count == 1, f"{message}. Keep the adapter unmerged")
        a, b = self.task_factors(torch.zeros(1, dtype=torch.long, device=weight.device), draws=False)
        return weight + (a[0] @ b[0]).T, bias

    @override
    def neutral(self) -> dict[str, Tensor]:
        return {"poly_lora_B": torch.zeros_like(self.poly_lora_B)}


def place(model: nn.Module, config: PolyConfig, architecture: Architecture) -> list[Placement]:
    sizes = {path: targets.sizes(module) for path, module in config.selected(model, architecture).items()}
    for path, widths in sizes.items():
        fits = all(size % config.n_splits == 0 for size in widths)
        validation.require(
            fits,
            f"n_splits={config.n_splits} does not divide inputs and outputs of '{path}', {widths}. Choose another "
            f"n_splits, or exclude_modules=['{path}']",
        )
    return [Around(path, Poly(config, *widths)) for path, widths in sizes.items()]


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(
        peft_type="POLY", peft=PeftRules(own_fields=PolyConfig.not_in_peft, unreadable=targets.conv1d_paths)
    )
    return [Method("poly", PolyConfig, place, rules, learning_rate=1e-3)]
