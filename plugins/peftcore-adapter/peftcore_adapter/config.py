"""The fields of a bottleneck adapter, and which of them go together."""

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
    **{"swish": F.silu, "leakyrelu": F.leaky_relu, "gelu_new": partial(F.gelu, approximate="tanh")},  # AdapterHub's
    "linear": lambda x: x,
}


@dataclass(frozen=True)
class AdapterConfig:
    """Where AdapterHub's library `adapters` has a field, it is its name here.

    Args:
        placement: the sublayers that get a bottleneck: "houlsby" (attention and feed-forward), "pfeiffer"
            (feed-forward) or "attention". cross_adapter: cross-attention too, where there is one.
        is_parallel: f reads what the sublayer reads, in place of what it gives. In a pre-norm model that is
            what comes out of the norm.
        original_ln_before: f reads what comes behind the residual and norm (Pfeiffer), not before.
        original_ln_after, residual_before_ln: both False, with original_ln_before: f adds to what it reads, so that no
            norm of the base comes behind it (AdapterPlus).
        reduction_factor: the bottleneck is d // reduction_factor wide, d the width of the sublayer.
        bottleneck_size: or this wide.
        non_linearity: act, one of `ACTIVATIONS`.
        scaling: factor of f; "learned": one trained number, "channel": one for each output.
        ln_before, ln_after: a norm of the adapter's own before D, or behind f.
        use_gating: f is multiplied by the mean over a row's tokens, padding included, of a sigmoid of what f reads.
        dropout: probability with which an output of f is dropped in training. stochastic_depth: with which f is for a
            whole row of the batch.
        phm_layer: D and U are sums of Kronecker products (Compacter), see :mod:`peftcore_adapter.phm`.
        phm_dim: how many, n. phm_rank: of their larger factors; factorized_phm_W=False leaves these whole.
        shared_phm_rule: all layers have their smaller factors in common; factorized_phm_rule: these have rank 1.
        shared_W_phm: all layers have the larger factors in common. learn_phm: the smaller ones train.
        phm_bias: D and U have biases. phm_init_range: standard deviation of the smaller factors at the start.
        inv_adapter: "nice": an invertible network behind the embedding, and its inverse before the head of tokens
            (MAD-X), see :mod:`peftcore_adapter.invertible`. inv_adapter_reduction_factor: of its bottlenecks.
        inv_adapter_output: False leaves the inverse out.
        layers_to_transform: indices of the layers that get bottlenecks; None: all.
        target_modules: modules that get one behind (or beside) them, in place of the known sublayers;
            exclude_modules, layers_pattern: see `peftcore.targets.select`.
        modules_to_save: modules trained whole. None: a classifier's head, which pre-training did not train.
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
        require, named = validation.require, self.target_modules is not None
        for name in ("reduction_factor", "inv_adapter_reduction_factor"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, found {getattr(self, name)!r}")
        require(
            not (self.is_parallel and self.original_ln_before),
            "is_parallel and original_ln_before exclude each other: a parallel adapter stands behind nothing",
        )
        plus = self.original_ln_before and not self.original_ln_after and not self.residual_before_ln
        require(
            plus or (self.original_ln_after and self.residual_before_ln),
            "original_ln_after=False and residual_before_ln=False go together, with original_ln_before=True "
            "(AdapterPlus); anything else would add the residual twice, or lose it",
        )
        require(
            not (named and (self.original_ln_before or self.cross_adapter)),
            "original_ln_before and cross_adapter choose among known sublayers; target_modules names modules",
        )
        require(
            named or not (self.exclude_modules or self.layers_pattern),
            "exclude_modules and layers_pattern go with target_modules; layers_to_transform goes without",
        )
        require(
            self.factorized_phm_W or self.phm_rank == 1,
            "phm_rank is of factors that factorized_phm_W=False leaves whole",
        )
