"""Reader of bottleneck adapters saved by AdapterHub's library `adapters` with `use_safetensors=True`.

    adapter_config.json   {"config": {"reduction_factor": 16, ...}, "model_type": ..., "name": ..., "version": ...}
    adapter.safetensors   <place>[.attention_adapters|.output_adapters].adapters.<name>.adapter_down.0.weight, ...
                          [<base>.]shared_parameters.<name>.phm_rule
                          [<base>.]invertible_adapters.<name>.F.0.weight, ...

Where `adapters` names modules differently, the layer's number and the end of <place> identify the sublayer. Heads are
in another file and are not read. Names from the predecessor `adapter-transformers` are supported, as in `adapters`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

from torch import Tensor, nn

from peftcore.plugin import Architecture, ForeignFormat, PeftcoreError, Train, detect, tensor_name
from peftcore_adapter.config import AdapterConfig
from peftcore_adapter.placing import place

_KEY = re.compile(r"(?P<place>.+?)\.adapters\.[^.]+\.(?P<tensor>.+)")
_COMMON = re.compile(r"(?:.+\.)?(?P<what>shared_parameters|invertible_adapters)\.[^.]+\.(?P<tensor>.+)")
_PLACE = re.compile(r"(?P<stack>.*?)\.?(?P<layer>\d+)(?:\.(?P<rest>.+))?")
_KINDS = {
    "attention_adapters": "attention",
    "cross_attention_adapters": "cross_attention",
    "output_adapters": "feed_forward",
}
_OLDER = re.compile(r"\.(?:attention|layer)_text_(?:task|lang)_adapters\.")
# Values of the library's settings that peftcore supports.
_SUPPORTED = {"adapter_residual_before_ln": (False,), "inv_adapter": (None, "nice")}
_TYPES: tuple[tuple[tuple[str, ...], tuple[type, ...], str], ...] = (
    (("reduction_factor", "dropout", "stochastic_depth", "inv_adapter_reduction_factor"), (int, float), "a number"),
    (("phm_dim", "phm_rank"), (int,), "a whole number"),
    (("is_parallel", "original_ln_before", "original_ln_after", "ln_before", "ln_after"), (bool,), "true or false"),
    (("use_gating", "phm_layer", "factorized_phm_W", "shared_W_phm", "shared_phm_rule"), (bool,), "true or false"),
    (("factorized_phm_rule", "learn_phm", "phm_bias"), (bool,), "true or false"),
    (("non_linearity",), (str,), "a text"),
)
_PHM = (
    "phm_dim",
    "factorized_phm_W",
    "shared_W_phm",
    "shared_phm_rule",
    "factorized_phm_rule",
    "learn_phm",
    "phm_bias",
)
_RENAMED = {"W_left": "factors.left", "W_right": "factors.right", "W": "factors.whole", "b": "bias"}
_RENAMED |= {"phm_rule_left": "rule.left", "phm_rule_right": "rule.right", "phm_rule": "rule.whole"}


def matches(fields: dict[str, Any]) -> bool:
    """Return whether the fields describe a bottleneck adapter of `adapters` or `adapter-transformers`."""
    settings = fields.get("config")
    return (
        isinstance(settings, dict)
        and settings.get("architecture") != "reft"
        and {"model_type", "name"} <= fields.keys()
    )


def about(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the base model's name and all settings of the bottleneck."""
    return {"base_model_name_or_path": fields.get("model_name") or None, **fields["config"]}


def read(model: nn.Module, fields: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """Return the config and the tensors under peftcore's names."""
    settings = _settings(fields["config"])
    tensors = {
        _OLDER.sub(".adapters.", key).replace("invertible_lang_", "invertible_"): tensors[key] for key in tensors
    }
    common_keys = {key: match for key in tensors if (match := _COMMON.fullmatch(key)) is not None}
    bottleneck_keys = {
        key: match for key in tensors if key not in common_keys and (match := _KEY.fullmatch(key)) is not None
    }
    unknown_key = next((key for key in tensors if key not in bottleneck_keys and key not in common_keys), None)
    if unknown_key is not None or not bottleneck_keys:
        raise PeftcoreError(
            f"its tensor '{unknown_key}' does not belong to a bottleneck" if unknown_key else "it has no tensor"
        )
    facts = detect(model)
    sublayers = {match["place"]: sublayer_at(match["place"], facts.sublayers) for match in bottleneck_keys.values()}
    has_inverse = any(match["what"] == "invertible_adapters" for match in common_keys.values())
    # Adapters of type text_task name inv_adapter without having one.
    if settings.get("inv_adapter") and not has_inverse and fields.get("type") != "text_task":
        raise PeftcoreError(
            "it uses inv_adapter='nice', but the file lacks the tensors of the invertible adapter. Save the adapter "
            "again"
        )
    has_shared = any(match["what"] == "shared_parameters" for match in common_keys.values())
    if (
        settings.get("phm_layer")
        and not has_shared
        and (settings.get("shared_phm_rule", True) or settings.get("shared_W_phm"))
    ):
        raise PeftcoreError(
            "its layers share parameters that are not in the file: `adapters` writes shared_parameters only for models "
            "with a head. Save it again from such a model"
        )
    config = _config(settings, fields, facts.sublayers, sublayers, has_inverse)
    if config.is_parallel and any(sublayer.norm is None for sublayer in sublayers.values()):
        raise PeftcoreError(
            f"it is a parallel adapter, which reads the input of the norm of {type(model).__name__} in `adapters`, "
            "but its output in peftcore. Train the adapter with peftcore"
        )
    return config, _rename(model, config, facts, tensors, sublayers, bottleneck_keys, common_keys)


def _settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Check the library's settings, and return them with the current names."""
    if "reduction_factor" not in settings:
        raise PeftcoreError(
            f"its architecture is {settings.get('architecture')!r}, but peftcore can only read bottleneck adapters"
        )
    older_invertible = settings.get("invertible_adapter")
    if isinstance(older_invertible, dict):
        settings = {
            **settings,
            "inv_adapter": older_invertible.get("block_type"),
            "inv_adapter_reduction_factor": older_invertible.get("reduction_factor", 2),
        }
    if settings.get("inv_adapter_reduction_factor") is None:
        settings = {name: value for name, value in settings.items() if name != "inv_adapter_reduction_factor"}
    for name, supported in _SUPPORTED.items():
        if settings.get(name, supported[0]) not in supported:
            raise PeftcoreError(
                f"it uses {name}={settings[name]!r}, which peftcore's bottlenecks do not have; without it the adapter "
                "would compute something else"
            )
    for names, types, type_name in _TYPES:
        for name in names:
            if name in settings and type(settings[name]) not in types:
                raise PeftcoreError(f"it uses {name}={settings[name]!r}; only {type_name} can be read")
    if settings["reduction_factor"] <= 0:
        raise PeftcoreError(f"it uses reduction_factor={settings['reduction_factor']!r}, which must be positive")
    if type(settings.get("scaling", 1.0)) not in (int, float) and settings["scaling"] not in ("learned", "channel"):
        raise PeftcoreError(
            f"it uses scaling={settings['scaling']!r}; only a number, 'learned' or 'channel' can be read"
        )
    if "non_linearity" not in settings:
        raise PeftcoreError("its config has no non_linearity")
    before, after = settings.get("original_ln_before", False), settings.get("original_ln_after", True)
    residual = settings.get("residual_before_ln", True) if before and not settings.get("is_parallel") else after
    if not (after is residual and (after or before)):
        raise PeftcoreError(
            f"it uses original_ln_before={before}, original_ln_after={after} and "
            f"residual_before_ln={settings.get('residual_before_ln', True)!r}, which add the residual twice or lose it"
        )
    return settings


def _config(
    settings: dict[str, Any],
    fields: dict[str, Any],
    all_sublayers: Iterable[Any],
    sublayers: Mapping[str, Any],
    has_inverse: bool,
) -> AdapterConfig:
    layers, kinds = {s.layer for s in sublayers.values()}, {s.kind for s in sublayers.values()}
    after = settings.get("original_ln_after", True)
    parallel = bool(settings.get("is_parallel"))
    options = {name: settings[name] for name in _PHM if name in settings} if settings.get("phm_layer") else {}
    if options and settings.get("factorized_phm_W", True):
        options["phm_rank"] = settings.get("phm_rank", 1)
    if has_inverse:
        # `adapters` adds the inverse only to its own `...AdapterModel` classes; its predecessor added it to all.
        is_current = str(fields.get("version")).startswith("adapters.")
        omits_inverse = is_current and "AdapterModel" not in str(fields.get("model_class"))
        options |= {"inv_adapter": "nice", "inv_adapter_output": not omits_inverse}
        if "inv_adapter_reduction_factor" in settings:
            options["inv_adapter_reduction_factor"] = settings["inv_adapter_reduction_factor"]
    scaling = settings.get("scaling", 1.0)
    return AdapterConfig(
        placement=_placement(kinds),
        cross_adapter="cross_attention" in kinds,
        is_parallel=parallel,
        original_ln_before=bool(settings.get("original_ln_before")) and not parallel,
        original_ln_after=after,
        residual_before_ln=after,
        bottleneck_size=max(1, int(next(iter(sublayers.values())).width // settings["reduction_factor"])),
        non_linearity=settings["non_linearity"].lower(),
        scaling=scaling if scaling in ("learned", "channel") else float(scaling),
        ln_before=settings.get("ln_before", False),
        ln_after=settings.get("ln_after", False),
        use_gating=settings.get("use_gating", False),
        dropout=settings.get("dropout", 0.0),
        stochastic_depth=settings.get("stochastic_depth", 0.0),
        phm_layer=settings.get("phm_layer", False),
        layers_to_transform=sorted(layers) if layers != {s.layer for s in all_sublayers} else None,
        modules_to_save=(),
        **options,
    )


def _rename(
    model: nn.Module,
    config: AdapterConfig,
    facts: Architecture,
    tensors: Mapping[str, Tensor],
    sublayers: Mapping[str, Any],
    bottleneck_keys: Mapping[str, re.Match[str]],
    common_keys: Mapping[str, re.Match[str]],
) -> dict[str, Tensor]:
    """Return the tensors under peftcore's names."""
    placements = place(model, config, facts)
    bottlenecks: list[Any] = [p for p in placements if not isinstance(p, Train) and hasattr(p.adapter, "adapter_down")]
    used_sublayers = [s for s in facts.sublayers if any(s is u for u in sublayers.values())]
    by_sublayer = dict(zip(map(id, used_sublayers), bottlenecks, strict=True))
    renamed: dict[str, Tensor] = {}
    for key, match in bottleneck_keys.items():
        name = _name(match["tensor"], config)
        if name is not None:
            renamed[tensor_name(by_sublayer[id(sublayers[match["place"]])], name)] = tensors[key]
    for key, match in common_keys.items():
        name, owner = match["tensor"], bottlenecks[0]
        if match["what"] == "invertible_adapters":
            owner = placements[0]
        elif name.startswith("W_"):
            _, side, half = f"{name}_whole".split("_")[:3]
            name = f"adapter_{side}.factors.{half}"
        else:
            name = f"adapter_down.{_RENAMED.get(name, name)}"
        renamed[tensor_name(owner, name)] = tensors[key]
    return renamed


def _name(name: str, config: AdapterConfig) -> str | None:
    """Return peftcore's name of a bottleneck's tensor, or None for the norm, which the file has by two names."""
    if config.ln_before:
        if name.startswith("adapter_down.0."):
            return None
        name = name.replace("adapter_down.1.", "adapter_down.0.")
    name = name.replace("adapter_down.0.", "adapter_down.")
    if config.phm_layer and name.startswith(("adapter_down.", "adapter_up.")):
        part, parameter = name.split(".", 1)
        return f"{part}.{_RENAMED.get(parameter, parameter)}"
    return name


def _placement(kinds: Collection[str]) -> Literal["houlsby", "pfeiffer", "attention"]:
    if "feed_forward" in kinds:
        return "houlsby" if "attention" in kinds else "pfeiffer"
    return "attention"


def sublayer_at(place: str, sublayers: Iterable[Any]) -> Any:
    """Return the sublayer at a place such as `bert.encoder.layer.0.attention.output` or `model.layers.3.output`."""
    parts = _PLACE.fullmatch(place)
    if parts is not None:
        module_path = parts["rest"] or ""
        kind = _KINDS.get(module_path.rpartition(".")[2])
        for sublayer in sublayers:
            own_parts = _PLACE.fullmatch(sublayer.output)
            if own_parts is None or sublayer.layer != int(parts["layer"]):
                continue
            if _in_decoder(parts["stack"]) != _in_decoder(own_parts["stack"]):
                continue
            # Some models name the sublayer's kind in <place>, others the module that contains its output layer.
            is_inside = (own_parts["rest"] or "").startswith(f"{module_path}.")
            if (sublayer.kind == kind) if kind else is_inside:
                return sublayer
    raise PeftcoreError(f"it has an adapter at '{place}', which is not a known sublayer of this model")


def _in_decoder(stack: str) -> bool:
    return "decoder" in stack.split(".")


FORMAT = ForeignFormat("the library adapters", "adapter.safetensors", matches, read, about)
