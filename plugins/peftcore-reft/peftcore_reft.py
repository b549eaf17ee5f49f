"""ReFT (Wu et al. 2024, arXiv 2404.03592): edits of chosen tokens' hidden states within a subspace.

    LoReFT     h -> h + Rᵀ (W h + b - R h)      R [r, d] with orthonormal rows, W [r, d], b [r]      (section 3.2)
    NoReFT     h -> h + Rᵀ (W h + b - R h)      R any matrix:          orthogonality=False
    DiReFT     h -> h + Rᵀ (W h + b)            neither:               and subtract_projection=False

for the first p tokens of a text and its last s (section 3.3), which have separate R, W and b, or shared ones with
`tied_weights`. W starts as R (DiReFT: as 0) and b as 0, so the start is the base. Trained: 2 · r · d + r numbers each.

Tokens are counted without padding. The last tokens are those of the prompt, also when generation continues, with a
cache or not. `model(..., prompt_lengths=n)`, int64 `[batch]`, gives the prompt's length; without it, the prompt is all
of the first call.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.plugin import (
    Adapter,
    After,
    Architecture,
    Around,
    ForeignFormat,
    Method,
    Placement,
    StateRules,
    TokenCounter,
    current_call,
    decoder_path,
    detect,
    hookimpl,
    targets,
    validation,
)

peftcore_api = ">=3.0,<4"

ACTIVATIONS = {
    **{name: getattr(F, name) for name in ("relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu", "elu", "mish")},
    # AdapterHub's names
    **{"swish": F.silu, "leakyrelu": F.leaky_relu, "gelu_new": partial(F.gelu, approximate="tanh")},
}
WITHOUT_LENGTHS = (
    "ReFT edits the last tokens of a call, which change at each step when a text grows without a cache. Pass "
    "prompt_lengths, the number of tokens of the prompt, to generate or model(...)"
)


@dataclass(frozen=True)
class ReftConfig:
    """Config with the field names of AdapterHub's `LoReftConfig`, except `layers`, here layers_to_transform.

    Args:
        r: rank of the subspace.
        prefix_positions, suffix_positions: number of first and last tokens, p and s.
        orthogonality, subtract_projection, tied_weights: see the module's docstring.
        dropout: dropout probability of the edited vectors, as in the paper's code.
        non_linearity: activation of W h + b, one of `ACTIVATIONS`. None: none. With an activation and
            `subtract_projection` the start differs from the base.
        target_modules: modules whose outputs are edited, instead of all layers; exclude_modules,
            layers_to_transform, layers_pattern: see `peftcore.model.targets.select`.
    """

    r: int = 1
    prefix_positions: int = 3
    suffix_positions: int = 0
    orthogonality: bool = True
    subtract_projection: bool = True
    tied_weights: bool = False
    dropout: float = 0.05
    non_linearity: str | None = None
    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] | None = None

    def __post_init__(self) -> None:
        validation.check_types(self)
        validation.positive_whole(r=self.r)
        validation.probability(dropout=self.dropout)
        if self.non_linearity is not None:
            validation.one_of(ACTIVATIONS, non_linearity=self.non_linearity)
        require, counts = validation.require, (self.prefix_positions, self.suffix_positions)
        require(
            min(counts) >= 0 and max(counts) > 0,
            f"no tokens are chosen: prefix_positions and suffix_positions are {counts}",
        )
        require(
            self.target_modules is not None or not (self.exclude_modules or self.layers_pattern),
            "exclude_modules and layers_pattern need target_modules. Without it, use layers_to_transform",
        )


class Unit(nn.Module):
    """Edit of hidden states h `[..., d]`."""

    def __init__(self, config: ReftConfig, path: str, width: int) -> None:
        super().__init__()
        wanted = f"r={config.r} is more than the width of '{path}', {width}. Choose a smaller r"
        validation.require(config.r <= width, wanted)
        self.config = config
        self.learned_source = nn.Linear(width, config.r)
        self.projection = nn.Linear(width, config.r, bias=False)
        if config.orthogonality:
            nn.init.orthogonal_(self.projection.weight)
        nn.init.zeros_(self.learned_source.bias)
        with torch.no_grad():
            start = self.subspace() if config.subtract_projection else torch.zeros_like(self.projection.weight)
            self.learned_source.weight.copy_(start)

    def subspace(self) -> Tensor:
        """Return R `[r, d]`, float32: rows of the parameter, orthonormalised one after the other if `orthogonality`."""
        weight = self.projection.weight.float()
        if not self.config.orthogonality:
            return weight
        q, triangle = torch.linalg.qr(weight.T)
        return (q * triangle.diagonal().sign()).T

    def forward(self, h: Tensor) -> Tensor:
        r, w, b = self.subspace(), self.learned_source.weight.float(), self.learned_source.bias.to(h.dtype)
        if self.config.non_linearity is None:  # one product, exactly 0 where W is R
            source = F.linear(h, (w - r if self.config.subtract_projection else w).to(h.dtype), b)
        else:
            source = ACTIVATIONS[self.config.non_linearity](F.linear(h, w.to(h.dtype), b))
            if self.config.subtract_projection:
                source = source - F.linear(h, r.to(h.dtype))
        return F.dropout(h + source @ r.to(h.dtype), self.config.dropout, self.training)


class Reft(Adapter):
    """Edits after a layer, y `[batch, tokens, d]`; units are `first` and `last`, where they have tokens, or `both`."""

    needs_call = ("prompt_lengths",)
    whole_batch = True

    def __init__(self, config: ReftConfig, path: str, width: int, counter: TokenCounter) -> None:
        super().__init__()
        self.config, self.counter = config, counter
        counts = {"first": config.prefix_positions, "last": config.suffix_positions}
        names = ["both"] if config.tied_weights else [name for name, count in counts.items() if count]
        self.units = nn.ModuleDict({name: Unit(config, path, width) for name in names})

    def forward(self, y: Tensor) -> Tensor:
        edited = y
        for name, chosen in zip(("first", "last"), self.chosen(y), strict=True):
            if name in self.units or "both" in self.units:
                unit = self.units[name if name in self.units else "both"]
                edited = torch.where(chosen[..., None], unit(y), edited)
        return edited

    def chosen(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return masks `[batch, tokens]` of the first and of the last tokens."""
        config, places = self.config, self.counter.places(y)
        place, length = places.place, places.length
        call = current_call()
        given = call.get("prompt_lengths")
        if given is not None:
            message = (
                "prompt_lengths has one length per row, but position_ids pack several texts into a row. Leave it out"
            )
            validation.require(not places.packed(), message)
            length = torch.as_tensor(given, device=y.device).reshape(-1, 1)
            message = (
                f"prompt_lengths has {len(length)} lengths, and the batch has {len(y)} rows. Give one for each row"
            )
            validation.require(len(length) in (1, len(y)), message)
        elif config.suffix_positions and not self.training and call.get("use_cache") is False and not places.packed():
            warnings.warn(WITHOUT_LENGTHS, stacklevel=2)
        first = place <= config.prefix_positions
        last = (place <= length) & (place > length - config.suffix_positions)
        return first & places.is_text, last & places.is_text


def layers(model: nn.Module, config: ReftConfig, architecture: Architecture) -> dict[str, tuple[int, int]]:
    """Return {module that returns a layer's hidden states: (index of the layer, width)}."""
    kinds = {"attention", "cross_attention", "feed_forward"}
    last: dict[str, Any] = {}
    for sublayer in targets.sublayers(model, architecture, kinds, config.layers_to_transform):
        last[re.split(rf"(?<=\.{sublayer.layer})\.", f".{sublayer.output}.", maxsplit=1)[0]] = sublayer
    nameless = [s.output for s in last.values() if s.norm is None and s.stream is None]
    validation.require(
        not nameless,
        f"no module of {type(model).__name__} returns the sum of '{', '.join(nameless[:2])}' and its residual. "
        "Name modules: target_modules=[...]",
    )
    return {s.norm or s.stream: (s.layer, s.width) for s in last.values()}


def place(model: nn.Module, config: ReftConfig, architecture: Architecture) -> list[Placement]:
    if config.target_modules is None:
        found = {path: width for path, (_, width) in layers(model, config, architecture).items()}
    else:
        chosen = targets.select_by(config, model, architecture, supported=lambda m: not isinstance(m, nn.ModuleList))
        found = {path: targets.widths(model, path, architecture)[1] for path in chosen}
    counters: dict[str, tuple[str, TokenCounter]] = {}
    placements = []
    for path, width in found.items():
        stack = next(
            (name for name in ("encoder", "decoder") if path.startswith(f"{getattr(architecture, name)}.")), ""
        )
        if stack not in counters:
            at = getattr(architecture, stack) if stack else decoder_path(model, architecture)
            counters[stack] = at, TokenCounter(model.get_submodule(at), stack, "ReFT")
        placements.append(After(path, Reft(config, path, width, counters[stack][1])))
    return [*(Around(*each) for each in counters.values()), *placements]


KEY = re.compile(r"(?P<stack>.*?)\.?(?P<layer>\d+)\.reft_layer\.refts\.[^.]+\.units\.(?P<unit>\d)\.(?P<tensor>.+)")


def read(model: nn.Module, fields: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """Return the config and tensors of a file of AdapterHub's `adapters`."""
    theirs = fields["config"]
    names = ("r", "prefix_positions", "suffix_positions", "orthogonality", "tied_weights", "dropout", "non_linearity")
    matched = {key: match for key in tensors if (match := KEY.fullmatch(key)) is not None}
    strange = next((key for key in tensors if key not in matched), None)
    validation.require(bool(matched) and strange is None, f"its tensor '{strange}' does not belong to a ReFT")
    numbers = sorted({int(match["layer"]) for match in matched.values()})
    plain = {name: theirs[name] for name in names if name in theirs}
    if isinstance(act := plain.get("non_linearity"), str):
        plain["non_linearity"] = act.lower()
    subtracts = theirs.get("subtract_projection", True if plain.get("orthogonality") is True else None)
    validation.require(
        subtracts is not None,
        "it is a NoReFT or a DiReFT: `adapters` does not write which, and reads both as NoReFT. Add "
        '"subtract_projection": true (NoReFT) or false (DiReFT) to "config" in its adapter_config.json',
    )
    config = ReftConfig(**plain, subtract_projection=subtracts, layers_to_transform=numbers, modules_to_save=())
    facts = detect(model)
    there = {(index, _decodes(path)): path for path, (index, _) in layers(model, config, facts).items()}
    found = {}
    units = {"0": "both"} if config.tied_weights else {"0": "first", "1": "last"}
    used = {
        "both",
        *(n for n, count in (("first", config.prefix_positions), ("last", config.suffix_positions)) if count),
    }
    parts: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, match in matched.items():
        at = int(match["layer"]), _decodes(match["stack"])
        validation.require(at in there, f"its tensor '{key}' is not for a known layer of this model")
        if (unit := units.get(match["unit"])) not in used:
            continue  # for tokens that the config does not edit
        name = f"base_model.model.{there[at]}.units.{unit}"
        if match["tensor"].startswith("projection."):
            parts.setdefault((name, "projection"), {})[match["tensor"].removeprefix("projection.")] = tensors[key]
        else:
            found[f"{name}.{match['tensor']}"] = tensors[key]
    for (name, _), those in parts.items():
        found[f"{name}.projection.weight"] = _projection(those)
    return config, found


def _projection(those: Mapping[str, Tensor]) -> Tensor:
    """Return R from PyTorch's parametrization, which stores Householder vectors and a base `[d, r]`."""
    if "weight" in those:
        return those["weight"]
    raw = those["parametrizations.weight.original"]
    layer: Any = nn.utils.parametrizations.orthogonal(nn.Linear(raw.shape[1], raw.shape[0], bias=False))
    layer.load_state_dict(dict(those))
    found: Tensor = layer.weight.detach().clone()
    is_orthonormal = torch.allclose(found @ found.T, torch.eye(len(found)), atol=1e-3)
    validation.require(is_orthonormal, "the rows of one of its projections are not orthonormal. The file is damaged")
    return found


def _decodes(path: str) -> bool:
    return "decoder" in path.split(".")


def matches(fields: dict[str, Any]) -> bool:
    """Return whether the fields are those of a ReFT of `adapters`."""
    config = fields.get("config")
    return isinstance(config, dict) and config.get("architecture") == "reft" and {"model_type", "name"} <= fields.keys()


def about(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the name of the base, and all settings."""
    return {"base_model_name_or_path": fields.get("model_name") or None, **fields["config"]}


@hookimpl
def peftcore_methods() -> list[Method]:
    foreign = ForeignFormat("the library adapters", "adapter.safetensors", matches, read, about)
    rules = StateRules(peft_type="REFT", formats=(foreign,))
    return [Method("reft", ReftConfig, place, rules, learning_rate=3e-3)]
