"""Models with the method applied, their inputs, and training steps for the checks."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn

import peftcore
from peftcore.engine import adapter_parameters
from peftcore.engine.initialization import initializer
from peftcore.model import detect, observe, share_cache
from peftcore.plugin import sharded
from peftcore.plugin.method import Method
from peftcore.plugin.registry import registry
from peftcore.testing.families import Family


@dataclass(frozen=True)
class Case:
    """Run of the suite on one family: a config, and the models that the method is applied to.

    Args:
        first: the case of the family that all checks run on; None if this is that case.
        batches: (model) -> batches to initialise the adapter; None for calls of the family, with labels.
    """

    config: Any
    family: Family
    compile_backend: str = "aot_eager"
    first: Case | None = None
    batches: Callable[[nn.Module], Iterable[Any]] | None = None

    @property
    def method(self) -> Method:
        return registry.method_of_config(self.config)

    def base(self, dtype: torch.dtype = torch.float32, *, quant_type: str | None = None) -> nn.Module:
        """Return the family's model, prepared if the method prepares the base. `quant_type`: quantized before that."""
        if self.method.prepare is None:
            model = _model_of(self.family, dtype, quant_type)
            shared = _made(self.family, dtype, quant_type)
        else:
            shared = self._prepared(dtype, quant_type)
            model = copy.deepcopy(shared)
        share_cache(model, shared)  # observing each model again would take most of the suite's time
        if self.family.before is not None:
            self.family.before(model)
        return model

    def _prepared(self, dtype: torch.dtype, quant_type: str | None) -> nn.Module:
        """Return a copy of the family's model as prepared by the method; preparation runs once."""
        if (dtype, quant_type) not in self._made_before:
            model = _model_of(self.family, dtype, quant_type)
            share_cache(model, _made(self.family, dtype, quant_type))
            peftcore.remove(self.add(model, None, "default"))
            observe(model)
            self._made_before[dtype, quant_type] = model
        torch.manual_seed(0)  # as a copy of the family's model does
        return self._made_before[dtype, quant_type]

    @cached_property
    def _made_before(self) -> dict[tuple[torch.dtype, str | None], nn.Module]:
        return {}

    def why_not_quantized(self, quant_type: str) -> str | None:
        """Return the reason why the family's model cannot be quantized to a format, or None if it can."""
        try:
            _made(self.family, torch.float32, quant_type)
        except peftcore.PeftcoreError as refusal:
            return f"its model cannot be quantized: {refusal}"
        return None

    def unprepared(self) -> nn.Module:
        """Return the family's model before preparation by the method."""
        model = self.family.make()
        share_cache(model, self._made)
        if self.family.before is not None:
            self.family.before(model)
        return model

    def model(self, dtype: torch.dtype = torch.float32, seed: int | None = 1, adapter: str = "default") -> nn.Module:
        """Return a model with the adapter, whose values get noise from `seed`; None leaves the initial values."""
        return self.add(self.base(dtype), seed, adapter)

    def add(self, model: nn.Module, seed: int | None, adapter: str) -> nn.Module:
        """Apply the method to `model`, with the same initial values at each call."""
        torch.manual_seed(7)
        try:
            peftcore.apply(model, self.config, adapter=adapter)
        except peftcore.PluginError:
            raise
        except peftcore.PeftcoreError:  # the method may need data to initialise
            if initializer(self.method, self.config)[0] is None:
                raise
            torch.manual_seed(7)
            peftcore.apply(model, self.config, adapter=adapter, batches=self._batches())
        if seed is not None:
            disturb(model, adapter, seed)
        return model

    def _batches(self) -> Iterable[Any]:
        """Return batches for initialisation: the author's, or two calls, with labels if the model takes them."""
        if self.batches is not None:
            return self.batches(self._made)
        batches = [
            self.family.inputs(self._made, rows) for rows in (2, 3)
        ]  # preparing `base()` may itself need batches
        if "labels" in inspect.signature(self._made.forward).parameters:
            for batch in batches:
                batch["labels"] = self._labels(batch)
        return batches

    def _labels(self, batch: dict[str, Tensor]) -> Tensor:
        """Return labels: a class per row for a classifier, the tokens for a language model."""
        if detect(self._made).output_head is not None:
            return batch.get("decoder_input_ids", batch["input_ids"]).clone()
        rows = len(next(iter(batch.values())))
        return torch.arange(rows) % getattr(getattr(self._made, "config", None), "num_labels", 2)

    @property
    def _made(self) -> nn.Module:
        """Shared model of the family; facts observed on it hold for all models of the family."""
        return _made(self.family)

    @cached_property
    def original(self) -> nn.Module:
        """The unchanged base, to read facts from and to compare with."""
        return self.base()

    @cached_property
    def base_output(self) -> Tensor:
        """Output of the base for `inputs()`."""
        return logits(self.original, self.inputs())

    @cached_property
    def starts_as_base(self) -> bool:
        """Whether the adapter changes nothing before training."""
        actual, expected = logits(self.model(seed=None), self.inputs()), self.base_output
        return actual.shape == expected.shape and torch.allclose(actual, expected, rtol=0, atol=1e-5)

    @cached_property
    def merges(self) -> bool:
        """Whether the method can be merged."""
        try:
            merge_exactly(self.model())
        except peftcore.PeftcoreError:
            return False
        return True

    @property
    def generates(self) -> bool:
        """Whether the model generates text."""
        model: Any = self.original
        return hasattr(model, "can_generate") and bool(model.can_generate())

    @property
    def is_encoder_decoder(self) -> bool:
        return bool(getattr(getattr(self.original, "config", None), "is_encoder_decoder", False))

    def inputs(self, rows: int = 2) -> dict[str, Tensor]:
        """Return a call of the model."""
        return self.family.inputs(self.original, rows)

    def prompts(self) -> dict[str, Tensor]:
        """Return tokens and mask for two rows of the same length."""
        return {name: self.inputs()[name] for name in ("input_ids", "attention_mask")}


@cache
def _made(family: Family, dtype: torch.dtype = torch.float32, quant_type: str | None = None) -> nn.Module:
    model = _model_of(family, dtype, quant_type)
    if quant_type is not None:
        observe(model)
    return model


def _model_of(family: Family, dtype: torch.dtype, quant_type: str | None) -> nn.Module:
    model = family.make().to(dtype)
    if quant_type is not None:
        share_cache(model, _made(family, dtype))
        if quant_type == "affine4":
            peftcore.quantize(model, quant_type, blocksize=32)  # sizes of the models' layers are multiples of it
        else:
            peftcore.quantize(model, quant_type)
    return model


def disturb(model: nn.Module, adapter: str, seed: int, std: float = 0.2) -> None:
    """Add noise to all trained parameters of `adapter`, so that it changes the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in adapter_parameters(model, adapter):
            noise = std * torch.randn(parameter.shape, generator=generator)
            if sharded.is_dtensor(parameter):
                parameter.add_(sharded.sharded_like(noise, parameter))
            else:
                parameter.add_(noise.to(parameter))


def merge_exactly(model: nn.Module) -> None:
    """Merge all adapters.

    Raises:
        PeftcoreError: merging is refused, or requantizing loses part of the change.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", ".*requantizing ")
        peftcore.merge(model, undo=True)
    for warning in caught:
        if "requantizing " in str(warning.message):
            raise peftcore.PeftcoreError(str(warning.message))
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def logits(model: Callable[..., Any], inputs: dict[str, Any]) -> Tensor:
    """Return the model's first output, computed without gradients."""
    with torch.no_grad():
        return first_output(model(**inputs))


def first_output(output: Any) -> Tensor:
    """Return a model's output, or its first element."""
    return output if isinstance(output, Tensor) else output[0]


def same(actual: Tensor, expected: Tensor, label: str, atol: float = 0.0) -> None:
    """Fail if two tensors differ by more than `atol`."""
    assert actual.shape == expected.shape, f"{label}: has shape {list(actual.shape)}, expected {list(expected.shape)}"
    difference = (actual.float() - expected.float()).abs().max().item() if actual.numel() else 0.0
    assert difference <= atol, f"{label}: differs by {difference:.3g}, allowed {atol:g}"


def close(actual: Tensor, expected: Tensor, label: str, share: float = 1e-4) -> None:
    """Fail if two tensors differ by more than this fraction of the largest value."""
    same(actual, expected, label, atol=share * expected.abs().max().item())


def differs(actual: Tensor, base: Tensor) -> None:
    """Fail if two tensors are equal."""
    assert actual.shape != base.shape or not torch.equal(actual, base), "the adapter changes nothing"


def loss_of(model: Callable[..., Any], inputs: dict[str, Tensor]) -> Tensor:
    """Return a loss that works for any output: a mean over the rows of a batch."""
    output = first_output(model(**inputs)).float()
    targets = torch.arange(output[0, ..., 0].numel()) % 3
    return nn.functional.cross_entropy(output.flatten(0, -2), targets.repeat(len(output)))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW for the trained parameters."""
    return torch.optim.AdamW(peftcore.parameter_groups(model, lr=1e-2, weight_decay=0.01))


def train(
    model: nn.Module,
    inputs: dict[str, Tensor],
    steps: int,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    begin: int = 0,
    total: int | None = None,
) -> list[float]:
    """Train `steps` steps of `total`, starting after step `begin`, as trainers do, and return the losses."""
    optimizer = optimizer or optimizer_of(model)
    losses = []
    for step in range(begin + 1, begin + steps + 1):
        optimizer.zero_grad()
        loss = loss_of(model, inputs) + peftcore.extra_loss(model)
        loss.backward()
        optimizer.step()
        peftcore.after_step(model, step, total or begin + steps, optimizer=optimizer)
        losses.append(loss.item())
    return losses
