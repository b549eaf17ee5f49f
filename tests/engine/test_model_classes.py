"""Fused operators and the loss without logits in transformers' model classes: results are those without them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from census import instances
from census.case import distance, gradients, run
from census.inputs import inputs
from torch import Tensor, nn

import peftcore
from peftcore.engine.adaptation.fused_forward import fused_modules

ROUNDING = 3e-5  # of the largest value, in fp32
FUSED, WITHOUT_LOGITS = 300, 120  # classes that are compared, at least; transformers has more than 400 model types


def _without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for holder in (module, getattr(module, "config", None)):
            attributes = getattr(holder, "__dict__", {})
            attributes.update({k: 0.0 for k, v in attributes.items() if "drop" in k and isinstance(v, float)})
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def _slightly_changed(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v * (1 + 1e-6) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in values.items()}


def _largest(values: list[Tensor]) -> float:
    return max((v[v.abs() < 1e30].abs().max().item() for v in values if (v.abs() < 1e30).any()), default=1.0) or 1.0


def _difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Return the largest difference between gradients, of the largest; one that is absent is 0."""
    names = [*found.keys() | wanted.keys()]
    both = [(found.get(name, torch.zeros(())), wanted.get(name, torch.zeros(()))) for name in names]
    off = [(one.float() - other.float()).abs().max().item() for one, other in both]
    return max(off, default=0.0) / _largest(list(wanted.values()))


def _gradients(model: nn.Module, values: dict[str, Any]) -> dict[str, Tensor]:
    return gradients(copy.deepcopy(model), values, everywhere=True)


def _example(name: str) -> tuple[nn.Module, dict[str, Any], list[Tensor], dict[str, Tensor]] | None:
    """Return a model, its inputs, outputs, and gradients, or None where it does not run or is random."""
    try:
        model = _without_dropout(instances.build(name))
        values = inputs(name, model)
        outputs, slopes = run(model, values), _gradients(model, values)
        there = bool(outputs) and _difference(_gradients(model, values), slopes) < 1e-6
    except Exception:  # whatever a class raises that has not what it needs
        return None
    return (model, values, outputs, slopes) if there else None


def _wrong(name: str) -> list[str] | None:
    """Return what differs with fused operators, or None where they compute nothing."""
    example = _example(name)
    if example is None:
        return None
    model, values, outputs, slopes = example
    fused = peftcore.fuse(copy.deepcopy(model))
    if not fused_modules(fused):
        return None
    wrong = []
    if distance(run(fused, values), outputs) > ROUNDING * _largest(outputs):
        wrong.append(f"{name}: outputs")
    off = _difference(_gradients(fused, values), slopes)
    # Where a millionth of the inputs changes gradients as much, they are ill-conditioned.
    if off > ROUNDING and off > 3 * _difference(_gradients(model, _slightly_changed(values)), slopes):
        wrong.append(f"{name}: gradients, by {off:.1e}")
    return wrong


def _of_each_type() -> list[str]:
    first: dict[str, str] = {}
    for name, model_type in instances.classes().items():
        first.setdefault(model_type, name)
    return list(first.values())


@pytest.mark.nightly
def test_outputs_and_gradients_of_a_class_of_each_model_type() -> None:
    found = [wrong for name in _of_each_type() if (wrong := _wrong(name)) is not None]
    assert not [each for wrong in found for each in wrong]
    assert len(found) > FUSED


def _step(model: Any, values: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and the gradients of a step in training mode."""
    model = copy.deepcopy(model).train()
    loss = model(**copy.deepcopy(values)).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.numel()}


def _language_model(name: str) -> tuple[nn.Module, dict[str, Any], Tensor, dict[str, Tensor]] | None:
    """Return a model with a head, its inputs with labels, loss, and gradients; None where it has none or fails."""
    try:
        model = _without_dropout(instances.build(name))
        values = inputs(name, model)
        labels = values["input_ids"].clone()
        labels.view(-1)[:2] = -100
        values["labels"] = labels
        peftcore.loss_without_logits(model)
        peftcore.loss_without_logits(model, enabled=False)
        loss, slopes = _step(model, values)
        there = bool(loss.isfinite()) and _difference(_step(model, values)[1], slopes) < 1e-6
    except Exception:  # whatever a class raises that has not what it needs; or it is refused
        return None
    return (model, values, loss, slopes) if there else None


@pytest.mark.nightly
def test_steps_without_logits_of_each_language_model() -> None:
    wrong, count = list[str](), 0
    names = [
        name for name in instances.classes() if name.endswith(("CausalLM", "LMHeadModel", "ConditionalGeneration"))
    ]
    for name in names:
        found = _language_model(name)
        if found is None:
            continue
        count += 1
        model, values, wanted, slopes = found
        loss, others = _step(peftcore.loss_without_logits(copy.deepcopy(model)), values)
        if (loss - wanted).abs() > ROUNDING * wanted.abs().clamp(min=1) or _difference(others, slopes) > ROUNDING:
            wrong.append(name)
    assert not wrong
    assert count > WITHOUT_LOGITS
