"""Config of LoRA, and the modules, parameters and experts that it selects."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, TypeVar

from torch import nn

from peftcore.plugin import Architecture, PeftcoreError, targets, validation, warn

Kind = TypeVar("Kind")
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "mica", "eva")
CHOICE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
SUBTRACTED = ("pissa", "olora", "corda", "lora_ga")  # starts that change the model, and are subtracted from it


def is_adaptable(module: nn.Module) -> bool:
    """Return whether LoRA can adapt this layer."""
    others = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
    return targets.is_linear(module) or isinstance(module, others)


def is_subtracted(start: bool | str) -> bool:
    """Return whether B A starts at a value that is subtracted again."""
    return start in SUBTRACTED or re.fullmatch(r"pissa_niter_[0-9]{1,3}", str(start)) is not None


def is_computed(config: LoraConfig) -> bool:
    """Return whether the start is computed from the weight, from data, or from other factors rather than drawn."""
    return isinstance(config.init_lora_weights, str) and config.init_lora_weights != "gaussian"


def nested(kind: type[Kind], field_name: str, values: Mapping[str, Any] | None) -> Kind:
    """Return the config that a field of `LoraConfig` holds as a table."""
    known = [each.name for each in fields(kind)]  # type: ignore[arg-type]  # a dataclass
    for name in values or {}:
        if name not in known:
            raise PeftcoreError(f"{field_name} has no field '{name}'. Its fields: {', '.join(known)}")
    return kind(**(values or {}))


def check_start(start: bool | str) -> None:
    if not is_subtracted(start):
        validation.one_of((*PLAIN_STARTS, *SUBTRACTED, "pissa_niter_16"), init_lora_weights=start)


@dataclass(frozen=True)
class LoraConfig:
    """Config with the fields and defaults of Hugging Face PEFT's `LoraConfig`.

    Args:
        r: rank of the update. lora_alpha: the update is scaled by lora_alpha / r, with use_rslora by
            lora_alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732).
        expert_r: rank at each expert, with the same scale as other layers; `rank_pattern` takes precedence, and is
            saved instead. None: for experts selected by target_modules, r divided by the number of experts per token,
            at least 1, so that a token has the same total rank as elsewhere; for target_parameters, r.
        lora_dropout: dropout probability of the inputs of A.
        target_modules, exclude_modules, layers_to_transform, layers_pattern: see `peftcore.model.targets.select`.
            `all-linear` includes experts, whose weights are parameters [experts, out, in], unless target_parameters is
            given. Names that match no layer may match a module of experts, or its weight: `experts`, `gate_up_proj`.
        target_parameters: suffixes of parameters with two or three dimensions, such as `mlp.experts.down_proj`, in
            addition to target_modules ([]: only these parameters). exclude_modules and layers_to_transform do not
            apply to them. [] leaves out experts.
        trainable_token_indices: rows of the embedding, and of modules tied to it, that are trained directly; or
            `{module: rows}`.
        rank_pattern, alpha_pattern: r and lora_alpha of single modules, `{regex for a suffix of the path: value}`.
        modules_to_save: modules that are also trained, in full. None: a classifier's head.
        ensure_weight_tying: train modules tied to one of them (the head to the embedding) as the same weight. False:
            train them separately. PEFT's default is False.
        init_lora_weights: True (A Kaiming uniform, B zero), "gaussian" (A normal with std 1/r, B zero), False (both
            random: the adapter changes the model from the start), or a start of `starts.py`: from the weight ("pissa",
            "pissa_niter_16", "olora", "mica"), from data ("eva", "corda", "lora_ga"), or random ("orthogonal").
        eva_config, corda_config, lora_ga_config: fields of `EvaConfig`, `CordaConfig`, `LoraGAConfig`.
        frozen_start: subtract the initial A0 and B0: y = W x + scale (B A - B0 A0) x. Saved as a LoRA of rank 2 r. It
            is set where `init_lora_weights` needs it.
        layer_replication: `[[first, last + 1], ...]`: the adapters are for a model whose layers were repeated with
            `peftcore_lora.replicate_layers`.
        lora_plus_ratio: learning rate of B, in multiples of A's. lora_fa: freeze A. See `training.py`.
        use_bdlora: A or B is block-diagonal, with `nblocks` blocks, in layers whose path contains a name of
            `target_modules_bd_a` or `target_modules_bd_b`; with `match_strict` (default) all layers must. See
            `blocks.py`.
        lora_bias: B also has a bias `[out]`: y = W x + scale · (B A x + b). It merges where the layer has a bias.
        bias: biases that are also trained: "none", "all", or "lora_only" (of adapted modules).
        fan_in_fan_out: written for PEFT, which needs True for GPT-2; peftcore reads the layout from the layer.
        kept_dropout: lora_dropout saved in files with target_parameters, for which PEFT requires 0.
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

    reaches_experts: ClassVar[bool] = True  # of methods that contain a LoRA, too
    adapts_attention: ClassVar[bool] = True  # nn.MultiheadAttention; without it `all-linear` leaves attention out

    def __post_init__(self) -> None:
        validation.check_types(self)
        for r in (self.r, *self.rank_pattern.values(), *([] if self.expert_r is None else [self.expert_r])):
            validation.positive_whole(r=r)
        validation.probability(lora_dropout=self.lora_dropout)
        check_start(self.init_lora_weights)
        ratio, start = self.lora_plus_ratio, self.init_lora_weights
        validation.require(ratio is None or ratio > 0, f"lora_plus_ratio must be above 0, found {ratio!r}")
        validation.require(
            not self.lora_fa or start in (True, False, "gaussian", "orthogonal", "eva"),
            f"lora_fa=True freezes A at its start, which init_lora_weights={start!r} does not allow. Choose True",
        )

        other = replace(self, use_bdlora=None).linear_alone if self.use_bdlora else None
        validation.require(other is None, f"use_bdlora is not supported with {other}. Leave one of them out")

    @property
    def linear_alone(self) -> str | None:
        """Return a field that is only supported for linear layers, and its value, or None."""
        fields = [name for name in ("lora_bias", "lora_fa", "frozen_start") if getattr(self, name)]
        fields += ["init_lora_weights"] if self.init_lora_weights not in (True, False, "gaussian") else []
        fields += ["use_bdlora"] if self.use_bdlora else []
        return f"{fields[0]}={getattr(self, fields[0])!r}" if fields else None

    def resolved(self, model: nn.Module, architecture: Architecture) -> LoraConfig:
        """Return the config with choices that depend on the model made explicit, so that it means the same anywhere."""
        chosen, config = selected(model, self, architecture), _with_experts(model, self)
        if self.target_modules == targets.ALL_LINEAR:
            config = replace(config, target_modules=targets.minimal_suffixes(model, chosen))
        starts = is_subtracted(self.init_lora_weights) or self.frozen_start
        return replace(config, frozen_start=starts, fan_in_fan_out=any(map(targets.is_conv1d, chosen.values())))


def _with_experts(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """Return the config with all selected experts in target_parameters, and their ranks and scales in patterns."""
    given, found = list(config.target_parameters or ()), _reached_experts(model, config)
    weights = {f"{path}.{name}": path for path, names in targets.expert_weights(model).items() for name in names}
    named = [name for name in weights if any(targets.matches(pattern, name) for pattern in given)]
    validation.require(
        config.expert_r is None or bool(found or named), f"expert_r={config.expert_r}: no experts are selected"
    )
    ranks: dict[int, list[str]] = {}
    for name in dict.fromkeys([*found, *named]) if config.expert_r else (n for n in found if n not in named):
        share = config.r // targets.experts_per_token(model.get_submodule(weights[name]), model)
        ranks.setdefault(config.expert_r or max(1, share), []).append(name)
    rank_pattern, alpha_pattern = dict(config.rank_pattern), dict(config.alpha_pattern)
    for r, names in ranks.items():
        names = [name for name in names if r != config.r and not _pattern_of(config.rank_pattern, name)]
        rank_pattern |= dict.fromkeys(_suffixes(model, names), r)
        names = [name for name in names if not config.use_rslora and not _pattern_of(config.alpha_pattern, name)]
        alpha_pattern |= dict.fromkeys(_suffixes(model, names), config.lora_alpha * r / config.r)
    modules = targets.name_experts(model, config.target_modules, is_adaptable)[0] if found else config.target_modules
    return replace(
        config,
        target_modules=modules,
        target_parameters=list(dict.fromkeys([*given, *_suffixes(model, found)])),
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        expert_r=None,
    )


def _reached_experts(model: nn.Module, config: LoraConfig) -> list[str]:
    """Return the full names of the experts' weights that target_modules selects."""
    every = config.target_modules == targets.ALL_LINEAR
    if not config.reaches_experts or (every and config.target_parameters is not None):
        return []
    choice = {name: getattr(config, name) for name in CHOICE}
    found = targets.select_experts(model, supported=is_adaptable, **choice)
    if found and every and config.linear_alone:
        warn(f"{config.linear_alone} is supported only for linear layers, so experts are left out")
        return []
    return found


def _pattern_of(patterns: dict[str, int] | dict[str, float], name: str) -> bool:
    return targets.pattern_value(patterns, name, None) is not None


def _suffixes(model: nn.Module, names: list[str]) -> list[str]:
    return targets.parameter_suffixes(model, names) if names else []


def of_ranks(model: nn.Module, config: LoraConfig | None, ranks: Mapping[str, int]) -> LoraConfig:
    """Return the config for adapters of these ranks at only these modules or parameters, with scale 1."""
    parameters = [path for path in ranks if path in dict(targets.base_parameters(model))]
    r = max(set(ranks.values()), key=list(ranks.values()).count)
    others = {path: rank for path, rank in ranks.items() if rank != r}
    # A path may also be a suffix of another module's; ^ prevents that.
    pattern = {f"^{path}$" if any(p.endswith(f".{path}") for p in ranks) else path: n for path, n in others.items()}
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


def scaled(config: LoraConfig, factor: float) -> LoraConfig:
    """Return the config with `factor` times the scale."""
    alphas = {path: factor * alpha for path, alpha in config.alpha_pattern.items()}
    return replace(config, lora_alpha=factor * config.lora_alpha, alpha_pattern=alphas)


OF_KIN = """r lora_alpha lora_dropout target_modules exclude_modules layers_to_transform layers_pattern rank_pattern
    alpha_pattern modules_to_save ensure_weight_tying use_rslora init_lora_weights bias fan_in_fan_out""".split()  # noqa: SIM905


def refuse_fields(config: LoraConfig, method: str) -> None:
    """Raise a PeftcoreError for fields and starts of LoRA that a method with a LoRA inside does not support."""
    plain = LoraConfig()
    for name in (each.name for each in fields(plain) if each.name not in OF_KIN):
        found = getattr(config, name)
        validation.require(
            (found or None) == (getattr(plain, name) or None),  # [] is None
            f"{name}={found!r} is not supported with {method}. Leave it out, or choose LoRA",
        )
    validation.one_of((True, False, "gaussian"), init_lora_weights=config.init_lora_weights)


def selected(model: nn.Module, config: LoraConfig, architecture: Architecture) -> dict[str, nn.Module]:
    """Return the layers that the config selects, by path, among those that LoRA can adapt."""
    modules, experts = config.target_modules, list[str]()
    if config.reaches_experts:
        modules, experts = targets.name_experts(model, modules, is_adaptable)
    if not modules and (config.target_parameters or config.trainable_token_indices or experts):
        return {}
    leaves_out = modules == targets.ALL_LINEAR and not config.adapts_attention
    supported = targets.is_linear if leaves_out else is_adaptable
    return targets.select_by(config, model, architecture, supported=supported, target_modules=modules)
