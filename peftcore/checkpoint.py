"""Save and load one adapter: `adapter_config.json` and `adapter_model.safetensors`, in Hugging Face PEFT's format.

Loading is strict. Saving writes both files beside the old ones and then renames, so that a full disk
or a killed process leaves an adapter that loads: the old one, or the new one. A kill between the two
renames leaves new tensors and the new config under its temporary name; the tensors' metadata hold the
config's hash, by which `load` finds it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from peftcore import engine
from peftcore.adapted import base_parameters
from peftcore.architecture import detect
from peftcore.errors import CheckpointError, PeftcoreError, nearest
from peftcore.fingerprint import difference, fingerprint, untouched_parameters
from peftcore.method import After, Around, ForeignFormat, Method, PrefixKV, SoftPrompt, Train
from peftcore.prompts import PrefixAround, SoftPromptAround
from peftcore.registry import registry
from peftcore.targets import drop_unmatched
from peftcore.trained import TrainedParameters

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_COMMON = {
    "peft_type",
    "task_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "peft_version",
}
_EMPTY = (None, False, "", [], {}, 0)


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    adapter: str | None = None,
    dtype: torch.dtype | None = None,
    resumable: bool = True,
) -> Path:
    """Write an adapter to the folder `path`.

    Args:
        adapter: which one; may be left out where there is only one.
        dtype: of the floating tensors on disk; by default theirs.
        resumable: False leaves out what only further training needs (`StateRules.exported`).

    Returns:
        The folder.

    Raises:
        CheckpointError: the folder cannot be written. What lay there is unharmed.
    """
    adapter = adapter if adapter is not None else _only(model)
    entry = engine.applied(model, adapter)
    engine._refuse_merged(engine.state_of(model), "save")
    method = registry.method(entry.method)
    config = json.dumps(_config_on_disk(model, method, entry.config), indent=2, sort_keys=True) + "\n"
    tensors = {
        name: (tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor).detach().cpu().contiguous()
        for name, tensor in tensors_on_disk(model, adapter, own=resumable, exported=True).items()
    }
    metadata = {
        "format": "pt",
        "peftcore_version": version("peftcore"),
        "peftcore_config_sha256": _sha256(config),
        "peftcore_base": fingerprint(_untouched(model)),
    }
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        new_config = _write_beside(folder / CONFIG, config.encode())
        new_tensors = _write_beside(folder / TENSORS, to_bytes(tensors, metadata))
        os.replace(new_tensors, folder / TENSORS)
        os.replace(new_config, folder / CONFIG)
        _sync_folder(folder)
    except OSError as error:
        raise CheckpointError(
            f"the adapter '{adapter}' could not be saved to '{folder}': {error.strerror or error}. "
            "What lay there before is unharmed"
        ) from error
    return folder


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    adapter: str = "default",
    trainable: bool = True,
    dtype: torch.dtype | None = None,
    check_base: bool = True,
) -> nn.Module:
    """Apply the adapter that lies in the folder `path`, written here, by Hugging Face PEFT, or in a plugin's
    foreign format.

    Args:
        adapter: its name on this model.
        trainable: False freezes it.
        dtype: of its parameters, as for `apply`.
        check_base: compare the fingerprint of the base that the adapter was trained on, where the file has one.

    Raises:
        CheckpointError: the files cannot be read, or do not fit the model. The model is then as it was.
    """
    folder = Path(path)
    method, config, tensors, metadata = read(folder, model)
    if check_base and "peftcore_base" in metadata:
        found = difference(_untouched(model), metadata["peftcore_base"])
        if found:
            raise CheckpointError(
                f"'{folder}' was trained on another base: {found}. "
                "To load it all the same: peftcore.load(..., check_base=False)"
            )
    changes = {
        name: drop_unmatched(model, value)
        for name in ("target_modules", "modules_to_save", "exclude_modules")
        if isinstance(value := getattr(config, name, None), (list, tuple)) and value
    }
    heads = _unnamed_heads(model, method, changes.get("modules_to_save"), tensors)
    if heads:
        changes["modules_to_save"] = [*changes["modules_to_save"], *heads]
    state = engine.state_of(model)
    active = state.active if state else ()
    engine.apply(model, dataclasses.replace(config, **changes), adapter=adapter, dtype=dtype)
    try:
        fill(model, adapter, tensors, folder)
    except BaseException:
        engine.remove(model, adapter)
        if engine.state_of(model):
            engine._set_active(model, active)
        raise
    if not trainable:
        engine.set_trainable(model, adapter, False)
    return model


def restore(model: nn.Module, path: str | os.PathLike[str], *, adapter: str = "default") -> None:
    """Give the applied `adapter` the values that lie in the folder `path`, which must be of the same method."""
    folder = Path(path)
    method, _, tensors, _ = read(folder, model)
    entry = engine.applied(model, adapter)
    if method.name != entry.method:
        raise CheckpointError(f"'{folder}' holds {method.name}, the adapter '{adapter}' is {entry.method}")
    fill(model, adapter, tensors, folder)


def read(folder: Path, model: nn.Module) -> tuple[Method, Any, dict[str, Tensor], dict[str, str]]:
    """(method, config, tensors by today's names, metadata) of an adapter folder."""
    foreign = _foreign(folder)
    if foreign is not None:
        return _read_foreign(folder, model, *foreign)
    tensors, metadata = read_tensors(folder)
    fields = read_config(folder, metadata)
    method = registry.method_of_peft_type(fields["peft_type"])
    config = method.state.config_on_disk(_config_from_disk(folder, method, fields), tensors)
    return method, config, dict(method.state.read_tensors(tensors, config)), metadata


def _foreign(folder: Path) -> tuple[Method, ForeignFormat, dict[str, Any]] | None:
    """(method, format, fields) where the folder is another library's, by a config without peft_type."""
    try:
        fields = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(fields, dict) or "peft_type" in fields:
        return None
    formats = ((method, foreign) for method in registry.methods().values() for foreign in method.state.foreign)
    return next(((method, foreign, fields) for method, foreign in formats if foreign.matches(fields)), None)


def _read_foreign(
    folder: Path, model: nn.Module, method: Method, foreign: ForeignFormat, fields: dict[str, Any]
) -> tuple[Method, Any, dict[str, Tensor], dict[str, str]]:
    tensors, _ = read_tensors(folder, foreign.tensors)
    try:
        config, tensors = foreign.read(model, fields, tensors)
    except PeftcoreError as error:
        raise CheckpointError(f"'{folder}', of {foreign.name}, cannot be read: {error}") from error
    return method, config, tensors, {}


def read_config(folder: Path, metadata: dict[str, str] | None = None) -> dict[str, Any]:
    """The fields of `adapter_config.json`."""
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder '{folder}'")
    file = folder / CONFIG
    wanted = (metadata or {}).get("peftcore_config_sha256")
    beside = _beside(file)
    with contextlib.suppress(OSError):
        if wanted and beside.exists() and _sha256(beside.read_text()) == wanted:
            file = beside  # a save was cut off between its two renames
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"'{folder}' holds no adapter: {CONFIG} is missing") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"'{file}' cannot be read as JSON: {error}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("peft_type"), str):
        raise CheckpointError(f"'{file}' names no peft_type: it is no adapter in the format of Hugging Face PEFT")
    return fields


def read_tensors(folder: Path, name: str = TENSORS) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of `adapter_model.safetensors`, or of another file of the folder."""
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder '{folder}'")
    file = folder / name
    if not file.exists():
        pickles = [name for name in os.listdir(folder) if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
        if pickles:
            raise CheckpointError(
                f"'{folder}' holds '{pickles[0]}', a pickle, which can run any code and is never read here. "
                f"Have its author save it as {name}, or convert it where you trust it"
            )
        raise CheckpointError(f"'{folder}' holds no adapter: {name} is missing")
    try:
        with safe_open(file, framework="pt") as archive:
            return {name: archive.get_tensor(name) for name in archive.keys()}, archive.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size if file.is_file() else 0
        raise CheckpointError(
            f"'{file}' ({size:,} bytes) is no whole safetensors file: {error}. It may be cut off; copy it again"
        ) from error


def tensors_on_disk(model: nn.Module, adapter: str, *, own: bool = True, exported: bool = False) -> dict[str, Tensor]:
    """Every tensor of an applied adapter under its name on disk.

    Args:
        own: also those of modules that have exported ones.
        exported: with the ones for other readers.
    """
    entry = engine.applied(model, adapter)
    rules = registry.method(entry.method).state
    found: dict[str, Tensor] = {}

    def add(placement: Any, name: str, tensor: Tensor) -> None:
        on_disk = rules.tensor_name(placement, name)
        if on_disk in found:
            raise PeftcoreError(
                f"{entry.method} gives two tensors the name '{on_disk}'; tensor_name must tell them apart"
            )
        found[on_disk] = tensor

    for path, module in engine.adapter_modules(model, adapter):
        match module:
            case SoftPromptAround():
                placement, module = SoftPrompt(module.adapter), module.adapter
            case PrefixAround():
                placement, module = PrefixKV(module.adapter), module.adapter
            case _:
                behind = adapter in model.get_submodule(path)._modules["peftcore"].behind
                placement = (After if behind else Around)(path, module)
        others = rules.exported(module) if exported else {}
        found.update(others)
        if own or not others:
            for name, tensor in module.state_dict(keep_vars=True).items():
                add(placement, name, tensor)
    if entry.trained:
        for name, parameter in TrainedParameters.of(model, adapter).values(model):
            path, _, attribute = name.rpartition(".")
            saved_as = f"{path}.base_layer.{attribute}" if path in entry.paths else name
            add(Train((name,)), saved_as, parameter)
    return found


def fill(model: nn.Module, adapter: str, tensors: dict[str, Tensor], folder: Path) -> None:
    """Copy `tensors` into the applied `adapter`: none missing, none too many, no shape that differs."""
    expected = tensors_on_disk(model, adapter)
    exported = tensors_on_disk(model, adapter, exported=True)  # where the adapter's own tensors say the same
    extra = [name for name in tensors if name not in expected]
    repeats = {name for name in extra if name in exported or _is_copy_of_base(model, name, tensors[name])}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in repeats}
    missing = sorted(expected.keys() - tensors.keys())
    extra = sorted(tensors.keys() - expected.keys())
    if missing or extra:
        raise CheckpointError(
            f"'{folder}' does not fit {type(model).__name__}: "
            + "; ".join(
                f"{len(names)} tensors {what}, such as '{names[0]}'{nearest(names[0], others, 1)}"
                for names, what, others in ((missing, "are missing", extra), (extra, "have no place", missing))
                if names
            )
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"'{folder}' does not fit {type(model).__name__}: '{name}' has shape {list(tensor.shape)}, "
                f"the model needs {list(expected[name].shape)}"
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            expected[name].copy_(tensor)


def _unnamed_heads(model: nn.Module, method: Method, saved: list[str] | None, tensors: dict[str, Tensor]) -> list[str]:
    """Heads that the file holds and its config does not name: for PEFT 'classifier' means 'pre_classifier', too."""
    if not saved:
        return []

    def in_file(path: str) -> bool:
        names = [f"{path}.{name}" for name, _ in base_parameters(model.get_submodule(path))]
        return all(method.state.tensor_name(Train((name,)), name) in tensors for name in names)

    return [head for head in detect(model).task_heads if head not in saved and in_file(head)]


def _is_copy_of_base(model: nn.Module, name: str, tensor: Tensor) -> bool:
    """PEFT saves the embedding's own weight beside an adapter of it; where it is the base's, nothing is lost."""
    own = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    base = dict(untouched_parameters(model, set())).get(own)
    return base is not None and base.shape == tensor.shape and torch.equal(base.cpu().to(tensor.dtype), tensor)


def _config_on_disk(model: nn.Module, method: Method, config: Any) -> dict[str, Any]:
    # asdict makes lists of tuples only at the encoder; JSON has no sets, tuples or dtypes.
    fields = method.state.write_config(dataclasses.asdict(config))
    base = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    return {
        **{name: sorted(value) if isinstance(value, (set, frozenset)) else value for name, value in fields.items()},
        "peft_type": method.state.peft_type,
        "task_type": detect(model).task_type,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "revision": None,
        "auto_mapping": None,
    }


def _config_from_disk(folder: Path, method: Method, fields: dict[str, Any]) -> Any:
    fields = method.state.read_config({name: value for name, value in fields.items() if name not in _COMMON})
    known = {f.name for f in dataclasses.fields(method.config_class)}
    for name, value in fields.items():
        if name not in known and name not in method.state.ignored_fields and value not in _EMPTY:
            raise CheckpointError(
                f"'{folder / CONFIG}' uses {name}={value!r}, which the installed plugin '{method.name}' does not know. "
                "Without it the adapter would compute something else, so it is not loaded"
            )
    try:
        return method.config_class(**{name: value for name, value in fields.items() if name in known})
    except (TypeError, PeftcoreError) as error:
        raise CheckpointError(f"'{folder / CONFIG}' is no valid config of '{method.name}': {error}") from error


def _only(model: nn.Module) -> str:
    names = list(engine._require_state(model).applied)
    if len(names) > 1:
        raise PeftcoreError(f"several adapters are applied: {', '.join(names)}. Say which: adapter=...")
    return names[0]


def _untouched(model: nn.Module) -> dict[str, Tensor]:
    state = engine.state_of(model)
    trained = {name for entry in state.applied.values() for name in entry.trained} if state else set()
    return untouched_parameters(model, trained)


def _beside(file: Path) -> Path:
    return file.with_name(f".{file.name}.tmp")


def _write_beside(file: Path, content: bytes) -> Path:
    beside = _beside(file)
    try:
        with open(beside, "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    return beside


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system can
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
