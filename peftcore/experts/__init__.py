"""Mixtures of experts whose weights are parameters `[experts, out, in]`: their layout and their forward."""

from peftcore.experts.each import EachExpert
from peftcore.experts.expert_linear import PackedExpert, expert_linear, expert_path, split_expert_path
from peftcore.experts.forward import adapter_of_expert, expert_changes, experts_forward
from peftcore.experts.layout import (
    ExpertsLayout,
    expert_biases,
    experts_layout,
    has_interface_forward,
    stacked_weights,
    why_not_fused,
)

__all__ = [
    "EachExpert",
    "ExpertsLayout",
    "PackedExpert",
    "adapter_of_expert",
    "expert_biases",
    "expert_changes",
    "expert_linear",
    "expert_path",
    "experts_forward",
    "experts_layout",
    "has_interface_forward",
    "split_expert_path",
    "stacked_weights",
    "why_not_fused",
]
