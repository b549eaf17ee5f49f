"""A model that runs: its inputs, what it computes, and where it gets gradients."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from census.inputs import inputs as example
from peftcore.engine import adapter_parameters, state_of

_LARGEST = 1e30


class Wrong(Exception):
    """A result that is not what it must be."""


@dataclass
class Case:
    """A base model that runs, what it computes, and where its gradients are."""

    base: nn.Module
    inputs: dict[str, Any]
    outputs: list[Tensor]
    gradients: dict[str, Tensor]
    with_images: bool = False

    @classmethod
    def of(cls, base: nn.Module, images: dict[str, Any] | None = None) -> Case:
        """With the inputs of its class, or with those of `images`.

        Raises whatever the base raises: such a model is no case.
        """
        inputs = example(type(base).__name__, base) if images is None else images
        outputs = run(base, inputs)
        if not outputs:
            raise ValueError("no floating output")
        if not same(outputs, run(base, inputs)):
            raise ValueError("not the same output twice")
        found = gradients(copy.deepcopy(base), inputs, everywhere=True)
        return cls(base, inputs, outputs, found, images is not None)

    def model(self) -> nn.Module:
        return copy.deepcopy(self.base)


def run(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """All floating outputs, without gradients."""
    torch.manual_seed(11)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(tensors(model(**copy.deepcopy(inputs))))


def tensors(output: Any) -> Iterator[Tensor]:
    """The floating tensors of an output; caches are none."""
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.numel():
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from tensors(value)


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    """Equal to rounding: where memory lies decides in which order some kernels add (ConvBERT's)."""
    finite = (each.float()[each.abs() < _LARGEST] for each in wanted)
    largest = max((each.abs().max().item() for each in finite if each.numel()), default=0.0)
    return distance(found, wanted) <= 2e-6 * max(1.0, largest)


def distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference; infinite where shapes differ."""
    if len(found) != len(wanted) or any(a.shape != b.shape for a, b in zip(found, wanted, strict=False)):
        return float("inf")
    return max((_counted(a) - _counted(b)).abs().max().item() for a, b in zip(found, wanted, strict=True))


def _counted(values: Tensor) -> Tensor:
    """In fp32; infinities and what stands for them in masked logits are one number, beside which others show."""
    return torch.nan_to_num(values.float(), posinf=_LARGEST, neginf=-_LARGEST).clamp(-_LARGEST, _LARGEST)


def gradients(model: nn.Module, inputs: dict[str, Any], *, everywhere: bool = False) -> dict[str, Tensor]:
    """{name: gradient} of one step in training mode, those that are not zero; the model is in eval mode afterwards."""
    if everywhere:
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
    model.train()
    torch.manual_seed(11)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outputs = [o for o in tensors(model(**copy.deepcopy(inputs))) if o.requires_grad]
    generator = torch.Generator().manual_seed(5)
    loss = torch.zeros(())
    for output in outputs:
        finite = torch.where(output.abs() < _LARGEST, output, torch.zeros_like(output)).float()
        loss = loss + (finite * torch.randn(output.shape, generator=generator)).sum()
    if outputs:
        loss.backward()
    model.eval()
    found = {name: p.grad for name, p in _parameters(model) if p.grad is not None and bool(p.grad.any())}
    model.zero_grad()
    return found


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    if state_of(model) is None:
        yield from model.named_parameters()
    else:
        yield from adapter_parameters(model, "default")
