"""LoRA's config, and the modules, parameters and experts that it selects."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, TypeVar

from torch import nn

from peftcore.plugin import Architecture, PeftcoreError, targets, validation, warn

NestedConfig = TypeVar("NestedConfig")
ADDED_STARTS = (True, False, "gaussian", "orthogonal", "mica", "eva")
SELECTION_FIELDS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
# Starts where B A is not zero, so that the initial B0 A0 must be subtracted to leave the output unchanged.
SUBTRACTED_STARTS = ("pissa", "olora", "corda", "lora_ga")


def is_adaptable(module: nn.Module) -> bool:
    """Return whether LoRA can adapt this layer."""
    others = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
    return targets.is_linear(module) or isinstance(module, others)


def is_subtracted(start: bool | str) -> bool:
    """Return whether `init_lora_weights=start` subtracts the initial B0 A0."""
    return start in SUBTRACTED_STARTS or re.fullmatch(r"pissa_niter_[0-9]{1,3}", str(start)) is not None


def is_computed(config: LoraConfig) -> bool:
    """Return whether the initial A and B are computed (from the weight or from data) rather than drawn at random."""
    return isinstance(config.init_lora_weights, str) and config.init_lora_weights != "gaussian"


def nested_config(config_type: type[NestedConfig], field_name: str, values: Mapping[str, Any] | None) -> NestedConfig:
    """Build the config that a field of `LoraConfig` holds as a dict.

    Raises:
        PeftcoreError: `values` has a key that `config_type` does not have.
    """
    field_names = [f.name for f in fields(config_type)]  # type: ignore[arg-type]  # a dataclass
    for name in values or {}:
        if name not in field_names:
            raise PeftcoreError(f"{field_name} has no field '{name}'. Its fields: {', '.join(field_names)}")
    return config_type(**(values or {}))


def check_start(start: bool | str) -> None:
    if not is_subtracted(start):
        validation.one_of((*ADDED_STARTS, *SUBTRACTED_STARTS, "pissa_niter_16"), init_lora_weights=start)


@dataclass(frozen=True)
class LoraConfig:
    """Config with the fields and defaults of Hugging Face PEFT's `LoraConfig`.

    Args:
        r: rank of the update. lora_alpha: the update is scaled by lora_alpha / r, with use_rslora by
            lora_alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732).
        expert_r: rank at each expert, with the same scale as other layers; `rank_pattern` takes precedence. The file
            stores it as `rank_pattern`. None: for experts selected by target_modules, r divided by the number of
            experts per token, at least 1, so that a token has the same total rank as in a dense layer; for experts in
            target_parameters, r.
        lora_dropout: dropout probability of the input of A.
        target_modules, exclude_modules, layers_to_transform, layers_pattern: see `peftcore.plugin.targets.select`.
            `all-linear` includes experts, whose weights are parameters [experts, out, in], unless target_parameters is
            given. A name that matches no layer may match a module of experts or its weight: `experts`, `gate_up_proj`.
        target_parameters: suffixes of parameters with two or three dimensions, such as `mlp.experts.down_proj`, to
            adapt in addition to target_modules. exclude_modules and layers_to_transform do not apply to them. [] adapts
            no experts.
        trainable_token_indices: rows of the embedding, and of modules tied to it, to train directly; or
            `{module: rows}`.
        rank_pattern, alpha_pattern: r and lora_alpha of single modules, `{regex for a suffix of the path: value}`.
        modules_to_save: modules to train in full, next to the adapters. None means a classifier's head.
        ensure_weight_tying: train modules tied to one of them (the head to the embedding) as the same weight. False:
            train them separately. PEFT's default is False.
        init_lora_weights: True (A Kaiming uniform, B zero), "gaussian" (A normal with std 1/r, B zero), False (both
            random: the adapter changes the output before training), or an initialisation from `starts.py`: from the
            weight ("pissa", "pissa_niter_16", "olora", "mica"), from data ("eva", "corda", "lora_ga"), or random
            ("orthogonal").
        eva_config, corda_config, lora_ga_config: fields of `EvaConfig`, `CordaConfig`, `LoraGAConfig`.
        frozen_start: subtract the initial A0 and B0: y = W x + scale (B A - B0 A0) x. The file stores it as a LoRA of
            rank 2 r. Set automatically if `init_lora_weights` needs it.
        layer_replication: `[[first, last + 1], ...]`: the adapters are for a model whose layers were repeated with
            `peftcore_lora.replicate_layers`.
        lora_plus_ratio: learning rate of B, in multiples of A's. lora_fa: freeze A. See `training.py`.
        use_bdlora: A or B is block-diagonal, with `nblocks` blocks, in layers whose path contains a name from
            `target_modules_bd_a` or `target_modules_bd_b`. With `match_strict` (default) every layer must match. See
            `blocks.py`.
        lora_bias: B also has a bias `[out]`: y = W x + scale · (B A x + b). Merging needs a layer with a bias.
        bias: biases to train in addition: "none", "all", or "lora_only" (of adapted modules).
        fan_in_fan_out: ignored by peftcore, which reads the layout from the layer. Written because PEFT needs True for
            GPT-2.
        kept_dropout: lora_dropout in files with target_parameters, for which PEFT requires lora_dropout=0.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: str | Sequence[str] = targets.ALL_LINEAR
    exclude_modules: str | Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    target_parameters: Sequence[str] | None = None
    expert_r: int | None = None
    trainable_token_indices: Sequence[int] | dict[str, Sequence[int]] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    modules_to_save: Sequence[str] | None = None
    ensure_weight_tying: bool = True
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    eva_config: dict[str, Any] | None = None
    corda_config: dict[str, Any] | None = None
    lora_ga_config: dict[str, Any] | None = None
    frozen_start: bool = False
    layer_replication: Sequence[Sequence[int]] | None = None
    lora_plus_ratio: float | None = None
    lora_fa: bool = False
    lora_bias: bool = False
    use_bdlora: dict[str, Any] | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    fan_in_fan_out: bool = False
    kept_dropout: float | None = None

    # Methods that wrap a LoRA override these two with what they support.
    reaches_experts: ClassVar[bool] = True
    adapts_attention: ClassVar[bool] = True  # nn.MultiheadAttention; False: `all-linear` leaves attention out

    def __post_init__(self) -> None:
        validation.check_types(self)
        for r in (self.r, *self.rank_pattern.values()):
            validation.positive_whole(r=r)
        if self.expert_r is not None:
            validation.positive_whole(r=self.expert_r)
        validation.probability(lora_dropout=self.lora_dropout)
        check_start(self.init_lora_weights)
        ratio, start = self.lora_plus_ratio, self.init_lora_weights
        validation.require(ratio is None or ratio > 0, f"lora_plus_ratio must be above 0, found {ratio!r}")
        validation.require(
            not self.lora_fa or start in (True, False, "gaussian", "orthogonal", "eva"),
            f"lora_fa=True freezes A at its start, which init_lora_weights={start!r} does not allow. Choose True",
        )

        if self.use_bdlora:
            conflict = replace(self, use_bdlora=None).linear_only_field
            validation.require(conflict is None, f"use_bdlora is not supported with {conflict}. Leave one of them out")

    @property
    def linear_only_field(self) -> str | None:
        """Return the first field that only linear layers support, as `name=value`, or None."""
        names = [name for name in ("lora_bias", "lora_fa", "frozen_start") if getattr(self, name)]
        names += ["init_lora_weights"] if self.init_lora_weights not in (True, False, "gaussian") else []
        names += ["use_bdlora"] if self.use_bdlora else []
        return f"{names[0]}={getattr(self, names[0])!r}" if names else None

    def resolved(self, model: nn.Module, architecture: Architecture) -> LoraConfig:
        """Return the config with every choice that depends on the model written out, as it is saved."""
        layers = select_layers(model, self, architecture)
        config = _with_experts(model, self)
        if self.target_modules == targets.ALL_LINEAR:
            config = replace(config, target_modules=targets.minimal_suffixes(model, layers))
        has_frozen_start = is_subtracted(self.init_lora_weights) or self.frozen_start
        has_conv1d = any(map(targets.is_conv1d, layers.values()))
        return replace(config, frozen_start=has_frozen_start, fan_in_fan_out=has_conv1d)


def _with_experts(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """Return the config with all selected experts in target_parameters, and their ranks and scales in patterns."""
    patterns = list(config.target_parameters or ())
    expert_names = _experts_in_target_modules(model, config)
    module_paths = {f"{path}.{name}": path for path, names in targets.expert_weights(model).items() for name in names}
    requested_names = [name for name in module_paths if any(targets.matches(pattern, name) for pattern in patterns)]
    validation.require(
        config.expert_r is None or bool(expert_names or requested_names),
        f"expert_r={config.expert_r} has no effect, because no experts are selected",
    )
    # Without expert_r, experts that target_parameters names have rank r, as in PEFT, and need no pattern.
    if config.expert_r:
        ranked_names = list(dict.fromkeys([*expert_names, *requested_names]))
    else:
        ranked_names = [name for name in expert_names if name not in requested_names]
    ranks: dict[int, list[str]] = {}
    for name in ranked_names:
        share = config.r // targets.experts_per_token(model.get_submodule(module_paths[name]), model)
        ranks.setdefault(config.expert_r or max(1, share), []).append(name)
    rank_pattern, alpha_pattern = dict(config.rank_pattern), dict(config.alpha_pattern)
    for r, names in ranks.items():
        names = [name for name in names if r != config.r and not _has_pattern(config.rank_pattern, name)]
        rank_pattern |= dict.fromkeys(_suffixes(model, names), r)
        # Alpha shrinks with the rank, so that the scale alpha / r is the same as in other layers.
        names = [name for name in names if not config.use_rslora and not _has_pattern(config.alpha_pattern, name)]
        alpha_pattern |= dict.fromkeys(_suffixes(model, names), config.lora_alpha * r / config.r)
    target_modules = config.target_modules
    if expert_names:
        target_modules, _ = targets.name_experts(model, target_modules, is_adaptable)
    return replace(
        config,
        target_modules=target_modules,
        target_parameters=list(dict.fromkeys([*patterns, *_suffixes(model, expert_names)])),
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        expert_r=None,
    )


def _experts_in_target_modules(model: nn.Module, config: LoraConfig) -> list[str]:
    """Return the full names of the experts' weights that target_modules selects."""
    selects_all = config.target_modules == targets.ALL_LINEAR
    if not config.reaches_experts or (selects_all and config.target_parameters is not None):
        return []
    selection = {name: getattr(config, name) for name in SELECTION_FIELDS}
    expert_names = targets.select_experts(model, supported=is_adaptable, **selection)
    if expert_names and selects_all and config.linear_only_field:
        warn(f"{config.linear_only_field} is supported only for linear layers, so experts are left out")
        return []
    return expert_names


def _has_pattern(patterns: dict[str, int] | dict[str, float], name: str) -> bool:
    return targets.pattern_value(patterns, name, None) is not None


def _suffixes(model: nn.Module, names: list[str]) -> list[str]:
    return targets.parameter_suffixes(model, names) if names else []


def config_for_ranks(model: nn.Module, config: LoraConfig | None, ranks: Mapping[str, int]) -> LoraConfig:
    """Return a config that adapts exactly the modules and parameters in `ranks`, at these ranks, with scale 1."""
    parameters = [path for path in ranks if path in dict(targets.base_parameters(model))]
    r = max(set(ranks.values()), key=list(ranks.values()).count)
    other_ranks = {path: rank for path, rank in ranks.items() if rank != r}
    pattern: dict[str, int] = {}
    for path, rank in other_ranks.items():
        # Patterns match suffixes, so a path that is also the end of another one needs an anchor.
        is_suffix = any(other.endswith(f".{path}") for other in ranks)
        pattern[f"^{path}$" if is_suffix else path] = rank
    return LoraConfig(
        r=r,
        lora_alpha=r,
        lora_dropout=0.0 if config is None else config.lora_dropout,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=targets.minimal_suffixes(model, [path for path in ranks if path not in parameters]),
        target_parameters=targets.parameter_suffixes(model, parameters),
        modules_to_save=(),
    )


def scale_config(config: LoraConfig, factor: float) -> LoraConfig:
    """Return the config with its scale multiplied by `factor`."""
    alphas = {path: factor * alpha for path, alpha in config.alpha_pattern.items()}
    return replace(config, lora_alpha=factor * config.lora_alpha, alpha_pattern=alphas)


# Fields that methods with a LoRA inside (DoRA, ReLoRA, activated LoRA) support.
INHERITED_FIELDS = {
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "modules_to_save", "ensure_weight_tying", "use_rslora", "init_lora_weights",
    "bias", "fan_in_fan_out",
}  # fmt: skip


def refuse_fields(config: LoraConfig, method: str) -> None:
    """Raise a PeftcoreError if the config sets a field of LoRA that `method`, which wraps a LoRA, does not support."""
    default = LoraConfig()
    for name in (f.name for f in fields(default) if f.name not in INHERITED_FIELDS):
        value = getattr(config, name)
        validation.require(
            (value or None) == (getattr(default, name) or None),  # [] means the same as None
            f"{name}={value!r} is not supported with {method}. Leave it out, or choose LoRA",
        )
    validation.one_of((True, False, "gaussian"), init_lora_weights=config.init_lora_weights)


def select_layers(model: nn.Module, config: LoraConfig, architecture: Architecture) -> dict[str, nn.Module]:
    """Return the layers that the config selects, by path. Experts are parameters, so they are not among them."""
    modules, experts = config.target_modules, list[str]()
    if config.reaches_experts:
        modules, experts = targets.name_experts(model, modules, is_adaptable)
    if not modules and (config.target_parameters or config.trainable_token_indices or experts):
        return {}
    skips_attention = modules == targets.ALL_LINEAR and not config.adapts_attention
    is_supported = targets.is_linear if skips_attention else is_adaptable
    return targets.select_by(config, model, architecture, supported=is_supported, target_modules=modules)
