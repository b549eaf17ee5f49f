"""Which of two runs this is: `make test`, the day's, or `make test-all`, which has all families, cases and checks."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from typing import Any

import pytest

WHOLE = os.environ.get("PEFTCORE_TESTS") == "all"


def nightly_but(values: Iterable[Any], kept: Collection[Any]) -> list[Any]:
    """Parameters of a test of which those that are not `kept` run in `make test-all` alone."""
    return [value if value in kept else pytest.param(value, marks=pytest.mark.nightly) for value in values]
