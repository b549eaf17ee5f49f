"""What an author of a method writes; `tests/test_typed.py` runs mypy on this file, and nobody runs it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from peftcore.plugin import Adapter, Architecture, Around, Base, BranchedBase, LowRank, Placement, Train, override


class Gain(Adapter):
    whole_batch = True

    @override
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight, bias

    def forward(self, base: Base, x: Tensor) -> Any:
        base.wieght()  # E: "Base" has no attribute "wieght"
        base.branch("a")  # E: "Base" has no attribute "branch"
        return base(x)


class Misspelt(Adapter):
    whole_batch = "yes"  # E: Incompatible types in assignment

    @override
    def mergd(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:  # E: marked as an override
        return weight, bias

    @override
    def low_rank(self) -> LowRank:  # E: Return type "LowRank" of "low_rank" incompatible
        raise NotImplementedError

    @override
    def in_output(self, call: Any) -> bool:  # E: Signature of "in_output" incompatible
        return True


class Combined(Adapter):
    def forward(self, base: BranchedBase, x: Tensor) -> Any:
        return base.own(x) + base.branch("a")(x)


def place(model: nn.Module, config: Any, architecture: Architecture) -> list[Placement]:
    if config:
        return [Gain()]  # E: List item 0 has incompatible type "Gain"
    return [Around("a", Gain()), Train(["b"])]
