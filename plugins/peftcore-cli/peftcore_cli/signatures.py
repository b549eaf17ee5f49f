"""Convert the fields of a dataclass to options of a command, so that each option is defined once.

@dataclass(frozen=True, kw_only=True)
class RunOptions:
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps.")] = None
    ...

def train(output: Path, given: RunOptions): ...                          # an option for each field
def plan(model: str, given: Annotated[RunOptions, ("steps",)]): ...      # for these fields; others keep defaults
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any

from typing_extensions import get_type_hints


@dataclass(frozen=True)
class _Group:
    """A parameter whose type is a dataclass, and the names of the fields that become options."""

    kind: type
    names: Sequence[str]

    def parameters(self) -> list[inspect.Parameter]:
        hints = get_type_hints(self.kind, include_extras=True)
        defaults = {
            field.name: inspect.Parameter.empty if field.default is MISSING else field.default
            for field in fields(self.kind)
        }
        return [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=hints[name])
            for name in self.names
        ]


def expand(command: Callable[..., Any]) -> Callable[..., Any]:
    """Return `command` with each dataclass parameter replaced by one parameter per field, for typer."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, _Group] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        group = _group(hints[parameter.name])
        if group is None:
            parameters.append(parameter.replace(annotation=hints[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY))
        else:
            groups[parameter.name] = group
            parameters += group.parameters()
    if not groups:
        return command

    @functools.wraps(command)
    def expanded(**values: Any) -> Any:
        for name, group in groups.items():
            values[name] = group.kind(**{field: values.pop(field) for field in group.names})
        return command(**values)

    expanded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return expanded


def _group(hint: Any) -> _Group | None:
    kind, *metadata = (hint.__origin__, *hint.__metadata__) if hasattr(hint, "__metadata__") else (hint,)
    if not (isinstance(kind, type) and is_dataclass(kind)):
        return None
    names = next((item for item in metadata if isinstance(item, tuple)), None)
    return _Group(kind, names or tuple(field.name for field in fields(kind)))
