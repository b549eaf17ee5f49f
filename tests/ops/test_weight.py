"""A packed weight that was put together by hand is whole, or refused by the names of its parts."""

import itertools

import pytest
import torch

from peftcore import ops

NESTED = ("nested_absmax", "nested_quant_map", "nested_offset")


@pytest.mark.parametrize("kept", [c for n in (1, 2) for c in itertools.combinations(NESTED, n)])
def test_nested_scales_in_part_are_refused(kept: tuple[str, ...]) -> None:
    whole = ops.quantize_4bit(torch.randn(16, 64), double_quant=True)
    weight = whole._replace(**{name: None for name in NESTED if name not in kept})
    found = ", ".join(name if name in kept else f"no {name}" for name in NESTED)
    with pytest.raises(ValueError, match=f"{NESTED[-1]} together, found {found}"):
        ops.dequantize_4bit(weight, dtype=torch.float32)
    with pytest.raises(ValueError, match=found):
        ops.linear_4bit(torch.randn(2, 64), weight)
    assert ops.linear_4bit(torch.randn(2, 64), whole).shape == (2, 16)
