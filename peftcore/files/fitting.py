"""Checks that an adapter's files fit a model: its placements, its base, and its tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from peftcore import engine
from peftcore.adaptation.adapted import base_parameters
from peftcore.adaptation.light import own_tensors, parts
from peftcore.engine.placing import Placed
from peftcore.engine.trained import base_tensors
from peftcore.errors import CheckpointError, PeftcoreError, PluginError
from peftcore.files.fingerprint import difference
from peftcore.files.multiplier import without
from peftcore.files.peft_configs import ends_within_a_name
from peftcore.files.peft_fields import guarded
from peftcore.files.reading import ties_partly
from peftcore.files.safe_reading import CONFIG, TENSORS
from peftcore.files.tensors import fill, is_tied_in
from peftcore.method import Method, Train
from peftcore.observation import detect
from peftcore.targets import drop_unmatched

Content = tuple[Method, Any, dict[str, Tensor], dict[str, str]]  # what `reading.read_adapter` gives


def fitting(model: nn.Module, folder: Path, content: Content, check_base: bool) -> tuple[Placed, Any, float]:
    """Return (placements of a file's config on the meta device, the config, the factor set by `scale`).

    Raises:
        CheckpointError: the file does not fit, or belongs to another base.
    """
    method, config, tensors, metadata = content
    config, multiplier = without(method, config, metadata)
    if check_base:
        refuse_other_base(model, folder, metadata, "peftcore.load(...")
    config = config_on(model, method, config, tensors, metadata)
    return _check_fits(model, method, config, tensors, folder), config, multiplier


def fill_applied(model: nn.Module, adapter: str, folder: Path, content: Content) -> None:
    """Set the values of the applied `adapter` to those of a file."""
    fill(model, adapter, content[2], folder, partly_tied=ties_partly(content[3]))


def config_on(
    model: nn.Module, method: Method, config: Any, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Any:
    """Return a file's config, restricted to modules of `model`, with the heads that the file's tensors contain.

    In files of other libraries, names in `target_modules` do not select experts.
    """
    changes: dict[str, Any] = {
        name: drop_unmatched(model, value, experts="peftcore_version" in metadata)
        for name in ("target_modules", "modules_to_save", "exclude_modules")
        if isinstance(value := getattr(config, name, None), (list, tuple)) and value
    }
    if hasattr(config, "modules_to_save"):  # None would add heads that the file does not have
        named = changes.get("modules_to_save", config.modules_to_save) or []
        changes["modules_to_save"] = [*named, *_unnamed(model, method, named, tensors)]
    saved = changes.get("modules_to_save")
    if saved and getattr(config, "ensure_weight_tying", False) and "peftcore_version" not in metadata:
        changes["ensure_weight_tying"] = is_tied_in(model, method, saved, tensors)  # PEFT ties by names, and not always
    return dataclasses.replace(config, **changes)


def refuse_other_base(model: nn.Module, folder: Path, metadata: dict[str, str], call: str) -> None:
    """Raise a CheckpointError if the file's fingerprint is of another base; `call` loads it anyway, for the message."""
    why = difference(base_tensors(model), metadata["peftcore_base"]) if "peftcore_base" in metadata else None
    if why:
        raise CheckpointError(
            f"'{folder}' was trained on another base: {why}. If each load of the base re-initialises that (a head, new "
            "rows of a vocabulary), train its module, too: modules_to_save=[...]. To load the adapter anyway: "
            f"{call}, check_base=False)"
        )


def _check_fits(model: nn.Module, method: Method, config: Any, tensors: dict[str, Tensor], folder: Path) -> Placed:
    """Return the placements of the config on the meta device.

    Raises:
        CheckpointError: it cannot be applied, or needs more numbers than the file has.
    """
    try:
        with torch.device("meta"), Unfilled(), guarded(method, f"'{folder}'"):
            placed = engine.placements_for(model, config, {})
    except (CheckpointError, PluginError):
        raise
    except PeftcoreError as error:
        where = folder / CONFIG if (folder / CONFIG).exists() else folder
        raise CheckpointError(f"'{where}' does not fit {type(model).__name__}: {error}") from error
    kept = (tensor for each in placed.around for tensor in own_tensors(each.adapter).values())
    wanted = sum(tensor.numel() for tensor in {id(tensor): tensor for tensor in kept}.values())  # shared ones once
    there = sum(tensor.numel() for tensor in tensors.values())
    if wanted > 2 * there + 1_000_000:  # a small difference is reported tensor by tensor
        raise CheckpointError(
            f"'{folder / CONFIG}' needs an adapter of {wanted:,} numbers, but '{TENSORS}' has {there:,}"
        )
    return placed


class Unfilled(TorchFunctionMode):
    """Mode that skips initialisation of meta tensors, which takes longer than making them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FILLS:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        elif func in _CONSTANTS:
            tensor = torch.empty(*args, **kwargs)
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


_FILLS = {nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_, nn.init.kaiming_normal_, nn.init.xavier_uniform_}
_CONSTANTS = {torch.zeros, torch.ones}


def brings_all(placed: Placed, tensors: Mapping[str, Tensor]) -> bool:
    """Return whether a file has every tensor of these adapters, so that none must be initialised."""
    rules, brought = placed.method.state, set[int]()
    for placement in {id(each): each for placements in placed.placements.values() for each in placements}.values():
        for name, tensor in own_tensors(placement.adapter).items():
            if rules.tensor_name(placement, name) not in tensors:
                return False
            brought.add(id(tensor))
    for module in (module for each in placed.around for module in parts(each.adapter)):
        held = (*module._parameters.values(), *module._buffers.values())
        others = (value for name, value in module.__dict__.items() if name not in _OF_ANY_MODULE)
        if any(t is not None and id(t) not in brought for t in held) or not all(map(_is_plain, others)):
            return False
    return True


_OF_ANY_MODULE = nn.Module().__dict__.keys()


def _is_plain(value: Any) -> bool:
    """Return whether `value` consists of plain Python values, dtypes and devices, and so contains no tensor."""
    if isinstance(value, (list, tuple, set)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return isinstance(value, (bool, int, float, str, type(None), torch.dtype, torch.device))


def _unnamed(model: nn.Module, method: Method, saved: Sequence[str], tensors: Mapping[str, Tensor]) -> list[str]:
    """Return heads, and modules that PEFT finds by their suffix, that are in the file but not in its config."""

    def in_file(path: str) -> bool:
        names = [f"{path}.{name}" for name, _ in base_parameters(model.get_submodule(path))]
        held = (method.state.tensor_name(Train((name,), saved=True), name) in tensors for name in names)
        return bool(names) and all(held)

    candidates = [*detect(model).task_heads, *ends_within_a_name(model, saved)]
    return [path for path in dict.fromkeys(candidates) if path not in saved and in_file(path)]
