"""What the checks work with: a model with the method applied, its inputs, and training steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import peftcore
from peftcore.engine import adapter_parameters


def tiny_llama(seed: int = 0) -> nn.Module:
    """A Llama of 2 layers, hidden size 32, grouped-query attention and a vocabulary of 96, random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 96}
    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()


@dataclass(frozen=True)
class Case:
    """One run of the suite: a config, and how its model is made."""

    config: Any
    make_model: Callable[[], nn.Module]
    compile_backend: str

    def base(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        return self.make_model().to(dtype)

    def model(self, dtype: torch.dtype = torch.float32, seed: int | None = 1, adapter: str = "default") -> nn.Module:
        """A model with the adapter, moved away from its start by noise of `seed` (None: as it starts)."""
        return self.add(self.base(dtype), seed, adapter)

    def add(self, model: nn.Module, seed: int | None, adapter: str) -> nn.Module:
        """Apply the method to `model`, the same start values at each call."""
        torch.manual_seed(7)
        peftcore.apply(model, self.config, adapter=adapter)
        if seed is not None:
            disturb(model, adapter, seed)
        return model

    @property
    def generates(self) -> bool:
        """Does the model write text?"""
        model: Any = self.base()
        return hasattr(model, "can_generate") and model.can_generate()

    def prompts(self) -> dict[str, Tensor]:
        """Tokens and mask, two rows of one length."""
        tokens = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(3))
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    def inputs(self) -> dict[str, Tensor]:
        """A call of the model."""
        inputs = self.prompts()
        if getattr(self.base().config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = inputs["input_ids"][:, :5]
        return inputs


def disturb(model: nn.Module, adapter: str, seed: int, std: float = 0.2) -> None:
    """Add noise to all that `adapter` trains, so that it computes something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in adapter_parameters(model, adapter):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((std * noise).to(parameter))


def logits(model: Callable[..., Any], inputs: dict[str, Tensor]) -> Tensor:
    """The model's first floating output, without gradients."""
    with torch.no_grad():
        return model(**inputs)[0]


def same(found: Tensor, wanted: Tensor, what: str, atol: float = 0.0) -> None:
    """Fail unless the two differ by `atol` at most."""
    assert found.shape == wanted.shape, f"{what}: shape {list(found.shape)}, expected {list(wanted.shape)}"
    difference = (found.float() - wanted.float()).abs().max().item()
    assert difference <= atol, f"{what}: differs by {difference:.3g}, allowed {atol:g}"


def differs(found: Tensor, base: Tensor) -> None:
    """Fail if the two are equal."""
    assert found.shape != base.shape or not torch.equal(found, base), "the adapter changes nothing"


def loss_of(model: Callable[..., Any], inputs: dict[str, Tensor]) -> Tensor:
    """A loss that any output has."""
    output = model(**inputs)[0].float()
    return torch.nn.functional.cross_entropy(output.flatten(0, -2), torch.arange(output[..., 0].numel()) % 3)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW over what trains."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train(
    model: nn.Module, inputs: dict[str, Tensor], steps: int, optimizer: torch.optim.Optimizer | None = None
) -> list[float]:
    """Train for `steps`; the losses."""
    optimizer = optimizer or optimizer_of(model)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, inputs)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
