"""Reads bottleneck adapters that AdapterHub's library `adapters` saved with `use_safetensors=True`.

    adapter_config.json   {"config": {"reduction_factor": 16, ...}, "model_type": ..., "name": ..., "version": ...}
    adapter.safetensors   <place>[.attention_adapters|.output_adapters].adapters.<name>.adapter_down.0.weight, ...

Where it names modules differently, a layer's number and the end of the place tell the sublayer. Its heads lie
in a file of their own and are not read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

import peftcore
from peftcore.observation import detect

_KEY = re.compile(r"(?P<place>.+?)\.adapters\.[^.]+\.(?P<tensor>adapter_(?:down\.0|up)\.(?:weight|bias))")
_PLACE = re.compile(r"(?P<stack>.*?)\.?(?P<layer>\d+)(?:\.(?P<rest>.+))?")
_KINDS = {
    "attention_adapters": "attention",
    "cross_attention_adapters": "cross_attention",
    "output_adapters": "feed_forward",
}
# Settings under which the library computes what the method computes.
_WANTED = {
    "original_ln_after": (True,),
    "ln_before": (False,),
    "ln_after": (False,),
    "use_gating": (False,),
    "phm_layer": (False,),
    "inv_adapter": (None,),
    "stochastic_depth": (0.0,),
}


def matches(fields: dict[str, Any]) -> bool:
    """Is it an adapter_config.json of `adapters` (or its predecessor `adapter-transformers`)?"""
    return isinstance(fields.get("config"), dict) and {"model_type", "name"} <= fields.keys()


def foreign_format(config_class: type, of_sublayer: Callable[..., Any]) -> peftcore.ForeignFormat:
    """The format, read as a `config_class` whose placement at a sublayer is what `of_sublayer` gives."""
    read = partial(_read, config_class, of_sublayer)
    return peftcore.ForeignFormat("the library adapters", "adapter.safetensors", matches, read, about)


def _read(
    config_class: type,
    of_sublayer: Callable[..., Any],
    model: nn.Module,
    fields: dict[str, Any],
    tensors: dict[str, Tensor],
) -> tuple[Any, dict[str, Tensor]]:
    """The config, and the tensors by their names here."""
    theirs = fields["config"]
    if "reduction_factor" not in theirs:
        raise peftcore.PeftcoreError(
            f"it is no bottleneck adapter (architecture: {theirs.get('architecture')!r}), and only these can be read"
        )
    for name, allowed in _WANTED.items():
        if theirs.get(name, allowed[0]) not in allowed:
            raise peftcore.PeftcoreError(
                f"it uses {name}={theirs[name]!r}, which a bottleneck here does not have; without it the adapter "
                "would compute something else"
            )
    if theirs.get("original_ln_before") and theirs.get("residual_before_ln", True) is not True:
        raise peftcore.PeftcoreError(
            f"it uses residual_before_ln={theirs['residual_before_ln']!r}; here f adds to what comes before the norm"
        )
    for names, types, what in (
        (("reduction_factor", "scaling", "dropout"), (int, float), "a number"),
        (("is_parallel", "original_ln_before"), (bool,), "true or false"),
        (("non_linearity",), (str,), "a text"),
    ):
        for name in names:
            if name in theirs and type(theirs[name]) not in types:
                raise peftcore.PeftcoreError(f"it uses {name}={theirs[name]!r}; only {what} can be read")
    if "non_linearity" not in theirs:
        raise peftcore.PeftcoreError("it does not say its non_linearity")
    facts = detect(model)
    found: dict[str, Tensor] = {}
    matched = {key: match for key in tensors if (match := _KEY.fullmatch(key)) is not None}
    strange = next((key for key in tensors if key not in matched), None)
    if strange is not None or not matched:
        raise peftcore.PeftcoreError(
            f"its tensor '{strange}' belongs to no bottleneck" if strange else "it has no tensor"
        )
    used = {match["place"]: _sublayer(match["place"], facts.sublayers) for match in matched.values()}
    parallel = bool(theirs.get("is_parallel"))
    if parallel and any(sublayer.norm is None for sublayer in used.values()):
        raise peftcore.PeftcoreError(
            f"a parallel adapter of `adapters` reads what comes before the norm of {type(model).__name__}; "
            "here it reads what comes behind it"
        )
    layers = {sublayer.layer for sublayer in used.values()}
    kinds = {sublayer.kind for sublayer in used.values()}
    config = config_class(
        placement=_placement(kinds),
        cross_adapter="cross_attention" in kinds,
        is_parallel=parallel,
        original_ln_before=bool(theirs.get("original_ln_before")) and not parallel,
        bottleneck_size=next(t.shape[0] for key, t in tensors.items() if key.endswith("down.0.bias")),
        non_linearity=theirs["non_linearity"].lower(),
        scaling=float(theirs.get("scaling", 1.0)),
        dropout=theirs.get("dropout", 0.0),
        layers_to_transform=sorted(layers) if layers != {s.layer for s in facts.sublayers} else None,
        modules_to_save=(),
    )
    placements = {place: of_sublayer(model, sublayer, config, facts) for place, sublayer in used.items()}
    for key, match in matched.items():
        name = match["tensor"].replace("down.0", "down")
        found[peftcore.tensor_name(placements[match["place"]], name)] = tensors[key]
    return config, found


def _placement(kinds: Collection[str]) -> Literal["houlsby", "pfeiffer", "attention"]:
    if "feed_forward" in kinds:
        return "houlsby" if "attention" in kinds else "pfeiffer"
    return "attention"


def _sublayer(place: str, known: Iterable[Any]) -> Any:
    """The sublayer of a place such as `bert.encoder.layer.0.attention.output` or `model.layers.3.output_adapters`."""
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
    raise peftcore.PeftcoreError(f"its place '{place}' is no known sublayer of this model")


def _in_decoder(stack: str) -> bool:
    return "decoder" in stack.split(".")


def about(fields: dict[str, Any]) -> dict[str, Any]:
    """The base, and all settings of the bottleneck."""
    return {"base_model_name_or_path": fields.get("model_name") or None, **fields["config"]}
