"""Config of bottleneck adapters and checks of its fields."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from peftcore.plugin import validation

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: getattr(F, name) for name in ("relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu", "elu", "mish")},
    # Names in AdapterHub's configs.
    **{"swish": F.silu, "leakyrelu": F.leaky_relu, "gelu_new": partial(F.gelu, approximate="tanh")},
    "linear": lambda x: x,
}


@dataclass(frozen=True)
class AdapterConfig:
    """Config of bottleneck adapters. Fields that AdapterHub's `adapters` also has have the same names.

    Args:
        placement: sublayers that get a bottleneck: "houlsby" (attention and feed-forward), "pfeiffer" (feed-forward)
            or "attention".
        cross_adapter: also adapt cross-attention.
        is_parallel: f reads the sublayer's input instead of its output; in a pre-norm model, the output of the norm.
        original_ln_before: f reads the hidden states after the residual and norm (Pfeiffer), not before.
        original_ln_after, residual_before_ln: both False, together with original_ln_before: f is added to its own
            input, without a norm after it (AdapterPlus).
        reduction_factor: the bottleneck has width d // reduction_factor, where d is the width of the sublayer.
        bottleneck_size: width of the bottleneck, instead of reduction_factor.
        non_linearity: act, one of `ACTIVATIONS`.
        scaling: factor of f. "learned": one trained number. "channel": one per output.
        ln_before, ln_after: add a norm before D, or after f.
        use_gating: multiply f by the sigmoid of a projection of its input, averaged over a row's tokens, padding
            included.
        dropout: dropout probability of the outputs of f.
        stochastic_depth: probability of dropping f for a whole row of the batch.
        phm_layer: make D and U sums of Kronecker products (Compacter), see `peftcore_adapter.phm`.
        phm_dim: n, the number of products.
        phm_rank, factorized_phm_W: make the larger factors products of this rank.
        factorized_phm_rule: make the smaller factors products of rank 1.
        shared_phm_rule, shared_W_phm: share the smaller, and the larger factors between all layers.
        learn_phm: train the smaller factors.
        phm_bias: give D and U biases.
        phm_init_range: standard deviation of the smaller factors at the start.
        inv_adapter: "nice": add an invertible network after the embedding, and its inverse before the output head
            (MAD-X), see `peftcore_adapter.invertible`.
        inv_adapter_reduction_factor: reduction factor of that network's bottlenecks.
        inv_adapter_output: False: no inverse before the output head.
        layers_to_transform: indices of the layers with bottlenecks. None: all.
        target_modules: modules to put bottlenecks after (or parallel to), instead of the known sublayers.
        exclude_modules, layers_pattern: see `peftcore.plugin.targets.select`.
        modules_to_save: modules to train in full as well. None means a classifier's head.
    """

    placement: Literal["houlsby", "pfeiffer", "attention"] = "houlsby"
    cross_adapter: bool = False
    is_parallel: bool = False
    original_ln_before: bool = False
    original_ln_after: bool = True
    residual_before_ln: bool = True
    reduction_factor: float = 16
    bottleneck_size: int | None = None
    non_linearity: str = "relu"
    scaling: float | Literal["learned", "channel"] = 1.0
    ln_before: bool = False
    ln_after: bool = False
    use_gating: bool = False
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    phm_layer: bool = False
    phm_dim: int = 4
    phm_rank: int = 1
    factorized_phm_W: bool = True
    shared_W_phm: bool = False
    shared_phm_rule: bool = True
    factorized_phm_rule: bool = False
    learn_phm: bool = True
    phm_bias: bool = True
    phm_init_range: float = 0.01
    inv_adapter: Literal["nice"] | None = None
    inv_adapter_reduction_factor: float = 2
    inv_adapter_output: bool = True
    layers_to_transform: int | Sequence[int] | None = None
    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    layers_pattern: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] | None = None

    def __post_init__(self) -> None:
        validation.check_types(self)
        validation.one_of(ACTIVATIONS, non_linearity=self.non_linearity)
        validation.probability(dropout=self.dropout, stochastic_depth=self.stochastic_depth)
        validation.positive_whole(phm_dim=self.phm_dim, phm_rank=self.phm_rank)
        if self.bottleneck_size is not None:
            validation.positive_whole(bottleneck_size=self.bottleneck_size)
        require, has_targets = validation.require, self.target_modules is not None
        for name in ("reduction_factor", "inv_adapter_reduction_factor"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, found {getattr(self, name)!r}")
        require(
            not (self.is_parallel and self.original_ln_before),
            "is_parallel and original_ln_before cannot be combined. Omit one of the two",
        )
        is_adapter_plus = self.original_ln_before and not self.original_ln_after and not self.residual_before_ln
        require(
            is_adapter_plus or (self.original_ln_after and self.residual_before_ln),
            "original_ln_after=False and residual_before_ln=False go together, with original_ln_before=True "
            "(AdapterPlus); other combinations would add the residual twice or lose it",
        )
        require(
            not (has_targets and (self.original_ln_before or self.cross_adapter)),
            "original_ln_before and cross_adapter select known sublayers, so they cannot be combined with "
            "target_modules. Omit target_modules",
        )
        require(
            has_targets or not (self.exclude_modules or self.layers_pattern),
            "exclude_modules and layers_pattern need target_modules. Without it, use layers_to_transform",
        )
        require(
            self.factorized_phm_W or self.phm_rank == 1,
            f"phm_rank={self.phm_rank} needs factorized_phm_W=True",
        )
