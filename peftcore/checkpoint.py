"""Save and load adapters, in Hugging Face PEFT's format, and load strictly: what does not fit is an error."""

from __future__ import annotations

import dataclasses
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftcore import adapter_files, engine, ranks
from peftcore.adapted import base_parameters
from peftcore.adapter_files import CONFIG, TENSORS, read_config, read_tensors
from peftcore.architecture import detect
from peftcore.errors import CheckpointError, PeftcoreError, nearest
from peftcore.fingerprint import difference, fingerprint
from peftcore.method import After, Around, ForeignFormat, Method, PrefixKV, SoftPrompt, Train
from peftcore.prompts import PrefixAround, SoftPromptAround
from peftcore.registry import registry
from peftcore.targets import drop_unmatched
from peftcore.trained import TrainedParameters

_TOGETHER = "peftcore_together"
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
    """Write an adapter to the folder `path`, or all of a model's adapters.

    In a distributed run rank 0 writes. Where the model is sharded every rank must call this, and returns when the
    files are there; else the other ranks return at once.

    Args:
        adapter: which one. Left out: all. Of several, `default` lies in the folder itself and the others in folders
            of their name, as in PEFT; `load` finds them together, in the order in which they act.
        dtype: of the floating tensors on disk; by default theirs.
        resumable: False leaves out what only further training needs (`StateRules.exported`).

    Returns:
        The folder.

    Raises:
        CheckpointError: the folder cannot be written. What lay there is unharmed.
    """
    names = list(engine._require_state(model).applied) if adapter is None else [adapter]
    folder = Path(path)
    active = engine.state_of(model).active
    together = {} if len(names) == 1 else {_TOGETHER: json.dumps({"adapters": names, "active": active})}
    for name in names:
        _save(model, place(folder, name) if together else folder, name, dtype, resumable, together)
    return folder


def place(folder: Path, adapter: str) -> Path:
    """Where an adapter lies in the folder of several, as in PEFT: `default` in it, others in folders of their name."""
    return folder if adapter == "default" else folder / adapter


def _save(
    model: nn.Module, folder: Path, adapter: str, dtype: torch.dtype | None, resumable: bool, metadata: dict[str, str]
) -> None:
    entry = engine.applied(model, adapter)
    engine._refuse_merged(engine.state_of(model), "save")
    method = registry.method(entry.method)
    sharded = ranks.is_sharded(model)
    if not sharded and ranks.rank() > 0:
        return
    ranks.gather_up(model)
    tensors = {
        name: _for_disk(tensor, dtype)
        for name, tensor in tensors_on_disk(model, adapter, own=resumable, exported=True).items()
    }
    # What the adapter has a copy of may be anything in the base, such as a head that is drawn anew by every load.
    own = own_slots(model, adapter)
    base = {name: value for name, value in base_values(model).items() if name not in own}
    about = {"peftcore_version": version("peftcore"), "peftcore_base": fingerprint(base)}
    fields = _config_on_disk(model, method, entry.config)
    ranks.once(lambda: adapter_files.write(folder, fields, tensors, {**about, **metadata}), together=sharded)


def _for_disk(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    tensor = ranks.whole(tensor.detach())
    return (tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor).cpu().contiguous()


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    adapter: str | None = None,
    trainable: bool = True,
    dtype: torch.dtype | None = None,
    check_base: bool = True,
) -> nn.Module:
    """Apply the adapter that lies in the folder `path`, or those that were saved there together.

    The folder was written here, by Hugging Face PEFT, or in a foreign format that a plugin reads.

    Args:
        adapter: the name of the folder's own adapter on this model, `default` if left out. Adapters that were saved
            together are all loaded if it is left out, under the names they had.
        trainable: False freezes it.
        dtype: of its parameters, as for `apply`.
        check_base: compare the fingerprint of the base that the adapter was trained on, where the file has one.

    Raises:
        CheckpointError: the files cannot be read, or do not fit the model. The model is then as it was.
    """
    folder = Path(path)
    together = _saved_together(folder) if adapter is None else None
    names = together["adapters"] if together else [adapter or "default"]
    before = engine.state_of(model)
    active = before.active if before else ()
    done: list[str] = []
    try:
        for name in names:
            if together and engine.state_of(model):
                engine.activate(model, [])  # two that train one parameter may lie together
            _load(model, place(folder, name) if together else folder, name, dtype, check_base)
            done.append(name)
            engine.set_trainable(model, name, trainable)
        if together:
            engine.activate(model, [*active, *together["active"]])
    except BaseException:
        for name in done:
            engine.remove(model, name)
        if engine.state_of(model):
            engine._set_active(model, active)
        raise
    return model


def _load(model: nn.Module, folder: Path, adapter: str, dtype: torch.dtype | None, check_base: bool) -> None:
    method, config, tensors, metadata = read(folder, model)
    if check_base and "peftcore_base" in metadata:
        found = difference(base_values(model), metadata["peftcore_base"])
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
    engine.apply(model, dataclasses.replace(config, **changes), adapter=adapter, dtype=dtype)
    try:
        fill(model, adapter, tensors, folder)
    except BaseException:
        engine.remove(model, adapter)
        raise


def _saved_together(folder: Path) -> dict[str, list[str]] | None:
    """{adapters, active} of the adapters that were saved to `folder` in one call, or None."""
    if not folder.is_dir():
        return None
    inside = [folder] if (folder / TENSORS).exists() else sorted(path for path in folder.iterdir() if path.is_dir())
    told = next((told for path in inside if (told := adapter_files.read_metadata(path).get(_TOGETHER))), None)
    if told is None:
        return None
    try:
        together = json.loads(told)
        names, active = together["adapters"], together["active"]
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"'{folder}' does not say which adapters it holds: {error!r}") from error
    for name in (*names, *active):
        engine.check_name(name)  # it becomes a part of a path
    if not set(active) <= set(names):
        raise CheckpointError(f"'{folder}' lets {active} act, but holds {names}")
    return together if all((place(folder, name) / TENSORS).is_file() for name in names) else None


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


def about(folder: Path) -> tuple[dict[str, Any], ForeignFormat | None]:
    """What an adapter folder says of itself: the fields of its config as PEFT names them, and its foreign format.

    Raises:
        CheckpointError: it holds no adapter.
    """
    foreign = _foreign(folder)
    if foreign is None:
        return read_config(folder, adapter_files.read_metadata(folder)), None
    method, form, fields = foreign
    return {"peft_type": method.state.peft_type, **form.about(fields)}, form


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
        others = {}
        if exported:
            with ranks.whole_parameters(module):
                others = rules.exported(module)
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
    ranks.gather_up(model)
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
            ranks.fill(expected[name], tensor)


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
    base = base_values(model).get(own)
    return (
        base is not None
        and base.shape == tensor.shape
        and torch.equal(ranks.whole(base).cpu().to(tensor.dtype), tensor)
    )


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


def own_slots(model: nn.Module, adapter: str) -> set[str]:
    """The names of the base's parameters that `adapter` has a copy of."""
    if not engine.applied(model, adapter).trained:
        return set()
    return {slot for slots in TrainedParameters.of(model, adapter).slots.values() for slot in slots}


def base_values(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of the base by name, where an adapter's own copy stands in their place the base's."""
    found = dict(base_parameters(model))
    state = engine.state_of(model)
    for name, entry in state.applied.items() if state else ():
        if entry.trained:
            trained = TrainedParameters.of(model, name)
            for first, original in trained.originals(model) if trained.active else ():
                found.update(dict.fromkeys(trained.slots[first], original))
    return {name: parameter.detach() for name, parameter in found.items()}
