"""Conversion of the fields of a file, or of a config object of Hugging Face PEFT, to a method's config."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from peftcore.errors import CheckpointError, PeftcoreError
from peftcore.method import Method
from peftcore.peft_fields.defaults import says_something
from peftcore.validation import check_types, shown

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


def config_of_fields(
    where: str, method: Method, fields: Mapping[str, Any], kind: type[PeftcoreError] = CheckpointError
) -> Any:
    """Return the method's config for the fields.

    Args:
        where: where the fields are, for messages.
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
    """Return the method's config of the fields that `StateRules.read` returned; see `config_of_fields`."""
    known = {f.name for f in dataclasses.fields(method.config_class)}
    ignored = {*COMMON, "ensure_weight_tying"}  # a method may lack it: the tensors show it
    for name, value in read.items():
        if name not in known and name not in ignored and says_something(peft_type, name, value):
            raise _unknown(where, method, name, value, kind)
    read = {name: value for name, value in read.items() if name in known}
    try:
        check_types(method.config_class, read)
        return method.config_class(**read)
    except (TypeError, PeftcoreError) as error:
        raise kind(f"{where} is not a valid config of '{method.name}': {error}") from error


def own_of(method: Method, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the fields outside a config that belong to the method."""
    return {name: value for name, value in own.items() if name in method.state.peft.own_fields}


def with_own(where: str, method: Method, fields: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a config combined with those outside it (`PeftRules.own_fields`), found at `where`.

    Raises:
        CheckpointError: one of the latter is not the method's, or is also in the config.
    """
    for name, value in own.items():
        if name not in method.state.peft.own_fields:
            raise _unknown(where, method, name, value, CheckpointError)
        if name in fields and fields[name] != value:
            raise CheckpointError(f"{where} has {name}={shown(value)}, but its config {name}={shown(fields[name])}")
    return {**fields, **own_of(method, own)}


def _unknown(where: str, method: Method, name: str, value: Any, kind: type[PeftcoreError]) -> PeftcoreError:
    return kind(
        f"{where} uses {name}={shown(value)}, which the installed plugin '{method.name}' does not "
        "support. Without it the adapter would compute something else, so it is not loaded"
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
