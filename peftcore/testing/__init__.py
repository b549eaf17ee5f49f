"""Conformance suite for plugin authors: `check_method(config)` tries what users do with a method."""

from __future__ import annotations

from peftcore.testing.case import disturb
from peftcore.testing.checks import CHECKS, COMPILE, IDENTITY, MERGE, PEFT_READS, PEFT_WRITES
from peftcore.testing.families import FAMILIES, Family, tiny_llama
from peftcore.testing.sharded import check_sharded
from peftcore.testing.suite import Report, Result, check_method

__all__ = [
    "CHECKS",
    "COMPILE",
    "FAMILIES",
    "IDENTITY",
    "MERGE",
    "PEFT_READS",
    "PEFT_WRITES",
    "Family",
    "Report",
    "Result",
    "check_method",
    "check_sharded",
    "disturb",
    "tiny_llama",
]
