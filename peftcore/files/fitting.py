"""Checks that an adapter's files fit a model: placements, base and tensors."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from peftcore import engine
from peftcore.engine.attachments import AdapterAttachments
from peftcore.engine.configs import ends_within_a_name
from peftcore.engine.trained_parameters import base_tensors
from peftcore.errors import CheckpointError, PeftcoreError, PluginError
from peftcore.files.fingerprint import difference
from peftcore.files.metadata import BASE, VERSION, ties_partly
from peftcore.files.multiplier import remove_multiplier
from peftcore.files.reading import Stored
from peftcore.files.tensors import fill, is_tied_in
from peftcore.model import detect
from peftcore.model.base_modules import base_parameters
from peftcore.model.targets import drop_unmatched
from peftcore.plugin import sharded
from peftcore.plugin.method import Method
from peftcore.plugin.modules import own_tensors
from peftcore.plugin.peft_fields import guarded
from peftcore.plugin.placements.train import Train
from peftcore.plugin.safe_reading import CONFIG, TENSORS


@dataclass(frozen=True)
class Fit:
    """An adapter from a file that fits the model.

    Args:
        to_fill: argument for `engine.add_adapter`: placements on the meta device if the file has all tensors, otherwise
            the config.
        multiplier: the multiplier set by `scale`.
        trained: names of base parameters that the adapter trains.
    """

    to_fill: AdapterAttachments | Any
    multiplier: float
    trained: tuple[str, ...]


def check_fit(model: nn.Module, folder: Path, content: Stored, check_base: bool) -> Fit:
    """Check that a file fits `model`, and return the adapter to apply.

    Raises:
        CheckpointError: the file does not fit the model, or was trained on another base.
    """
    config, multiplier = remove_multiplier(content.method, content.config, content.metadata)
    if check_base:
        refuse_other_base(model, folder, content.metadata, "peftcore.load(...")
    config = config_on(model, content.method, config, content.tensors, content.metadata)
    attachments = _build_attachments(model, content.method, config, folder)
    to_fill = attachments if _has_every_tensor(attachments, content.tensors, folder) else config
    return Fit(to_fill, multiplier, attachments.trained)


def fill_applied(model: nn.Module, adapter: str, folder: Path, content: Stored) -> None:
    """Set the values of the applied `adapter` to those of a file."""
    fill(model, adapter, content.tensors, folder, partly_tied=ties_partly(content.metadata))


def config_on(
    model: nn.Module, method: Method, config: Any, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Any:
    """Restrict a file's config to the modules of `model`, and add the heads that the file's tensors contain.

    In other libraries' files, `target_modules` does not select experts.
    """
    changes: dict[str, Any] = {}
    for name in ("target_modules", "modules_to_save", "exclude_modules"):
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)) and value:
            changes[name] = drop_unmatched(model, value, experts=VERSION in metadata)
    if hasattr(config, "modules_to_save"):  # None would add heads that are missing from the file
        modules_to_save = changes.get("modules_to_save", config.modules_to_save) or []
        changes["modules_to_save"] = [*modules_to_save, *_heads_in_file(model, method, modules_to_save, tensors)]
    all_saved = changes.get("modules_to_save")
    if all_saved and getattr(config, "ensure_weight_tying", False) and VERSION not in metadata:
        changes["ensure_weight_tying"] = is_tied_in(
            model, method, all_saved, tensors
        )  # PEFT ties parameters by name, and only in some cases
    return dataclasses.replace(config, **changes)


def refuse_other_base(model: nn.Module, folder: Path, metadata: dict[str, str], call: str) -> None:
    """Raise a CheckpointError if the adapter was trained on another base.

    Args:
        model: the model.
        folder: the adapter's folder, for the message.
        metadata: metadata of the file, with the fingerprint.
        call: beginning of the call that loads the adapter without the check, for the message.
    """
    reason = difference(base_tensors(model), metadata[BASE]) if BASE in metadata else None
    if reason:
        raise CheckpointError(
            f"'{folder}' was trained on another base: {reason}. If each load of the base initializes this tensor at "
            "random (a head, new rows of a vocabulary), train and save its module with the adapter: "
            f"modules_to_save=[...]. To load the adapter anyway: {call}, check_base=False)"
        )


def _build_attachments(model: nn.Module, method: Method, config: Any, folder: Path) -> AdapterAttachments:
    """Build the config's adapters on the meta device.

    Raises:
        CheckpointError: the config cannot be applied.
    """
    try:
        with guarded(method, f"'{folder}'"), sharded.gathered_when_read(model):
            return engine.placements_for(model, config, {}, _on_meta())
    except (CheckpointError, PluginError):
        raise
    except PeftcoreError as error:
        source = folder / CONFIG if (folder / CONFIG).exists() else folder
        raise CheckpointError(f"'{source}' does not fit {type(model).__name__}: {error}") from error


@contextlib.contextmanager
def _on_meta() -> Iterator[None]:
    """Build adapters on the meta device, without initializing them."""
    with torch.device("meta"), Unfilled():
        yield


def _has_every_tensor(attachments: AdapterAttachments, tensors: Mapping[str, Tensor], folder: Path) -> bool:
    """Return whether a file has every tensor of these adapters, so that none needs to be initialized.

    Raises:
        CheckpointError: the adapters are much larger than the file.
    """
    rules = attachments.method.state
    sizes: dict[int, int] = {}  # by id, so that shared tensors count once
    is_incomplete = False
    for placement in {id(each): each for each in chain.from_iterable(attachments.placements.values())}.values():
        for name, tensor in own_tensors(placement.adapter).items():
            sizes[id(tensor)] = tensor.numel()
            is_incomplete = is_incomplete or rules.tensor_name(placement, name) not in tensors
    size_needed, size_in_file = sum(sizes.values()), sum([tensor.numel() for tensor in tensors.values()])
    if size_needed > 2 * size_in_file + 1_000_000:  # smaller differences are reported tensor by tensor
        raise CheckpointError(
            f"'{folder / CONFIG}' describes an adapter with {size_needed:,} values, but '{TENSORS}' has "
            f"{size_in_file:,}. Copy the folder again"
        )
    if is_incomplete:
        return False
    modules = chain.from_iterable(attached.adapter.modules() for attached in attachments.attached)
    return all(_has_no_other_tensors(module, sizes) for module in modules)


def _has_no_other_tensors(module: nn.Module, known_ids: Container[int]) -> bool:
    """Return whether all tensors of a module, including those in plain attributes, have ids in `known_ids`."""
    tensors = [tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None]
    attributes = [value for name, value in module.__dict__.items() if name not in _MODULE_ATTRIBUTES]
    return all(id(tensor) in known_ids for tensor in tensors) and all(map(_is_plain, attributes))


class Unfilled(TorchFunctionMode):
    """Mode that skips the initialization of meta tensors, which takes longer than creating them."""

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

_MODULE_ATTRIBUTES = nn.Module().__dict__.keys()
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


def _is_plain(value: object) -> bool:
    """Return whether `value` consists of plain Python values, dtypes and devices, and therefore contains no tensor."""
    if isinstance(value, (list, tuple, set)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return isinstance(value, _PLAIN)


def _heads_in_file(
    model: nn.Module, method: Method, modules_to_save: Sequence[str], tensors: Mapping[str, Tensor]
) -> list[str]:
    """Return the heads and suffix-matched modules that a PEFT file has tensors for but does not list in its config."""

    def in_file(path: str) -> bool:
        names = [f"{path}.{name}" for name, _ in base_parameters(model.get_submodule(path))]
        held = (method.state.tensor_name(Train((name,), saved=True), name) in tensors for name in names)
        return bool(names) and all(held)

    candidates = [*detect(model).task_heads, *ends_within_a_name(model, modules_to_save)]
    return [path for path in dict.fromkeys(candidates) if path not in modules_to_save and in_file(path)]
