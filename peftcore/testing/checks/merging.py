"""Checks of merging into the weights, and of several adapters on one module.

The second adapter comes from a method of the suite: y = gain · base(x) on every linear layer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import peftcore
from peftcore.engine import adapter_parameters
from peftcore.model import targets
from peftcore.model.base_modules import base_parameters
from peftcore.plugin.adapter import Adapter, Base
from peftcore.plugin.architecture import Architecture
from peftcore.plugin.hooks import hookimpl
from peftcore.plugin.method import Method, StateRules
from peftcore.plugin.placements.around import Around
from peftcore.plugin.registry import registry
from peftcore.testing.case import Case, close, disturb, logits, loss_of, merge_exactly, same
from peftcore.testing.checks.register import check

_OTHER = "the-suites-other"  # name of the suite's method


@check("merge equals forward, unmerge is bit exact", essential=True, refused=True)
def merging(case: Case) -> None:
    model, inputs = case.model(), case.inputs()
    _merge_and_unmerge(model, inputs, "merged")


def _merge_and_unmerge(model: nn.Module, inputs: dict[str, Tensor], label: str) -> None:
    unmerged_output = logits(model, inputs)
    weights = {name: p.detach().clone() for name, p in base_parameters(model)}
    merge_exactly(model)
    close(logits(model, inputs), unmerged_output, label)
    peftcore.unmerge(model)
    for name, parameter in base_parameters(model):
        same(parameter, weights[name], name)
    same(logits(model, inputs), unmerged_output, f"{label} and unmerged")


@check("two adapters of the method together, merged in both orders")
def together(case: Case) -> str | None:
    model, inputs = case.model(adapter="a"), case.inputs()
    single_output = logits(model, inputs)
    try:
        case.add(model, 2, "b")
    except peftcore.PeftcoreError as refusal:
        if "two active adapters cannot train the same parameter" in str(refusal):
            return "two active adapters cannot train the same parameter, and apply refuses it"
        raise
    _in_both_orders(model, inputs, ("a", "b"), case.merges)
    peftcore.remove(model, "b")
    same(logits(model, inputs), single_output, "with the second removed")
    return None


@check("with another method's adapter, merged in both orders, saved and removed", essential=True)
def stacked(case: Case) -> None:
    inputs = case.inputs()
    with _other_method():
        model = case.model()
        single_output = logits(model, inputs)
        _add_other(model)
        _in_both_orders(model, inputs, ("default", "other"), case.merges)
        with tempfile.TemporaryDirectory() as folder:
            peftcore.save(model, folder, adapter="default")
            same(logits(peftcore.load(case.base(), folder), inputs), single_output, "its file alone")
        peftcore.remove(model, "other")
        same(logits(model, inputs), single_output, "after removing the other adapter")

        model = case.base()
        _add_other(model)
        expected = logits(model, inputs)
        peftcore.remove(case.add(model, 1, "default"), "default")
        same(logits(model, inputs), expected, "the other adapter alone, after removal")


def _in_both_orders(model: nn.Module, inputs: dict[str, Tensor], names: Sequence[str], merges: bool) -> None:
    for order in (names, names[::-1]):
        label = " inside ".join(order)
        peftcore.activate(model, order)
        loss_of(model, inputs).backward()
        for name in order:
            for parameter_name, parameter in adapter_parameters(model, name):
                assert parameter.grad is not None, f"{label}: '{parameter_name}' of '{name}' gets no gradient"
                assert torch.isfinite(parameter.grad).all(), f"{label}: the gradient of '{parameter_name}' of '{name}'"
        model.zero_grad()
        if merges:
            _merge_and_unmerge(model, inputs, f"{label}, merged")


@dataclass(frozen=True)
class _OtherConfig:
    """Config of the suite's method, without fields."""


class _Gain(Adapter):
    """One gain per output: y = gain · base(x)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(size))

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y: Tensor = base(x)
        return y * self.gain.to(y.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * self.gain[:, None], None if bias is None else bias * self.gain


def _place_gains(model: nn.Module, config: _OtherConfig, architecture: Architecture) -> list[Around]:
    layers = targets.select(model, architecture, target_modules=targets.ALL_LINEAR)
    return [Around(path, _Gain(targets.sizes(layer)[1])) for path, layer in layers.items()]


class _OtherPlugin:
    @hookimpl
    def peftcore_methods(self) -> list[Method]:
        return [Method(_OTHER, _OtherConfig, _place_gains, StateRules(peft_type="THE_SUITES_OTHER"))]


@contextmanager
def _other_method() -> Iterator[None]:
    """Register the suite's method within the block."""
    registry.register(_OTHER, _OtherPlugin())
    try:
        yield
    finally:
        registry.unregister(_OTHER)


def _add_other(model: nn.Module) -> None:
    """Apply the suite's method to `model` as the adapter `other`, with gains different from 1."""
    peftcore.apply(model, _OtherConfig(), adapter="other")
    disturb(model, "other", 3)
