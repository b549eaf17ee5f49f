"""Fields of PEFT's configs: which installed method reads a file with these fields, and PEFT's defaults.

A file saved by peftcore names its method. Any other file has a `peft_type`, and may set the flag of a method with this
peft_type (`PeftRules.flag`). The method whose flag is set reads the file, or else the method without a flag. If several
methods remain, an error names them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from peftcore.errors import CheckpointError, PeftcoreError, PluginError, warn
from peftcore.plugin.checks import canonical
from peftcore.plugin.discovery import Plugin
from peftcore.plugin.method import Method
from peftcore.plugin.registry import HOW_TO_INSTALL, registry
from peftcore.plugin.validation import check_types, shown

Offered = tuple[Method, Plugin]
COMMON = frozenset(
    {
        "peft_type",
        "task_type",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "peft_version",
    }
)


def method_of_fields(
    where: str,
    fields: Mapping[str, Any],
    own: Mapping[str, Any] | None = None,
    *,
    written_by: str | None = None,
    plugin: str | None = None,
    method: str | None = None,
    choose: str = "method='NAME' (--method NAME on the command line)",
) -> Method:
    """Return the method that reads these fields.

    Args:
        where: source of the fields, for error messages.
        own: fields that PEFT does not have (`PeftRules.own_fields`). Each method sees only its own fields.
        written_by: the method that wrote the fields, if known. It reads them if it is installed.
        plugin: `DISTRIBUTION VERSION` of the plugin that wrote the fields, if known, for error messages.
        method: the method that the user requests.
        choose: how the user chooses a method, for error messages.

    Raises:
        PluginError: no method reads the fields, several do, or the requested method does not.
    """
    peft_type, own = fields["peft_type"], own or {}
    if method is None and written_by is not None:
        writer = _writer(written_by)
        if writer is not None and _reads(writer, peft_type) and _is_flagged(writer, fields, own) is not False:
            return writer
    candidates = of_peft_type(peft_type)
    if method is not None:
        return _named(where, candidates, fields, own, method)
    if not candidates:
        raise PluginError(
            f"no installed method reads peft_type {peft_type!r} (installed: {_installed_types()}). "
            f"{how_to_install(plugin)}"
        )
    readers = _by_flag(candidates, fields, own)
    if not readers:
        flags = ", ".join(f"'{m.name}' ({p.distribution} {p.version}) {m.state.peft.flag}" for m, p in candidates)
        raise PluginError(
            f"no installed method reads {where}, {_set_in(fields, own)}, because no field that identifies a method "
            f"is set: {flags}. {how_to_install(plugin)}"
        )
    if len(readers) > 1:
        raise PluginError(
            f"{len(readers)} installed methods can read {where}, {_set_in(fields, own)}: {_in_words(readers)}. "
            f"Choose one with {choose}, or restrict the plugins with PEFTCORE_PLUGINS=NAME,NAME"
        )
    reader = readers[0][0]
    if written_by is not None:
        reason = "which is not installed" if _writer(written_by) is None else "which does not read it"
        warn(
            f"{where} was written by the method {shown(written_by)}, {reason}. '{reader.name}' reads it like any "
            f"other file with peft_type {shown(peft_type)}",
        )
    return reader


def _installed_types() -> str:
    with_files = [method for method in registry.methods().values() if method.recorded_as is None]
    return ", ".join(f"{method.state.peft_type} ({method.name})" for method in with_files) or "none"


def _by_flag(candidates: list[Offered], fields: Mapping[str, Any], own_fields: Mapping[str, Any]) -> list[Offered]:
    """Return the methods whose flag is set in the fields, or else the methods without a flag."""
    flags = [_is_flagged(method, fields, own_fields) for method, _ in candidates]
    expected = True if True in flags else None
    return [method for method, flag in zip(candidates, flags, strict=True) if flag is expected]


def how_to_install(plugin: str | None) -> str:
    """Return a sentence with the package that wrote a file, if the file has its distribution name and version."""
    package = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]{0,99}) ([0-9][A-Za-z0-9.+!]{0,49})", plugin or "")
    if package is None:
        return HOW_TO_INSTALL
    return (
        f"According to the file, it was written by the package {package[1]} {package[2]}. If you trust the file and "
        f"that package: pip install {package[1]}=={package[2]}"
    )


def why_unknown(method: Method, name: str, value: Any) -> str:
    """Explain a PEFT field that the method does not have: name the method that has it, or why it is refused."""
    peft_type = method.state.peft_type
    if not says_something(peft_type, name, value):
        return ""
    with contextlib.suppress(Exception), warnings.catch_warnings():  # a plugin may need more fields
        warnings.simplefilter("ignore")
        fields = {**defaults(peft_type), "peft_type": peft_type}
        other_method = method_of_fields("", {**fields, name: value})
        is_its_field = name in {field.name for field in dataclasses.fields(other_method.config_class)}
        if other_method is not method and (is_its_field or other_method is not method_of_fields("", fields)):
            return (
                f". It belongs to the method '{other_method.name}': peftcore.apply(model, '{other_method.name}', ...)"
            )
        try:
            method.state.read_fields({name: value})
        except PeftcoreError as error:
            return f". PEFT files with this field are refused: {error}"
    return ""


def refuse_not_its_own(method: Method, fields: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise a PluginError if the fields written by a method lack its flag."""
    if _is_flagged(method, fields, own) is False:
        raise PluginError(
            f"the file of '{method.name}' would lack its PeftRules.flag {method.state.peft.flag!r}, "
            f"{_set_in(fields, own)}, so another method would read the file. Upgrade the plugin; until then, the "
            "adapter's values are in model.state_dict()"
        )


def of_peft_type(peft_type: str) -> list[Offered]:
    """Return the installed methods that read files of this `peft_type`, each with its plugin."""
    return [(method, plugin) for plugin in registry.plugins() for method in plugin.methods if _reads(method, peft_type)]


def _reads(method: Method, peft_type: str) -> bool:
    return method.recorded_as is None and peft_type in (method.state.peft_type, *method.state.peft.older_types)


def _writer(name: str) -> Method | None:
    """Return the installed method that a file names, ignoring the spelling of the name."""
    methods = registry.methods()
    if name in methods:
        return methods[name]
    return next(
        (method for installed_name, method in methods.items() if canonical(installed_name) == canonical(name)), None
    )


def _named(
    source: str, candidates: list[Offered], fields: Mapping[str, Any], own_fields: Mapping[str, Any], name: str
) -> Method:
    method = registry.method(name)
    for candidate, _ in candidates:
        if candidate is method:
            if _is_flagged(method, fields, own_fields) is False:
                raise PluginError(
                    f"'{method.name}' only reads files with {method.state.peft.flag} set, found {source}, "
                    f"{_set_in(fields, own_fields)}"
                )
            return method
    if method.recorded_as is not None:
        raise PluginError(
            f"'{method.name}' has no files, because its adapters are stored as adapters of another method. Pass the "
            "name of that method"
        )
    raise PluginError(
        f"'{method.name}' reads peft_type {method.state.peft_type!r}, but {source} has {shown(fields['peft_type'])}"
    )


def _is_flagged(method: Method, fields: Mapping[str, Any], own_fields: Mapping[str, Any]) -> bool | None:
    """Return whether the flag of the method is set; None if it has none."""
    flag = method.state.peft.flag
    return None if flag is None else bool({**fields, **own_of(method, own_fields)}.get(flag))


def _in_words(candidates: list[Offered]) -> str:
    return ", ".join(f"'{method.name}' ({plugin.distribution} {plugin.version})" for method, plugin in candidates)


def _set_in(fields: Mapping[str, Any], own_fields: Mapping[str, Any]) -> str:
    """Return a phrase such as `of peft_type 'X' with r, use_rslora set`."""
    peft_type = str(fields["peft_type"])
    all_fields = {**fields, **own_fields}.items()
    names_set = sorted(n for n, value in all_fields if n not in COMMON and says_something(peft_type, n, value))
    names = ", ".join([*(shown(name)[1:-1] for name in names_set[:12]), *(["..."] if len(names_set) > 12 else [])])
    return f"of peft_type {shown(peft_type)}" + (f" with {names} set" if names_set else "")


def config_of_fields(
    where: str, method: Method, fields: Mapping[str, Any], kind: type[PeftcoreError] = CheckpointError
) -> Any:
    """Return the method's config for the fields.

    Args:
        where: source of the fields, for error messages.
        kind: the class of errors.

    Raises:
        PeftcoreError: a field is unknown, or has a value that the method refuses.
    """
    peft_type = str(fields.get("peft_type", method.state.peft_type))
    with guarded(method, where, kind):
        try:
            read = method.state.read_fields(fields)
        except PeftcoreError as error:
            raise kind(f"{where} cannot be read: {error}") from error
    return config_of(where, method, read, peft_type, kind)


def config_of(
    where: str,
    method: Method,
    read: Mapping[str, Any],
    peft_type: str,
    kind: type[PeftcoreError] = CheckpointError,
) -> Any:
    """Return the method's config for the fields that `StateRules.read` returned; see `config_of_fields`."""
    field_names = {f.name for f in dataclasses.fields(method.config_class)}
    ignored_names = {*COMMON, "ensure_weight_tying"}  # methods may lack the field, since the tensors imply it
    for name, value in read.items():
        if name not in field_names and name not in ignored_names and says_something(peft_type, name, value):
            raise _unknown(where, method, name, value, kind)
    read = {name: value for name, value in read.items() if name in field_names}
    if read.get("layers_to_transform") == []:
        del read["layers_to_transform"]  # for PEFT an empty list means all layers
    try:
        check_types(method.config_class, read)
        return method.config_class(**read)
    except (TypeError, PeftcoreError) as error:
        raise kind(f"{where} is not a valid config of '{method.name}': {error}") from error


def own_of(method: Method, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields stored outside the config that belong to the method."""
    return {name: value for name, value in own.items() if name in method.state.peft.own_fields}


def with_own(where: str, method: Method, fields: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a config combined with those outside it (`PeftRules.own_fields`), found at `where`.

    Raises:
        CheckpointError: a field outside the config does not belong to the method, or is also in the config.
    """
    for name, value in own.items():
        if name not in method.state.peft.own_fields:
            raise _unknown(where, method, name, value, CheckpointError)
        if name in fields and fields[name] != value:
            raise CheckpointError(f"{where} has {name}={shown(value)}, but its config has {name}={shown(fields[name])}")
    return {**fields, **own_of(method, own)}


def _unknown(source: str, method: Method, name: str, value: Any, kind: type[PeftcoreError]) -> PeftcoreError:
    return kind(
        f"{source} uses {name}={shown(value)}, which the installed plugin '{method.name}' does not support. The "
        "adapter was not loaded, because it would compute something else without this field"
    )


@contextlib.contextmanager
def guarded(method: Method, where: str, kind: type[PeftcoreError] = CheckpointError) -> Iterator[None]:
    """Turn exceptions of a plugin inside the block into errors about the content of `where`."""
    try:
        yield
    except PeftcoreError:
        raise
    except Exception as error:
        raise kind(
            f"{where} contains something that the plugin '{method.name}' cannot use: {type(error).__name__}: {error}"
        ) from error


DEFAULTS = files(__package__) / "peft_defaults.json"  # may be in a zip file

EMPTY: tuple[Any, ...] = (None, False, "", [], {}, 0)


@cache
def _content() -> dict[str, Any]:
    return json.loads(DEFAULTS.read_text(encoding="utf-8"))


def peft_version() -> str:
    """Return the version of PEFT that the defaults come from."""
    return str(_content()["peft"])


def defaults(peft_type: str) -> dict[str, Any]:
    """Return {field: PEFT's default} for non-empty defaults, or {} for a type that PEFT does not have."""
    return dict(_content()["defaults"].get(peft_type, {}))


def is_of_peft(peft_type: str) -> bool:
    """Return whether PEFT has adapters of this type."""
    return peft_type in _content()["defaults"]


def says_something(peft_type: str, name: str, value: Any) -> bool:
    """Return whether the value of a field differs from PEFT's default and is not empty.

    None does not count as different, nor does an empty value if PEFT's default is empty. `False` or 0 count if the
    default is not empty.
    """
    peft_defaults = defaults(peft_type)
    if name in peft_defaults:
        return value is not None and value != peft_defaults[name]
    return value not in EMPTY
