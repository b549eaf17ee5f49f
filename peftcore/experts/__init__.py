"""Mixtures of experts whose weights are parameters `[experts, out, in]`: what is known of them, and their forward."""

from peftcore.experts.forward import Thin, experts_forward, thin_changes
from peftcore.experts.layout import (
    ExpertsLayout,
    expert_biases,
    experts_layout,
    has_interface_forward,
    stacked_weights,
    why_not_fused,
)

__all__ = [
    "ExpertsLayout",
    "Thin",
    "expert_biases",
    "experts_forward",
    "experts_layout",
    "has_interface_forward",
    "stacked_weights",
    "thin_changes",
    "why_not_fused",
]
