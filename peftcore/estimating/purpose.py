"""Purposes of a step's memory."""

from __future__ import annotations

from enum import Enum


class Purpose(str, Enum):
    """Purpose of memory in `Estimate.parts` and `Estimate.timeline`; a member equals its text, such as "base"."""

    BASE = "base"
    GATHERED = "gathered weights"
    ADAPTERS = "adapters"
    GRADIENTS = "gradients"
    STATE = "optimizer state"
    INPUTS = "inputs"
    ACTIVATIONS = "activations"
    LOGITS = "logits and loss"
    TEMPORARIES = "temporaries"
    KERNELS = "inside operators"
    MESSAGES = "between ranks"
    KEPT = "kept by operators"

    def __str__(self) -> str:
        return self.value

    def __format__(self, spec: str) -> str:
        return format(self.value, spec)  # the default `__str__` of a text enumeration differs between Python releases
