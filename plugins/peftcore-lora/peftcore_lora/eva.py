"""EVA (Paischer et al. 2024, arXiv 2410.07170): A starts at the principal components of a layer's inputs.

    A = the first r principal components of the inputs X [tokens, in]    ranks by explained variance, at most rho · r

B is zero, so the adapter changes nothing before training. The sum of ranks is fixed, and layers whose components
explain more variance get a larger share. Components are computed by incremental PCA (Ross et al. 2008), batch by batch,
until they change less than tau allows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.plugin import inputs_of, validation
from peftcore_lora.config import LoraConfig, nested_config

_MIN_TRACKED = 64  # components that incremental PCA keeps at least, however few are used


@dataclass(frozen=True)
class EvaConfig:
    """Config with the field names of Hugging Face PEFT's `EvaConfig`.

    Args:
        rho: no layer gets a rank above rho · r; with 1 every layer has rank r.
        tau: components have converged if their cosine between two batches is at least this.
        use_label_mask, label_mask_value: ignore tokens whose label is this value; padding is always ignored.
        whiten: divide each component by the square root of its singular value.
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
    """Incremental PCA: the first `count` principal components of the rows added so far.

    `vectors` `[tracked, in]` and `values` `[tracked]` are right singular vectors and singular values of the centered
    rows, and `squares` is the sum of all squared deviations from the mean.
    """

    count: int
    tau: float
    rows: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: Tensor = field(default_factory=lambda: torch.zeros(()))
    vectors: Tensor | None = None
    values: Tensor | None = None
    has_converged: bool = False

    def add(self, x: Tensor) -> None:
        """Add `x` `[rows, in]`. Batches with fewer rows than components are ignored."""
        if len(x) < self.count:
            return
        x = x.double()
        mean, total = x.mean(0), self.rows + len(x)
        centered = x - mean
        shift = (self.rows * len(x) / total) ** 0.5 * (self.mean - mean)
        # The singular values and vectors stand for all earlier rows; the shift accounts for their other mean.
        matrix = centered
        if self.values is not None and self.vectors is not None:
            matrix = torch.cat([self.values[:, None] * self.vectors, centered, shift[None]])
        self.squares = self.squares + centered.square().sum()
        if self.rows:
            self.squares = self.squares + shift.square().sum()
        self.mean, self.rows = (self.rows * self.mean + len(x) * mean) / total, total
        _, values, vectors = torch.linalg.svd(matrix, full_matrices=False)
        tracked = max(_MIN_TRACKED, 4 * self.count)  # later batches may move components beyond `count` up
        previous, self.vectors, self.values = self.vectors, vectors[:tracked], values[:tracked]
        if previous is not None:
            cosine = (
                (previous[: self.count] * self.vectors[: self.count]).sum(1).abs()
            )  # a component's sign is arbitrary
            self.has_converged = bool((cosine >= self.tau).all())

    def explained_variance(self) -> Tensor:
        """Return the share of the variance that each component explains, `[count]`."""
        assert self.values is not None
        return self.values[: self.count].square() / self.squares


def initialize(model: nn.Module, adapters: Mapping[str, Any], config: LoraConfig, batches: Iterable[Any]) -> LoraConfig:
    """Set the adapters' ranks, A and B, and return the config with the new ranks."""
    eva = nested_config(EvaConfig, "eva_config", config.eva_config)
    ranks = {path: len(adapter.lora_A) for path, adapter in adapters.items()}
    max_ranks = {path: min(round(rank * eva.rho), adapters[path].lora_A.shape[1]) for path, rank in ranks.items()}
    components = {path: Components(max_rank, eva.tau) for path, max_rank in max_ranks.items()}
    compute_components(model, components, eva, batches)
    missing_path = next((path for path, layer_components in components.items() if layer_components.vectors is None), "")
    validation.require(
        not missing_path,
        f"init_lora_weights='eva': no batch had at least {max_ranks.get(missing_path)} tokens for '{missing_path}'. "
        "Use larger batches, or a smaller r or rho",
    )
    new_ranks = redistribute_ranks(components, ranks)
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    for path, adapter in adapters.items():
        rank, vectors, values = new_ranks[path], components[path].vectors, components[path].values
        assert vectors is not None and values is not None
        a = vectors[:rank] / values[:rank, None].sqrt() if eva.whiten else vectors[:rank]
        alpha = adapter.full_scale * ranks[path] * (rank / ranks[path] if eva.adjust_scaling_factors else 1)
        old_a, old_b = adapter.lora_A, adapter.lora_B
        adapter.lora_A = nn.Parameter(a.to(old_a))
        adapter.lora_B = nn.Parameter(old_b.new_zeros(len(old_b), rank))
        if rank != ranks[path]:
            adapter.full_scale = alpha / rank
            rank_pattern[path], alpha_pattern[path] = rank, alpha
    # The first pattern that matches a path applies, so the new ranks come before the user's patterns.
    rank_pattern |= {name: rank for name, rank in config.rank_pattern.items() if name not in rank_pattern}
    alpha_pattern |= {name: alpha for name, alpha in config.alpha_pattern.items() if name not in alpha_pattern}
    return replace(config, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)


def redistribute_ranks(components: Mapping[str, Components], ranks: Mapping[str, int]) -> dict[str, int]:
    """Return new ranks with the same sum, for the components that explain most; each layer has at least rank 1."""
    new_ranks = dict.fromkeys(ranks, 1)
    shares: list[tuple[float, str]] = []
    for path, layer_components in components.items():
        shares += [(share, path) for share in layer_components.explained_variance()[1:].tolist()]
    shares.sort(key=lambda pair: -pair[0])
    for _, path in shares[: sum(ranks.values()) - len(ranks)]:
        new_ranks[path] += 1
    return new_ranks


def compute_components(
    model: nn.Module, components: Mapping[str, Components], eva: EvaConfig, batches: Iterable[Any]
) -> None:
    """Run the model on batches until the components of all layers have converged."""
    # Layers that read the same tensor (query, key and value) share the computation. Only valid within one batch.
    computed: dict[int, tuple[Tensor, Components]] = {}
    current_batch: Any = None

    def add_inputs(path: str, x: Tensor, batch: Any) -> bool:
        nonlocal current_batch
        if current_batch is not batch:
            current_batch = batch
            computed.clear()
        layer_components = components[path]
        _, shared = computed.get(id(x), (None, None))
        if shared is not None and shared.count == layer_components.count:
            vars(layer_components).update(vars(shared))
        else:
            mask = token_mask(batch, eva)
            is_masked = mask is not None and x.shape[:-1] == mask.shape
            layer_components.add(x[mask] if is_masked else x.reshape(-1, x.shape[-1]))
            computed[id(x)] = x, layer_components  # holding x keeps its id from being reused
        return layer_components.has_converged

    inputs_of(model, components, batches, add_inputs)


def token_mask(batch: Any, eva: EvaConfig) -> Tensor | None:
    """Return the mask of tokens to use, `[batch, tokens]`, or None for all."""
    if not isinstance(batch, Mapping):
        return None
    attention_mask, labels = batch.get("attention_mask"), batch.get("labels")
    mask = None if attention_mask is None or attention_mask.dim() != 2 else attention_mask.bool()
    if eva.use_label_mask and labels is not None and labels.dim() == 2:
        has_label = labels != eva.label_mask_value
        mask = has_label if mask is None else mask & has_label
    return mask
