"""Hugging Face PEFT loads adapters saved here, and vice versa; the formula for all sizes; invalid configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, strategies as st
from peftcore_fourierft import FourierFT, FourierFTConfig, Positions
from support import tiny
from support.against_peft import both_ways, quiet, same_start

import peftcore

TARGETS = {"llama": ["k_proj", "v_proj", "down_proj"], "bert": ["key", "output.dense"], "t5": ["k", "v", "wo"]}
TARGETS["gpt2"] = ["c_attn"]
TASKS = {"llama": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM", "gpt2": "CAUSAL_LM"}


@pytest.mark.parametrize(
    ("kind", "options"),
    [("llama", {"n_frequency": 30, "n_frequency_pattern": {"v_proj": 9}}),
     ("gpt2", {"n_frequency": 50, "fan_in_fan_out": True, "scaling": 90.0}),
     ("bert", {"n_frequency": 40, "bias": "fourier_only", "init_weights": True}),
     ("t5", {"n_frequency": 60, "random_loc_seed": 5, "scaling": 50.0})],
)  # fmt: skip
def test_files(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    make, fields = tiny.MODELS[kind], {"target_modules": TARGETS[kind], **options}
    config = quiet(peft.FourierFTConfig, task_type=TASKS[kind], **fields)
    same_start(make, tmp_path, peftcore.apply(make(), "fourierft", **fields), config)
    both_ways(make, tmp_path, peftcore.apply(make(), "fourierft", **fields), config)


@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_the_transforms_are_the_change_of_the_weight(width: int, out_width: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, width * out_width))
    at = Positions(n, width, out_width, seed=777)
    adapter, x = FourierFT(FourierFTConfig(scaling=3.0), at, out_width), torch.randn(2, width, requires_grad=True)
    actual = adapter(lambda x: x.new_zeros(2, out_width), x)
    expected = x @ adapter.merged(torch.zeros(out_width, width), None)[0].T
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    dy, inputs = torch.randn(2, out_width), (x, adapter.fourierft_spectrum)
    for gradient, expected_gradient in zip(
        *(torch.autograd.grad(y, inputs, dy) for y in (actual, expected)), strict=True
    ):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-4)


def test_more_frequencies_than_there_are_is_refused() -> None:
    with pytest.raises(peftcore.PeftcoreError, match=r"n_frequency=1000 is too large: .* has 512"):
        peftcore.apply(tiny.llama(), "fourierft")


def test_layers_that_are_not_linear_are_refused() -> None:
    with pytest.raises(peftcore.PeftcoreError, match=r"'0' matches Conv2d .* which this method cannot adapt"):
        peftcore.apply(tiny.convnet(), "fourierft", target_modules=["0"])
