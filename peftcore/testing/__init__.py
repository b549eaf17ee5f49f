"""Conformance suite for plugin authors: `check_method(config)` tests a method in all the ways that users use it.

It imports `files`, `quantization` and what is below them, and for the calls of users `peftcore` itself. Public names,
all in `peftcore.plugin`: `check_method`, `check_sharded`, `disturb`, `Family`, `FAMILIES`, and names of checks.
"""

from __future__ import annotations

from peftcore.testing.case import disturb as disturb
from peftcore.testing.checks import (
    CHECKS as CHECKS,
    COMPILE as COMPILE,
    IDENTITY as IDENTITY,
    MERGE as MERGE,
    PEFT_READS as PEFT_READS,
    PEFT_WRITES as PEFT_WRITES,
)
from peftcore.testing.families import FAMILIES as FAMILIES, Family as Family, tiny_llama as tiny_llama
from peftcore.testing.sharded import check_sharded as check_sharded
from peftcore.testing.suite import Report as Report, Result as Result, check_method as check_method
