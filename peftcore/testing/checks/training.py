"""Checks of training: steps, schedules, resuming, gradient checkpointing, a quantized base."""

from __future__ import annotations

import tempfile
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

import peftcore
from peftcore.engine import adapter_parameters
from peftcore.model.base_modules import base_parameters
from peftcore.model.experts import experts_layout
from peftcore.testing.case import Case, close, disturb, first_output, logits, loss_of, optimizer_of, same, train
from peftcore.testing.checks.register import check


@check("training lowers the loss")
def learns(case: Case) -> None:
    losses = train(case.model(seed=None), case.inputs(), steps=12)
    assert losses[-1] < losses[0], f"the loss went from {losses[0]:.4f} to {losses[-1]:.4f} in 12 steps"


@check("resume is exact")
def resuming(case: Case) -> None:
    inputs, half, total = case.inputs(), 2, 4
    uninterrupted = case.model(seed=None)
    train(uninterrupted, inputs, steps=total)
    first_half, second_half = case.model(seed=None), case.base()
    with tempfile.TemporaryDirectory() as folder:
        optimizer = optimizer_of(first_half)
        train(first_half, inputs, steps=half, optimizer=optimizer, total=total)
        peftcore.save(first_half, folder, adapter="default")
        peftcore.load(second_half, folder, trainable=True)
    resumed = optimizer_of(second_half)
    resumed.load_state_dict(optimizer.state_dict())
    train(second_half, inputs, steps=half, optimizer=resumed, begin=half, total=total)
    for (name, parameter), (_, expected) in zip(
        adapter_parameters(second_half, "default"), adapter_parameters(uninterrupted, "default"), strict=True
    ):
        same(parameter, expected, name)
    same(logits(second_half, inputs), logits(uninterrupted, inputs), "output")


@check("gradients of four accumulated batches equal those of one, with the method's loss term once")
def accumulating(case: Case) -> None:
    inputs, full_batch_model, accumulated_model = case.inputs(rows=4), case.model(), case.model()
    (loss_of(full_batch_model, inputs) + peftcore.extra_loss(full_batch_model)).backward()
    for row in range(4):
        loss = loss_of(accumulated_model, {name: value[row : row + 1] for name, value in inputs.items()})
        ((loss + peftcore.extra_loss(accumulated_model)) / 4).backward()
    actual = gradients_of(accumulated_model)
    for name, expected in gradients_of(full_batch_model).items():
        same(actual[name], expected, f"gradient of '{name}'", atol=1e-4 * expected.abs().max().item() + 1e-6)


@check("parameter groups name each trained parameter once")
def grouping(case: Case) -> None:
    model = case.model()
    groups = peftcore.parameter_groups(model, lr=1e-3, weight_decay=0.01)
    members = chain.from_iterable(group["params"] for group in groups)
    parameters = [member[1] if isinstance(member, tuple) else member for member in members]
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    assert len({id(p) for p in parameters}) == len(parameters), "a parameter is in two groups"
    missing_ids = trained.keys() - {id(p) for p in parameters}
    assert not missing_ids, f"in no group: {sorted(trained[key] for key in missing_ids)[:3]}"
    assert len(parameters) == len(trained), "a group contains parameters that are not trained"
    assert all(group.get("lr", 1e-3) > 0 for group in groups), "a group has a learning rate that is not positive"


@check("gradient checkpointing", essential=True)
def checkpointing(case: Case) -> str | None:
    if not getattr(case.original, "supports_gradient_checkpointing", False):
        return "the model does not support it"
    expected: dict[str, Tensor] = {}
    options = {"use_cache": False} if case.generates else {}
    ways: list[dict[str, bool] | None] = [None, {"use_reentrant": False}]
    if case.first is None:
        ways.append({"use_reentrant": True})
    # Float64 where possible: in float32, gradients of T5, whose logits are large, differ by 1e-4 of their maximum.
    # PyTorch's grouped products for experts do not support float64, nor do 4-bit bases that a method prepares.
    has_experts = any(experts_layout(module) for module in case.original.modules())
    dtype = torch.float32 if has_experts or case.method.prepare is not None else torch.float64
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in case.inputs().items()}
    for kwargs in ways:
        model: Any = case.model(dtype).train()
        if kwargs is not None:
            _enable_checkpointing(model, kwargs)
        first_output(model(**inputs, **options)).square().mean().backward()
        actual = gradients_of(model, f"{kwargs}: ")
        expected = expected or actual
        for name, gradient in actual.items():
            limit = 1e-5 * expected[name].abs().max().item() + 1e-7  # for gradients that are zero up to rounding
            same(gradient, expected[name], f"{kwargs}: gradient of '{name}'", limit)
    return None


def _enable_checkpointing(model: Any, kwargs: dict[str, bool]) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None)  # renamed in transformers 5
    (enable or model.gradient_checkpointing_enable)(kwargs)
    if kwargs["use_reentrant"]:  # reentrant checkpointing needs an input that requires gradients
        model.enable_input_require_grads()


def gradients_of(model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Return the gradient of each parameter of the adapter. `prefix` begins the message of a failure."""
    gradients = {}
    for name, parameter in adapter_parameters(model, "default"):
        assert parameter.grad is not None, f"{prefix}'{name}' gets no gradient"
        gradients[name] = parameter.grad.clone()
    return gradients


@check("a quantized base (NF4)", essential=True)
def nf4_base(case: Case) -> str | None:
    return _quantized_base(case, "nf4")


@check("a quantized base (MXFP4)", essential=True)
def mxfp4_base(case: Case) -> str | None:
    return _quantized_base(case, "mxfp4")


@check("a quantized base (affine4)", essential=True)
def affine4_base(case: Case) -> str | None:
    return _quantized_base(case, "affine4")


def _quantized_base(case: Case, quant_type: str) -> str | None:
    reason = case.why_not_quantized(quant_type)
    if reason is not None:
        return reason
    base, inputs = case.base(quant_type=quant_type), case.inputs()
    bits = {name: p.clone() for name, p in base_parameters(base) if p.dtype is torch.uint8}
    untouched = logits(base, inputs)
    model = case.add(base, None, "default")
    if case.starts_as_base:
        close(logits(model, inputs), untouched, "output at the start")
    disturb(model, "default", 1)
    loss_of(model, inputs).backward()
    for name, gradient in gradients_of(model).items():
        assert torch.isfinite(gradient).all(), f"the gradient of '{name}' is not finite"
    acting = logits(model, inputs)
    with tempfile.TemporaryDirectory() as folder:
        peftcore.save(model, folder, adapter="default")
        fresh = peftcore.load(case.base(quant_type=quant_type), folder, trainable=True)
    same(logits(fresh, inputs), acting, "output after save and load")
    try:
        peftcore.merge(model, dtype=torch.float32, undo=True)
    except peftcore.PeftcoreError:
        if case.merges:
            raise
    else:
        close(logits(model, inputs), acting, "merged into dense weights")
        peftcore.unmerge(model)
        same(logits(model, inputs), acting, "unmerged")
    peftcore.remove(model, "default")
    same(logits(model, inputs), untouched, "removed")
    parameters = dict(base_parameters(model))
    for name, codes_before in bits.items():
        same(parameters[name], codes_before, f"the quantized '{name}'")
    return None
