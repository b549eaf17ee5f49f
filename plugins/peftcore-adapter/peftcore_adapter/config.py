"""Config fields of bottleneck adapters, and checks of their combinations."""

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
    # AdapterHub's names
    **{"swish": F.silu, "leakyrelu": F.leaky_relu, "gelu_new": partial(F.gelu, approximate="tanh")},
    "linear": lambda x: x,
}


@dataclass(frozen=True)
class AdapterConfig:
    """Config of bottleneck adapters; fields that AdapterHub's `adapters` has, too, have the same name.

    Args:
        placement: the sublayers that get a bottleneck: "houlsby" (attention and feed-forward), "pfeiffer"
            (feed-forward) or "attention". cross_adapter: also cross-attention, where there is one.
        is_parallel: f reads the input of the sublayer instead of its output. In a pre-norm model the input is the
            output of the norm.
        original_ln_before: f reads the hidden states after the residual and norm (Pfeiffer), not before.
        original_ln_after, residual_before_ln: both False, with original_ln_before: f is added to its own input, with no
            norm of the base after it (AdapterPlus).
        reduction_factor: the bottleneck has width d // reduction_factor, with d the width of the sublayer.
        bottleneck_size: width of the bottleneck, instead of reduction_factor.
        non_linearity: act, one of `ACTIVATIONS`.
        scaling: factor of f; "learned": one trained number, "channel": one per output.
        ln_before, ln_after: an additional norm before D, or after f.
        use_gating: multiply f by the sigmoid of a projection of its input, averaged over a row's tokens with padding.
        dropout: dropout probability of the outputs of f. stochastic_depth: probability of dropping f for a whole row
            of the batch.
        phm_layer: D and U are sums of Kronecker products (Compacter), see `peftcore_adapter.phm`.
        phm_dim: number of products, n. phm_rank: rank of their larger factors, if factorized_phm_W is True.
        shared_phm_rule: all layers share the smaller factors; factorized_phm_rule: the smaller factors have rank 1.
        shared_W_phm: all layers share the larger factors. learn_phm: the smaller factors are trained.
        phm_bias: D and U have biases. phm_init_range: standard deviation of the smaller factors at the start.
        inv_adapter: "nice": an invertible network after the embedding, and its inverse before the output head
            (MAD-X), see `peftcore_adapter.invertible`. inv_adapter_reduction_factor: for its bottlenecks.
        inv_adapter_output: False: leave out the inverse.
        layers_to_transform: indices of the layers with bottlenecks; None: all.
        target_modules: modules to put bottlenecks after (or parallel to), instead of the known sublayers;
            exclude_modules, layers_pattern: see `peftcore.model.targets.select`.
        modules_to_save: modules to train in full as well. None: a classifier's head.
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
            "is_parallel and original_ln_before exclude each other. Leave one of them out",
        )
        plus = self.original_ln_before and not self.original_ln_after and not self.residual_before_ln
        require(
            plus or (self.original_ln_after and self.residual_before_ln),
            "original_ln_after=False and residual_before_ln=False go together, with original_ln_before=True "
            "(AdapterPlus); other combinations would add the residual twice, or lose it",
        )
        require(
            not (named and (self.original_ln_before or self.cross_adapter)),
            "original_ln_before and cross_adapter choose among known sublayers, so target_modules must be left out",
        )
        require(
            named or not (self.exclude_modules or self.layers_pattern),
            "exclude_modules and layers_pattern need target_modules. Without it, use layers_to_transform",
        )
        require(
            self.factorized_phm_W or self.phm_rank == 1,
            f"phm_rank={self.phm_rank} needs factorized_phm_W=True",
        )
