"""Invertible adapters (MAD-X, Pfeiffer et al. 2020, arXiv 2005.00052, section 3.2.2) from NICE's coupling blocks.

    forward, after the embedding      y1 = x1 + F(x2)       inverse, before the head     x2 = y2 - G(y1)
    x = [x1, x2]                      y2 = x2 + G(y1)                                    x1 = y1 - F(x2)

F and G are bottlenecks `V act(D x)`, zero at the start. NICE: Dinh et al. 2014, arXiv 1410.8516.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peftcore.plugin import Adapter, After, Architecture, Around, Base, PeftcoreError, validation
from peftcore_adapter.bottleneck import linear
from peftcore_adapter.config import ACTIVATIONS, AdapterConfig


class Nice(nn.Module):
    """Invertible network from x `[..., width]` to y `[..., width]`."""

    def __init__(self, config: AdapterConfig, width: int) -> None:
        super().__init__()
        self.config, self.width = config, width
        first, second = width // 2, width - width // 2
        self.F, self.G = self._network(second, first), self._network(first, second)

    def _network(self, width: int, out_width: int) -> nn.Sequential:
        size = max(1, int(width // self.config.inv_adapter_reduction_factor))
        first, second = nn.Linear(width, size), nn.Linear(size, out_width)
        for parameter in (first.bias, *second.parameters()):
            nn.init.zeros_(parameter)
        return nn.Sequential(first, nn.Identity(), second)

    def _apply_network(self, network: nn.Sequential, x: Tensor) -> Tensor:
        return linear(network[2], ACTIVATIONS[self.config.non_linearity](linear(network[0], x)))

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        validation.require(
            x.shape[-1] == self.width,
            f"an invertible adapter needs vectors of the embedding's width {self.width}, found {x.shape[-1]}: this "
            "model projects them before the output head. Choose inv_adapter=None",
        )
        return x[..., : self.width // 2], x[..., self.width // 2 :]

    def forward(self, x: Tensor) -> Tensor:
        first, second = self._halves(x)
        first = first + self._apply_network(self.F, second)
        return torch.cat([first, second + self._apply_network(self.G, first)], -1)

    def inverse(self, y: Tensor) -> Tensor:
        first, second = self._halves(y)
        second = second - self._apply_network(self.G, first)
        return torch.cat([first - self._apply_network(self.F, second), second], -1)


class Inverse(Adapter):
    """Inverse before the output head, which thus reads hidden states in the embedding's original space."""

    def __init__(self, network: Nice) -> None:
        super().__init__()
        self.network = network

    def forward(self, base: Base, y: Tensor) -> Any:
        return base(self.network.inverse(y))


def placements(model: nn.Module, config: AdapterConfig, architecture: Architecture) -> list[Any]:
    """Return the placements after the embedding and before the output head."""
    tokens, name = architecture.embedding, type(model).__name__
    if tokens is None or architecture.is_encoder_decoder:
        reason = "its encoder and decoder share it" if tokens else "an image has no tokens"
        raise PeftcoreError(
            f"inv_adapter needs a token embedding that belongs to one stack, and {name} has none: {reason}. "
            "Choose inv_adapter=None"
        )
    # Prefer the module that sums word, position and type embeddings, unless it also contains the layers.
    parent = tokens.rpartition(".")[0]
    has_no_layers = parent and not any(sublayer.output.startswith(f"{parent}.") for sublayer in architecture.sublayers)
    embedding: Any = model.get_submodule(tokens)
    adapter = Nice(config, getattr(embedding, "embedding_dim", None) or embedding.weight.shape[-1])
    result: list[Any] = [After(parent if has_no_layers and parent != architecture.backbone else tokens, adapter)]
    if architecture.output_head is not None and config.inv_adapter_output:
        result.append(Around(architecture.output_head, Inverse(adapter)))
    return result
