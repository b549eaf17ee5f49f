"""Methods with a fault, for tests of the suite that is to find it."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import peftcore
from peftcore.plugin import Architecture, Around, Method
from peftcore.testing import Report, check_method
from support import tiny


class Gain(tiny.Scaled):
    """y = gain · base(x), with a number of its own for all outputs."""


def method_of(adapter: type[nn.Module], **changes: Any) -> Method:
    def place(model: nn.Module, config: Any, architecture: Architecture) -> list[Any]:
        layers = peftcore.model.targets.select(model, architecture, target_modules="all-linear")
        return [Around(path, adapter(config.value)) for path in layers]

    return tiny.method("faulty", place, **changes)


def check(method: Method, *checks: str, families: Any = ("Llama",), **others: Any) -> Report:
    with tiny.installed(method):
        return check_method(method.config_class(value=1.0), families=families, checks=checks, **others)


def failed(method: Method, *checks: str, **others: Any) -> dict[str, str]:
    """{"family: check": error} of a method that has a fault."""
    with pytest.raises(AssertionError) as found:
        check(method, *checks, **others)
    return {line.partition(":")[0].strip(): line for line in str(found.value).splitlines() if "FAILED" in line}
