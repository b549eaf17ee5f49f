"""Selection of the modules that a config names, pattern matching, and coverage of the weight."""

from peftcore.adaptation.base_modules import base_modules, base_parameters
from peftcore.experts.in_model import expert_weights, experts_per_token, is_read_by_itself, layer_at, weight_named
from peftcore.layers import is_conv1d, is_linear, sizes
from peftcore.targets.convolutions import odd_convolution
from peftcore.targets.expert_selection import ALL_LINEAR, name_experts, parameter_suffixes, select_experts
from peftcore.targets.layers_config import LayersConfig
from peftcore.targets.patterns import compiled, is_inside, matched_keys, matches, pattern_value
from peftcore.targets.selection import (
    biases,
    conv1d_paths,
    drop_unmatched,
    match_counts,
    minimal_suffixes,
    refuse_bypassed,
    refuse_targeted,
    select,
    select_by,
    sublayers,
    trained_biases,
    trained_modules,
    widths,
)

__all__ = [
    "ALL_LINEAR",
    "LayersConfig",
    "base_modules",
    "base_parameters",
    "biases",
    "compiled",
    "conv1d_paths",
    "drop_unmatched",
    "expert_weights",
    "experts_per_token",
    "is_conv1d",
    "is_inside",
    "is_linear",
    "is_read_by_itself",
    "layer_at",
    "match_counts",
    "matched_keys",
    "matches",
    "minimal_suffixes",
    "name_experts",
    "odd_convolution",
    "parameter_suffixes",
    "pattern_value",
    "refuse_bypassed",
    "refuse_targeted",
    "select",
    "select_by",
    "select_experts",
    "sizes",
    "sublayers",
    "trained_biases",
    "trained_modules",
    "weight_named",
    "widths",
]
