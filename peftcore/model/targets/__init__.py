"""Select the modules that a config names: pattern matching, and coverage of a model's weights."""

from peftcore.model.base_modules import base_modules as base_modules, base_parameters as base_parameters
from peftcore.model.experts.in_model import (
    dense_weight as dense_weight,
    expert_weights as expert_weights,
    experts_per_token as experts_per_token,
    is_read_elsewhere as is_read_elsewhere,
    layer_at as layer_at,
    stacked_weight_name as stacked_weight_name,
)
from peftcore.model.targets.convolutions import odd_convolution as odd_convolution
from peftcore.model.targets.expert_selection import (
    ALL_LINEAR as ALL_LINEAR,
    name_experts as name_experts,
    parameter_suffixes as parameter_suffixes,
    select_experts as select_experts,
)
from peftcore.model.targets.layers_config import LayersConfig as LayersConfig
from peftcore.model.targets.patterns import (
    compile_pattern as compile_pattern,
    is_inside as is_inside,
    matched_keys as matched_keys,
    matches as matches,
    pattern_value as pattern_value,
)
from peftcore.model.targets.selection import (
    biases as biases,
    conv1d_paths as conv1d_paths,
    drop_unmatched as drop_unmatched,
    match_counts as match_counts,
    minimal_suffixes as minimal_suffixes,
    refuse_targeted as refuse_targeted,
    select as select,
    select_by as select_by,
    sublayers as sublayers,
    trained_biases as trained_biases,
    trained_modules as trained_modules,
    widths as widths,
)
from peftcore.plugin.layers import is_conv1d as is_conv1d, is_linear as is_linear, sizes as sizes
