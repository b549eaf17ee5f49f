"""Reader of bottleneck adapters saved by AdapterHub's library `adapters` with `use_safetensors=True`.

    adapter_config.json   {"config": {"reduction_factor": 16, ...}, "model_type": ..., "name": ..., "version": ...}
    adapter.safetensors   <place>[.attention_adapters|.output_adapters].adapters.<name>.adapter_down.0.weight, ...
                          [<base>.]shared_parameters.<name>.phm_rule
                          [<base>.]invertible_adapters.<name>.F.0.weight, ...

Where `adapters` names modules differently, the sublayer is found by the layer's number and the end of <place>. Heads
are in another file and are not read. Names of the predecessor `adapter-transformers` are read as `adapters` reads them.
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
# Settings with which the library computes the same function as the method.
_WANTED = {"adapter_residual_before_ln": (False,), "inv_adapter": (None, "nice")}
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
_OURS = {"W_left": "factors.left", "W_right": "factors.right", "W": "factors.whole", "b": "bias"}
_OURS |= {"phm_rule_left": "rule.left", "phm_rule_right": "rule.right", "phm_rule": "rule.whole"}


def matches(fields: dict[str, Any]) -> bool:
    """Return whether the fields are of a bottleneck adapter of `adapters` (or of `adapter-transformers`)."""
    theirs = fields.get("config")
    return isinstance(theirs, dict) and theirs.get("architecture") != "reft" and {"model_type", "name"} <= fields.keys()


def about(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the name of the base, and all settings of the bottleneck."""
    return {"base_model_name_or_path": fields.get("model_name") or None, **fields["config"]}


def read(model: nn.Module, fields: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """Return the config, and the tensors under peftcore's names."""
    theirs = _settings(fields["config"])
    tensors = {
        _OLDER.sub(".adapters.", key).replace("invertible_lang_", "invertible_"): tensors[key] for key in tensors
    }
    common = {key: match for key in tensors if (match := _COMMON.fullmatch(key)) is not None}
    matched = {key: match for key in tensors if key not in common and (match := _KEY.fullmatch(key)) is not None}
    strange = next((key for key in tensors if key not in matched and key not in common), None)
    if strange is not None or not matched:
        raise PeftcoreError(
            f"its tensor '{strange}' does not belong to a bottleneck" if strange else "it has no tensor"
        )
    facts = detect(model)
    used = {match["place"]: sublayer_at(match["place"], facts.sublayers) for match in matched.values()}
    inverts = any(match["what"] == "invertible_adapters" for match in common.values())
    # a text_task names it without having one
    if theirs.get("inv_adapter") and not inverts and fields.get("type") != "text_task":
        raise PeftcoreError("it uses inv_adapter='nice', and the file lacks that adapter's tensors")
    shared = any(match["what"] == "shared_parameters" for match in common.values())
    if theirs.get("phm_layer") and not shared and (theirs.get("shared_phm_rule", True) or theirs.get("shared_W_phm")):
        raise PeftcoreError(
            "its layers share parameters that are not in the file: `adapters` writes shared_parameters only for models "
            "with a head. Save it again from such a model"
        )
    config = _config(theirs, fields, facts.sublayers, used, inverts)
    if config.is_parallel and any(sublayer.norm is None for sublayer in used.values()):
        raise PeftcoreError(
            f"it is a parallel adapter, which in `adapters` reads the input of the norm of {type(model).__name__}, and "
            "in peftcore its output. Train it with peftcore"
        )
    return config, _renamed(model, config, facts, tensors, used, matched, common)


def _settings(theirs: dict[str, Any]) -> dict[str, Any]:
    """Return the library's settings, checked."""
    if "reduction_factor" not in theirs:
        raise PeftcoreError(
            f"it is not a bottleneck adapter (architecture: {theirs.get('architecture')!r}), so it cannot be read"
        )
    older = theirs.get("invertible_adapter")
    if isinstance(older, dict):
        theirs = {
            **theirs,
            "inv_adapter": older.get("block_type"),
            "inv_adapter_reduction_factor": older.get("reduction_factor", 2),
        }
    if theirs.get("inv_adapter_reduction_factor") is None:
        theirs = {name: value for name, value in theirs.items() if name != "inv_adapter_reduction_factor"}
    for name, allowed in _WANTED.items():
        if theirs.get(name, allowed[0]) not in allowed:
            raise PeftcoreError(
                f"it uses {name}={theirs[name]!r}, which peftcore's bottlenecks do not have; without it the adapter "
                "would compute something else"
            )
    for names, types, what in _TYPES:
        for name in names:
            if name in theirs and type(theirs[name]) not in types:
                raise PeftcoreError(f"it uses {name}={theirs[name]!r}; only {what} can be read")
    if theirs["reduction_factor"] <= 0:
        raise PeftcoreError(f"it uses reduction_factor={theirs['reduction_factor']!r}, which must be above 0")
    if type(theirs.get("scaling", 1.0)) not in (int, float) and theirs["scaling"] not in ("learned", "channel"):
        raise PeftcoreError(f"it uses scaling={theirs['scaling']!r}; only a number, 'learned' or 'channel' can be read")
    if "non_linearity" not in theirs:
        raise PeftcoreError("its config has no non_linearity")
    before, after = theirs.get("original_ln_before", False), theirs.get("original_ln_after", True)
    residual = theirs.get("residual_before_ln", True) if before and not theirs.get("is_parallel") else after
    if not (after is residual and (after or before)):
        raise PeftcoreError(
            f"it uses original_ln_before={before}, original_ln_after={after} and "
            f"residual_before_ln={theirs.get('residual_before_ln', True)!r}, which add the residual twice, or lose it"
        )
    return theirs


def _config(
    theirs: dict[str, Any],
    fields: dict[str, Any],
    known: Iterable[Any],
    used: Mapping[str, Any],
    inverts: bool,
) -> AdapterConfig:
    layers, kinds = {s.layer for s in used.values()}, {s.kind for s in used.values()}
    after = theirs.get("original_ln_after", True)
    parallel = bool(theirs.get("is_parallel"))
    phm = {name: theirs[name] for name in _PHM if name in theirs} if theirs.get("phm_layer") else {}
    if phm and theirs.get("factorized_phm_W", True):
        phm["phm_rank"] = theirs.get("phm_rank", 1)
    if inverts:
        # `adapters` adds no inverse to transformers' classes, but to its `...AdapterModel` classes; its predecessor
        # added it to all.
        static = str(fields.get("version")).startswith("adapters.") and "AdapterModel" not in str(
            fields.get("model_class")
        )
        phm |= {"inv_adapter": "nice", "inv_adapter_output": not static}
        phm |= {name: theirs[name] for name in ("inv_adapter_reduction_factor",) if name in theirs}
    scaling = theirs.get("scaling", 1.0)
    return AdapterConfig(
        placement=_placement(kinds),
        cross_adapter="cross_attention" in kinds,
        is_parallel=parallel,
        original_ln_before=bool(theirs.get("original_ln_before")) and not parallel,
        original_ln_after=after,
        residual_before_ln=after,
        bottleneck_size=max(1, int(next(iter(used.values())).width // theirs["reduction_factor"])),
        non_linearity=theirs["non_linearity"].lower(),
        scaling=scaling if scaling in ("learned", "channel") else float(scaling),
        ln_before=theirs.get("ln_before", False),
        ln_after=theirs.get("ln_after", False),
        use_gating=theirs.get("use_gating", False),
        dropout=theirs.get("dropout", 0.0),
        stochastic_depth=theirs.get("stochastic_depth", 0.0),
        phm_layer=theirs.get("phm_layer", False),
        layers_to_transform=sorted(layers) if layers != {s.layer for s in known} else None,
        modules_to_save=(),
        **phm,
    )


def _renamed(
    model: nn.Module,
    config: AdapterConfig,
    facts: Architecture,
    tensors: Mapping[str, Tensor],
    used: Mapping[str, Any],
    matched: Mapping[str, re.Match[str]],
    common: Mapping[str, re.Match[str]],
) -> dict[str, Tensor]:
    """Return the tensors under peftcore's names."""
    placements = place(model, config, facts)
    bottlenecks: list[Any] = [p for p in placements if not isinstance(p, Train) and hasattr(p.adapter, "adapter_down")]
    known = [s for s in facts.sublayers if any(s is u for u in used.values())]
    at = dict(zip(map(id, known), bottlenecks, strict=True))
    found: dict[str, Tensor] = {}
    for key, match in matched.items():
        name = _name(match["tensor"], config)
        if name is not None:
            found[tensor_name(at[id(used[match["place"]])], name)] = tensors[key]
    for key, match in common.items():
        name, first = match["tensor"], bottlenecks[0]
        if match["what"] == "invertible_adapters":
            first = placements[0]
        elif name.startswith("W_"):
            _, side, half = f"{name}_whole".split("_")[:3]
            name = f"adapter_{side}.factors.{half}"
        else:
            name = f"adapter_down.{_OURS.get(name, name)}"
        found[tensor_name(first, name)] = tensors[key]
    return found


def _name(name: str, config: AdapterConfig) -> str | None:
    """Return peftcore's name of a bottleneck's tensor, or None for the norm that the file has twice."""
    if config.ln_before:
        if name.startswith("adapter_down.0."):
            return None  # the norm, which also has its own name
        name = name.replace("adapter_down.1.", "adapter_down.0.")
    name = name.replace("adapter_down.0.", "adapter_down.")
    if config.phm_layer and name.startswith(("adapter_down.", "adapter_up.")):
        part, last = name.split(".", 1)
        return f"{part}.{_OURS.get(last, last)}"
    return name


def _placement(kinds: Collection[str]) -> Literal["houlsby", "pfeiffer", "attention"]:
    if "feed_forward" in kinds:
        return "houlsby" if "attention" in kinds else "pfeiffer"
    return "attention"


def sublayer_at(place: str, known: Iterable[Any]) -> Any:
    """Return the sublayer at a place such as `bert.encoder.layer.0.attention.output` or `model.layers.3.output`."""
    parts = _PLACE.fullmatch(place)
    if parts is not None:
        rest = parts["rest"] or ""
        kind = _KINDS.get(rest.rpartition(".")[2])
        for sublayer in known:
            own = _PLACE.fullmatch(sublayer.output)
            if (
                own is None
                or sublayer.layer != int(parts["layer"])
                or _in_decoder(parts["stack"]) != _in_decoder(own["stack"])
            ):
                continue
            if sublayer.kind == kind if kind else (own["rest"] or "").startswith(f"{rest}."):
                return sublayer
    raise PeftcoreError(f"it has an adapter at '{place}', which is not a known sublayer of this model")


def _in_decoder(stack: str) -> bool:
    return "decoder" in stack.split(".")


FORMAT = ForeignFormat("the library adapters", "adapter.safetensors", matches, read, about)
