"""Mixtures of experts with stacked weights `[experts, out, in]`: their layout and their forward."""

from peftcore.model.experts.expert_adapters import ExpertAdapters as ExpertAdapters
from peftcore.model.experts.forward import (
    adapter_of_expert as adapter_of_expert,
    expert_changes as expert_changes,
    experts_forward as experts_forward,
)
from peftcore.model.experts.layout import (
    ExpertsLayout as ExpertsLayout,
    PackedExpert as PackedExpert,
    expert_biases as expert_biases,
    expert_linear as expert_linear,
    experts_layout as experts_layout,
    has_interface_forward as has_interface_forward,
    split_expert_path as split_expert_path,
    stacked_weights as stacked_weights,
    why_not_fused as why_not_fused,
)
