"""EVA (Paischer et al. 2024, arXiv 2410.07170): A is the main directions of a layer's inputs.

    A = the first r principal components of the inputs X [tokens, in]    ranks by explained variance, at most rho · r

B is zero, so the start is the base. Ranks go to layers where components explain most. The components are updated batch
by batch (Ross et al. 2008), until their change is within tau.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.plugin import inputs_of, validation
from peftcore_lora.config import LoraConfig, nested

_FOLLOWED = 64  # minimum number of components to keep per layer


@dataclass(frozen=True)
class EvaConfig:
    """Config with the field names of Hugging Face PEFT's `EvaConfig`.

    Args:
        rho: the largest rank of a layer is rho · r; with 1 every layer has rank r. tau: cosine between components of
            two batches at which they have converged.
        use_label_mask, label_mask_value: leave out tokens whose label is this value; padding is always left out.
        whiten: divide each component by the root of its singular value.
        adjust_scaling_factors: keep the scale of a layer whose rank changes.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        validation.check_types(self)
        validation.require(self.rho >= 1, f"eva_config: rho must be 1 or more, found {self.rho:g}")
        validation.require(0 <= self.tau <= 1, f"eva_config: tau must be in [0, 1], found {self.tau:g}")


@dataclass
class Components:
    """First `count` principal components `[count, in]` of rows that come in batches, and their spread."""

    count: int
    tau: float
    rows: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(()))
    # sum of squares around the mean, over all features
    squares: Tensor = field(default_factory=lambda: torch.zeros(()))
    vectors: Tensor | None = None
    values: Tensor | None = None
    settled: bool = False

    def add(self, x: Tensor) -> None:
        """Add `x [rows, in]`; batches with fewer rows than components are ignored."""
        if len(x) < self.count:
            return
        x = x.double()
        mean = x.mean(0)
        around, total = x - mean, self.rows + len(x)
        shift = (self.rows * len(x) / total) ** 0.5 * (self.mean - mean)
        stacked = (
            [around]
            if self.values is None or self.vectors is None
            else [self.values[:, None] * self.vectors, around, shift[None]]
        )
        self.squares = self.squares + around.square().sum() + (shift.square().sum() if self.rows else 0)
        self.mean, self.rows = (self.rows * self.mean + len(x) * mean) / total, total
        _, values, vectors = torch.linalg.svd(torch.cat(stacked), full_matrices=False)
        kept = max(_FOLLOWED, 4 * self.count)  # later batches may make these components matter
        before, self.vectors, self.values = self.vectors, vectors[:kept], values[:kept]
        if before is not None:
            # the sign of a component is arbitrary
            cosine = (before[: self.count] * self.vectors[: self.count]).sum(1).abs()
            self.settled = bool((cosine >= self.tau).all())

    def explained(self) -> Tensor:
        """Return the share of the variance that each component explains."""
        assert self.values is not None
        return self.values[: self.count].square() / self.squares


def initialize(model: nn.Module, adapters: Mapping[str, Any], config: LoraConfig, batches: Iterable[Any]) -> LoraConfig:
    """Set the adapters' ranks and A, and return the config with the ranks."""
    eva = nested(EvaConfig, "eva_config", config.eva_config)
    ranks = {path: len(adapter.lora_A) for path, adapter in adapters.items()}
    wanted = {path: min(round(rank * eva.rho), adapters[path].lora_A.shape[1]) for path, rank in ranks.items()}
    found = {path: Components(count, eva.tau) for path, count in wanted.items()}
    follow(model, found, eva, batches)
    lacking = next((path for path, components in found.items() if components.vectors is None), None)
    validation.require(
        lacking is None,
        f"init_lora_weights='eva': no batch had at least {wanted.get(lacking or '')} tokens for '{lacking}'. Use "
        "larger batches, or a smaller r or rho",
    )
    new = shared_out(found, ranks)
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    for path, adapter in adapters.items():
        rank, vectors, values = new[path], found[path].vectors, found[path].values
        assert vectors is not None and values is not None
        a = vectors[:rank] / values[:rank, None].sqrt() if eva.whiten else vectors[:rank]
        alpha = adapter.full_scale * ranks[path] * (rank / ranks[path] if eva.adjust_scaling_factors else 1)
        old_a, old_b = adapter.lora_A, adapter.lora_B
        adapter.lora_A = nn.Parameter(a.to(old_a))
        adapter.lora_B = nn.Parameter(old_b.new_zeros(len(old_b), rank))
        if rank != ranks[path]:
            adapter.full_scale = alpha / rank
            rank_pattern[path], alpha_pattern[path] = rank, alpha
    ranks_first = {**rank_pattern, **config.rank_pattern}  # the first entry that matches a path is used
    return replace(config, rank_pattern=ranks_first, alpha_pattern={**alpha_pattern, **config.alpha_pattern})


def shared_out(found: Mapping[str, Components], ranks: Mapping[str, int]) -> dict[str, int]:
    """Return new ranks with the same sum, given to the components that explain most; each layer keeps one."""
    new = dict.fromkeys(ranks, 1)
    shares = [(share.item(), path) for path, each in found.items() for share in each.explained()[1:]]
    for _, path in sorted(shares, key=lambda pair: -pair[0])[: sum(ranks.values()) - len(ranks)]:
        new[path] += 1
    return new


def follow(model: nn.Module, found: Mapping[str, Components], eva: EvaConfig, batches: Iterable[Any]) -> None:
    """Run the model on batches until the components have converged; layers with one input share the work."""
    done: dict[int, tuple[Tensor, Components]] = {}  # by input, for one batch
    current: list[Any] = [None]

    def take(path: str, x: Tensor, batch: Any) -> bool:
        if current[0] is not batch:
            current[0] = batch
            done.clear()
        same = done.get(id(x))
        if same is not None and same[1].count == found[path].count:
            vars(found[path]).update(vars(same[1]))
        else:
            kept = counted(batch, eva)
            rows = x[kept] if kept is not None and x.shape[:-1] == kept.shape else x.reshape(-1, x.shape[-1])
            found[path].add(rows)
            done[id(x)] = x, found[path]
        return found[path].settled

    inputs_of(model, found, batches, take)


def counted(batch: Any, eva: EvaConfig) -> Tensor | None:
    """Return the mask of tokens to use, `[batch, tokens]`, or None for all."""
    if not isinstance(batch, Mapping):
        return None
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    kept = None if mask is None or mask.dim() != 2 else mask.bool()
    if eva.use_label_mask and labels is not None and labels.dim() == 2:
        trained = labels != eva.label_mask_value
        kept = trained if kept is None else kept & trained
    return kept
