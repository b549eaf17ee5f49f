"""ReFT (Wu et al. 2024, arXiv 2404.03592): edits the hidden states of the first and last tokens in a subspace.

    LoReFT     h -> h + Rᵀ (W h + b - R h)      R [r, d] with orthonormal rows, W [r, d], b [r]      (section 3.2)
    NoReFT     h -> h + Rᵀ (W h + b - R h)      R any matrix:          orthogonality=False
    DiReFT     h -> h + Rᵀ (W h + b)            R any matrix:          orthogonality=False, subtract_projection=False

for the first p and the last s tokens of a text (section 3.3). The two groups have separate R, W and b, or shared ones
with `tied_weights`. Initially W is R (0 for DiReFT) and b is 0, so the output is unchanged. Each group trains
2 · r · d + r parameters.

Tokens are counted without padding. The last tokens are the last of the prompt, also while generation appends tokens,
with or without a cache. `model(..., prompt_lengths=n)`, int64 `[batch]`, gives the length of each prompt; without it,
the prompt is the whole input of the first call.
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
LENGTHS_MISSING = (
    "ReFT edits the last tokens of each call, which change at each step of generation without a cache. Pass "
    "prompt_lengths, the number of tokens in each prompt, to generate or model(...)"
)


@dataclass(frozen=True)
class ReftConfig:
    """Config with the field names of AdapterHub's `LoReftConfig`, except that `layers` is layers_to_transform.

    Args:
        r: dimension of the subspace.
        prefix_positions, suffix_positions: number of first and last tokens to edit, p and s.
        orthogonality, subtract_projection, tied_weights: see the module's docstring.
        dropout: dropout probability of the edited vectors, as in the paper's code.
        non_linearity: activation applied to W h + b, one of `ACTIVATIONS`, or None. An activation together with
            `subtract_projection` changes the output before training.
        target_modules: modules whose outputs to edit, instead of all layers. exclude_modules, layers_to_transform,
            layers_pattern: see `peftcore.plugin.targets.select`.
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
        counts = (self.prefix_positions, self.suffix_positions)
        validation.require(
            min(counts) >= 0 and max(counts) > 0,
            f"prefix_positions and suffix_positions are {counts}, which selects no tokens. Set one above 0",
        )
        validation.require(
            self.target_modules is not None or not (self.exclude_modules or self.layers_pattern),
            "exclude_modules and layers_pattern need target_modules. Without it, use layers_to_transform",
        )


class Unit(nn.Module):
    """Edit of hidden states h `[..., d]`, with the names that AdapterHub gives its modules."""

    def __init__(self, config: ReftConfig, path: str, width: int) -> None:
        super().__init__()
        validation.require(
            config.r <= width, f"r={config.r} is more than the width of '{path}', {width}. Choose a smaller r"
        )
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
        """Return R `[r, d]`, fp32: the parameter, with rows orthonormalised in order if `orthogonality`."""
        weight = self.projection.weight.float()
        if not self.config.orthogonality:
            return weight
        q, upper = torch.linalg.qr(weight.T)
        return (q * upper.diagonal().sign()).T  # QR leaves the signs open; these make orthonormal rows stay as they are

    def forward(self, h: Tensor) -> Tensor:
        r, w, b = self.subspace(), self.learned_source.weight.float(), self.learned_source.bias.to(h.dtype)
        if self.config.non_linearity is None:
            # One product with W - R, so that the edit is exactly 0 while W is R.
            source = F.linear(h, (w - r if self.config.subtract_projection else w).to(h.dtype), b)
        else:
            source = ACTIVATIONS[self.config.non_linearity](F.linear(h, w.to(h.dtype), b))
            if self.config.subtract_projection:
                source = source - F.linear(h, r.to(h.dtype))
        return F.dropout(h + source @ r.to(h.dtype), self.config.dropout, self.training)


class Reft(Adapter):
    """Edits of a layer's output y `[batch, tokens, d]`, by the units `first` and `last`, or `both` if they are tied."""

    needs_call = ("prompt_lengths",)
    whole_batch = True

    def __init__(self, config: ReftConfig, path: str, width: int, counter: TokenCounter) -> None:
        super().__init__()
        self.config, self.counter = config, counter
        counts = {"first": config.prefix_positions, "last": config.suffix_positions}
        names = ["both"] if config.tied_weights else [name for name, count in counts.items() if count]
        self.units = nn.ModuleDict({name: Unit(config, path, width) for name in names})

    def forward(self, y: Tensor) -> Tensor:
        output = y
        for name, mask in zip(("first", "last"), self.token_masks(y), strict=True):
            if name in self.units or "both" in self.units:
                unit = self.units[name if name in self.units else "both"]
                output = torch.where(mask[..., None], unit(y), output)
        return output

    def token_masks(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return bool masks `[batch, tokens]` of the first and of the last tokens to edit."""
        config, places = self.config, self.counter.places(y)
        place, length = places.place, places.length
        call = current_call()
        prompt_lengths = call.get("prompt_lengths")
        if prompt_lengths is not None:
            validation.require(
                not places.packed(),
                "prompt_lengths has one length per row, but position_ids pack several texts into a row. Omit "
                "prompt_lengths",
            )
            length = torch.as_tensor(prompt_lengths, device=y.device).reshape(-1, 1)
            validation.require(
                len(length) in (1, len(y)),
                f"prompt_lengths has {len(length)} lengths, and the batch has {len(y)} rows. Pass one per row",
            )
        elif config.suffix_positions and not self.training and call.get("use_cache") is False and not places.packed():
            warnings.warn(LENGTHS_MISSING, stacklevel=2)
        is_first = place <= config.prefix_positions
        is_last = (place <= length) & (place > length - config.suffix_positions)
        return is_first & places.is_text, is_last & places.is_text


def layer_outputs(model: nn.Module, config: ReftConfig, architecture: Architecture) -> dict[str, tuple[int, int]]:
    """Return {path of the module that returns a layer's hidden states: (index of the layer, width)}."""
    kinds = {"attention", "cross_attention", "feed_forward"}
    last_sublayers: dict[str, Any] = {}  # by layer: later sublayers replace earlier ones
    for sublayer in targets.sublayers(model, architecture, kinds, config.layers_to_transform):
        layer_path = re.split(rf"(?<=\.{sublayer.layer})\.", f".{sublayer.output}.", maxsplit=1)[0]
        last_sublayers[layer_path] = sublayer
    without_module = [s.output for s in last_sublayers.values() if s.norm is None and s.stream is None]
    validation.require(
        not without_module,
        f"no module of {type(model).__name__} returns the sum of '{', '.join(without_module[:2])}' and its residual. "
        "Name modules: target_modules=[...]",
    )
    return {s.norm or s.stream: (s.layer, s.width) for s in last_sublayers.values()}


def place(model: nn.Module, config: ReftConfig, architecture: Architecture) -> list[Placement]:
    if config.target_modules is None:
        widths = {path: width for path, (_, width) in layer_outputs(model, config, architecture).items()}
    else:
        paths = targets.select_by(config, model, architecture, supported=lambda m: not isinstance(m, nn.ModuleList))
        widths = {path: targets.widths(model, path, architecture)[1] for path in paths}
    # An encoder and a decoder read different texts, so each has its own counter.
    counters: dict[str, TokenCounter] = {}
    counter_placements: list[Placement] = []
    placements: list[Placement] = []
    for path, width in widths.items():
        stack = next(
            (name for name in ("encoder", "decoder") if path.startswith(f"{getattr(architecture, name)}.")), ""
        )
        if stack not in counters:
            stack_path = getattr(architecture, stack) if stack else decoder_path(model, architecture)
            counters[stack] = TokenCounter(model.get_submodule(stack_path), stack, "ReFT")
            counter_placements.append(Around(stack_path, counters[stack]))
        placements.append(After(path, Reft(config, path, width, counters[stack])))
    return [*counter_placements, *placements]


KEY = re.compile(r"(?P<stack>.*?)\.?(?P<layer>\d+)\.reft_layer\.refts\.[^.]+\.units\.(?P<unit>\d)\.(?P<tensor>.+)")


def read(model: nn.Module, fields: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """Read the config and tensors of a file of AdapterHub's `adapters`.

    Raises:
        PeftcoreError: the file has a tensor of no ReFT or of an unknown layer, or does not tell NoReFT from DiReFT.
    """
    hub_config = fields["config"]
    names = ("r", "prefix_positions", "suffix_positions", "orthogonality", "tied_weights", "dropout", "non_linearity")
    matches = {key: match for key in tensors if (match := KEY.fullmatch(key)) is not None}
    other_key = next((key for key in tensors if key not in matches), None)
    validation.require(bool(matches) and other_key is None, f"the file's tensor '{other_key}' is not part of a ReFT")
    indices = sorted({int(match["layer"]) for match in matches.values()})
    options = {name: hub_config[name] for name in names if name in hub_config}
    if isinstance(activation := options.get("non_linearity"), str):
        options["non_linearity"] = activation.lower()
    subtracts = hub_config.get("subtract_projection", True if options.get("orthogonality") is True else None)
    validation.require(
        subtracts is not None,
        "the file is a NoReFT or a DiReFT: `adapters` does not write which, and reads both as NoReFT. Add "
        '"subtract_projection": true (NoReFT) or false (DiReFT) to "config" in its adapter_config.json',
    )
    config = ReftConfig(**options, subtract_projection=subtracts, layers_to_transform=indices, modules_to_save=())
    outputs = layer_outputs(model, config, detect(model))
    paths = {(index, _is_in_decoder(path)): path for path, (index, _) in outputs.items()}
    unit_names = {"0": "both"} if config.tied_weights else {"0": "first", "1": "last"}
    used_units = {"both"}
    used_units |= {"first"} if config.prefix_positions else set()
    used_units |= {"last"} if config.suffix_positions else set()
    converted: dict[str, Tensor] = {}
    projections: dict[str, dict[str, Tensor]] = {}
    for key, match in matches.items():
        layer = int(match["layer"]), _is_in_decoder(match["stack"])
        validation.require(layer in paths, f"the file's tensor '{key}' is not for a known layer of this model")
        unit = unit_names.get(match["unit"])
        if unit not in used_units:
            continue  # `adapters` also saves a unit for tokens that the config does not edit
        name = f"base_model.model.{paths[layer]}.units.{unit}"
        if match["tensor"].startswith("projection."):
            projections.setdefault(name, {})[match["tensor"].removeprefix("projection.")] = tensors[key]
        else:
            converted[f"{name}.{match['tensor']}"] = tensors[key]
    for name, projection in projections.items():
        converted[f"{name}.projection.weight"] = _projection_weight(projection)
    return config, converted


def _projection_weight(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return R `[r, d]` from the tensors of PyTorch's parametrization: Householder vectors and a base `[d, r]`."""
    if "weight" in tensors:
        return tensors["weight"]
    original = tensors["parametrizations.weight.original"]
    layer: Any = nn.utils.parametrizations.orthogonal(nn.Linear(original.shape[1], original.shape[0], bias=False))
    layer.load_state_dict(dict(tensors))
    weight: Tensor = layer.weight.detach().clone()
    is_orthonormal = torch.allclose(weight @ weight.T, torch.eye(len(weight)), atol=1e-3)
    validation.require(is_orthonormal, "a projection in the file has rows that are not orthonormal. It is damaged")
    return weight


def _is_in_decoder(path: str) -> bool:
    return "decoder" in path.split(".")


def is_adapterhub_reft(fields: dict[str, Any]) -> bool:
    """Return whether the fields are the config of a ReFT of `adapters`."""
    config = fields.get("config")
    return isinstance(config, dict) and config.get("architecture") == "reft" and {"model_type", "name"} <= fields.keys()


def describe(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the name of the base, and all settings."""
    return {"base_model_name_or_path": fields.get("model_name") or None, **fields["config"]}


@hookimpl
def peftcore_methods() -> list[Method]:
    foreign = ForeignFormat("the library adapters", "adapter.safetensors", is_adapterhub_reft, read, describe)
    rules = StateRules(peft_type="REFT", formats=(foreign,))
    return [Method("reft", ReftConfig, place, rules, learning_rate=3e-3)]
