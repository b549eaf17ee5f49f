"""A tiny random instance of any model class that transformers' auto mappings list, from its config alone.

Every width becomes 32, every stack two layers (one of each kind, where a config names kinds), every vocabulary 128
tokens, so that what two parts of a model share still fits. What rules cannot know stands in `special.py`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from census.special import ARGUMENTS, CLASS_FIELDS, DEFAULTS, FIELDS, MISSING, UNTOUCHED

WIDTH, VOCABULARY, LAYERS, HEADS = 32, 128, 2, 4
LARGEST = 20_000_000  # parameters; more means that a rule is missing

# (names of fields, what an int there becomes); the first that matches counts.
_RULES: list[tuple[str, Any]] = [
    (r"(.*_)?(token_id|token_index|pad_id|index_token|token_ids|token_offset|vocab_offset)", lambda v: v % VOCABULARY),
    (r"(.*_)?(vocab_size.*|num_embeddings|codebook_size)|n_(text_)?tokens", lambda v: min(v, VOCABULARY)),
    (r"(.*_)?(kv_heads|key_value_heads|key_value_attention_heads|kv_n_heads)", lambda v: min(v, 2)),
    (r"(.*_)?(n_?heads?|num_heads|attention_heads|num_attention_heads|self_attn_heads)", lambda v: min(v, HEADS)),
    (r"(.*_)?(head_dim|d_kv|dim_head|d_head|attention_head_size|kv_channels)", lambda v: min(v, 8)),
    (r"(.*_)?(intermediate_size|intermediate_dim|ffn_dim|d_ff|mlp_dim|ffn_hidden_size|d_inner|mlp_hidden_size|dff|dim_ff|"
     r"dim_feedforward|feedforward_dim|feed_forward_size|linear_units|intermediate_size_mlp)", lambda v: v and 64),
    (r"((.*_)?(num_hidden_layers|num_layers|n_layers?|encoder_layers|decoder_layers|depth|[lxr]_layers|blocks?_layers)"
     r"|num_(encoder|decoder|hidden)_layers|layers|.*_num_layers|(num|n)_(\w+_)?layers)", lambda v: min(v, LAYERS)),
    (r"(.*_)?(hidden_size|hidden_dim|d_model|n_embd|embed_dim|embedding_size|embedding_dim|projection_dim|emb_dim|"
     r"out_hidden_size|output_dim|project_dim|projection_size|feature_dim|hidden_channels|proj_dim|d_latents|"
     r"backbone_hidden_size|query_dim|pooler_output_size|dim|classifier_proj_size|lru_width|mask_dim|conv_dim|"
     r"entity_emb_size|fpn_feature_size|mask_feature_size|feat_dim|hidden_size_.*|embed_dim_.*|output_channels|"
     r"latent_channels|codevector_dim|xvector_output_dim|codebook_dim)", lambda v: min(v, WIDTH)),
    (r"(.*_)?(lora_rank|laurel_rank|dt_rank|time_step_rank)", lambda v: min(v, 8)),
    (r"(.*_)?(state_size|d_state|ssm_state_size)", lambda v: min(v, 8)),
    (r"(.*_)?(num_experts|n_routed_experts|num_local_experts|moe_num_experts|zero_expert_num)", lambda v: min(v, 4)),
    (r"(.*_)?(num_experts_per_tok(en)?|moe_topk|moe_top_k|moe_k|index_topk)", lambda v: min(v, 2)),
    (r"(.*_)?(sliding_window(_size)?|local_attention|attention_window_size|attention_chunk_size)", lambda v: min(v, 8)),
    (r"n_group|topk_group|num_expert_group", lambda v: 1),
    (r"(.*_)?first_k_dense_replace", lambda v: min(v, 1)),
    (r"(.*_)?(image_size|img_size|pretrain_image_size|crop_size|max_image_size)", lambda v: min(v, 64)),
    (r"(.*_)?(max_\w*position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|seq_length)",
     lambda v: min(v, 512)),
    (r"(.*_)?(num_queries|num_latents|num_query_tokens|num_prompts)", lambda v: min(v, 8)),
    (r"(.*_)?(num_groups|groups_width|num_conv_pos_embedding_groups|upsample_groups)", lambda v: min(v, 4)),
    (r"(.*_)?(num_labels|num_classes)", lambda v: min(v, 3)),
    (r"base_channels", lambda v: min(v, 32)),
    (r"num_res_blocks", lambda v: 1),
    (r"num_pos_feats", lambda v: min(v, WIDTH // 2)),
]  # fmt: skip
_WIDTHS = r"(.*_)?(hidden_sizes|embed_dims?|conv_dim|tdnn_dim|channels|embed_dim_per_stage|feature_sizes)"
_DEPTHS = r"(.*_)?(depths|num_blocks|blocks_per_stage|numb_of_layers)"
_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "encoder_layers", "decoder_layers")


@cache
def classes() -> dict[str, str]:
    """{model class: model type} of all auto mappings; classes that users name first, bare backbones last."""
    mappings = [name for name in dir(modeling_auto) if name.startswith("MODEL_") and name.endswith("_MAPPING_NAMES")]
    found: dict[str, str] = {}
    there = set(dir(transformers))  # `hasattr` would import every model
    last = ("MODEL_MAPPING_NAMES", "MODEL_FOR_PRETRAINING_MAPPING_NAMES")
    for mapping in sorted(mappings, key=lambda name: (name in last, name)):
        for model_type, names in getattr(modeling_auto, mapping).items():
            for name in (names,) if isinstance(names, str) else names:
                own = name.startswith(CONFIG_MAPPING_NAMES.get(model_type, "?").removesuffix("Config"))
                if model_type in CONFIG_MAPPING_NAMES and name in there and (own or name not in found):
                    found[name] = model_type
    return found


def build(name: str, seed: int = 0) -> nn.Module:
    """A tiny instance of the class `name`, random weights by `seed`, in eval mode.

    Raises:
        ValueError: it would not be tiny.
    """
    cls = getattr(transformers, name)
    config = config_of(name)
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(config, *ARGUMENTS.get(name, ())).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters: a rule for a size is missing")
    torch.manual_seed(seed)
    model = cls(config_of(name), *ARGUMENTS.get(name, ())).float().eval()
    _enliven(model, torch.Generator().manual_seed(seed))
    return model


def _enliven(model: nn.Module, generator: torch.Generator) -> None:
    """Draw matrices and biases as if trained: from initial ones of std 0.02 everything is nearly linear, and small."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.numel():
                continue
            fan_in = parameter[0].numel() if parameter.dim() >= 2 else 100
            wanted = fan_in**-0.5
            spread = parameter.std().item() if parameter.numel() > 1 else 0.0
            if (parameter.dim() >= 2 and spread < wanted) or (name.endswith("bias") and spread == 0):
                parameter.add_(wanted * torch.randn(parameter.shape, generator=generator))


def config_of(name: str) -> PreTrainedConfig:
    """The small config of the class `name`."""
    cls = getattr(transformers, name)
    model_type = classes()[name]
    config_class = getattr(transformers, CONFIG_MAPPING_NAMES[model_type])
    wanted = cls.config_class
    if wanted is not None and not issubclass(config_class, wanted):
        config_class = wanted
    return shrunk(config_class(**DEFAULTS.get(config_class.__name__, dict)()), CLASS_FIELDS.get(name, {}))


def shrunk(config: PreTrainedConfig, further: Mapping[str, Any] = {}) -> PreTrainedConfig:
    """A config of the same class with small sizes, its sub-configs too; fields of FIELDS and `further` as said there.

    A backbone whose stages are its layers keeps as many as it gives out.
    """
    kind = type(config).__name__
    special = {**FIELDS.get(kind, {}), **further}
    values = {name: vars(config)[name] for name in _parameters(config) if name in vars(config)}
    layers = next((values[name] for name in _LAYER_COUNTS if isinstance(values.get(name), int)), None)
    stages = vars(config).get("_out_indices") or ()
    kept = _kept_layers(values, layers, len(stages)) if not set(special) & {*_LAYER_COUNTS, "layer_types"} else []
    fields: dict[str, Any] = {}
    for name, default in _parameters(config).items():
        if name == "rope_parameters" and isinstance(values.get(name), dict):
            fields[name] = _small_rope(values[name])
            if "mrope_section" in (getattr(config, "ignore_keys_at_rope_validation", None) or ()):
                fields[name] = {**fields[name], "mrope_section": [2, 1, 1]}
        elif name in MISSING and values.get(name) is None:
            fields[name] = MISSING[name]
        elif name in values and (name in UNTOUCHED or default is not None or values[name] is not None):
            value = values[name]
            if isinstance(value, PreTrainedConfig):
                fields[name] = shrunk(value, special.pop(name, {}))
            elif kept and isinstance(value, (list, tuple)) and len(value) == layers:
                fields[name] = _small(name, type(value)(value[i] for i in kept))
            elif name in _LAYER_COUNTS and isinstance(value, int) and kept:
                fields[name] = len(kept)
            elif (small := _small(name, value)) != value or (default is not None and small != default):
                fields[name] = small
    if "kv_lora_rank" in values:  # latent attention has as many keys as queries
        fields["num_key_value_heads"] = HEADS
    if len(stages) > 1:
        first = len(kept) - len(stages) + 1
        fields["out_indices"] = list(range(first, first + len(stages))) if kept else list(stages)
    for name, value in special.items():
        fields[name] = value(config) if callable(value) else value
    return type(config)(**fields)


def _parameters(config: PreTrainedConfig) -> dict[str, Any]:
    skipped = ("self", "kwargs", "transformers_version", "id2label", "label2id", "problem_type", "architectures")
    signature = inspect.signature(type(config).__init__).parameters
    return {name: p.default for name, p in signature.items() if name not in skipped}


def _kept_layers(values: dict[str, Any], layers: int | None, stages: int) -> list[int]:
    """Indices of layers that show each combination of kinds once, two at least, and as many as there are stages."""
    if not isinstance(layers, int) or layers <= LAYERS:
        return []
    if stages > LAYERS:
        return list(range(layers))[-stages:]
    lists = [v for v in values.values() if isinstance(v, (list, tuple)) and len(v) == layers]
    seen: dict[Any, int] = {}
    for i in range(layers):
        seen.setdefault(repr([v[i] for v in lists]) if lists else 0, i)
    kept = sorted(list(seen.values())[:4])
    return kept if len(kept) >= LAYERS else sorted({0, layers - 1, *kept})[:LAYERS]


def _small(name: str, value: Any) -> Any:
    if isinstance(value, bool) or name in UNTOUCHED:
        return value
    if isinstance(value, int):
        return next((rule(value) for pattern, rule in _RULES if re.fullmatch(pattern, name)), value)
    if (
        isinstance(value, (list, tuple))
        and value
        and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    ):
        small = _small_list(name, list(value))
        return small if re.fullmatch(_WIDTHS, name) else type(value)(small)  # models put lists of widths together
    return value


def _small_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Sections of a head's axes make up half of a head of 8."""
    if rope and all(isinstance(value, dict) for value in rope.values()):
        return {kind: _small_rope(value) for kind, value in rope.items()}
    return {**rope, "mrope_section": [2, 1, 1]} if "mrope_section" in rope else rope


def _small_list(name: str, value: list[int]) -> list[int]:
    if re.fullmatch(_DEPTHS, name):
        return [min(v, 1) for v in value]
    if re.fullmatch(r"(.*_)?num_(attention_)?heads(_per_stage)?", name):
        return [min(v, 2) for v in value]
    if re.fullmatch(_WIDTHS, name):  # by the same rule in every list, since they must fit one another
        return [v if v <= 4 else min(max(8, v // 64 * 8), 64) for v in value]
    return [next((rule(v) for pattern, rule in _RULES if re.fullmatch(pattern, name)), v) for v in value]


def sizes() -> Iterator[tuple[str, int | str]]:
    """(class, its number of parameters, or why there is no instance)."""
    for name in classes():
        try:
            with torch.device("meta"):
                model = getattr(transformers, name)(config_of(name), *ARGUMENTS.get(name, ()))
            yield name, sum(p.numel() for p in model.parameters())
        except Exception as error:
            yield name, f"{type(error).__name__}: {error}"
