"""Hugging Face PEFT loads adapters saved here, and vice versa; the formula for all sizes; invalid configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, strategies as st
from peftcore_c3a import C3A, C3AConfig, Correlation
from support import tiny
from support.against_peft import both_ways, quiet, same_start

import peftcore

TARGETS = {"llama": ["k_proj", "v_proj", "down_proj"], "bert": ["key", "output.dense"], "t5": ["k", "v", "wo"]}
TASKS = {"llama": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}


@pytest.mark.parametrize(
    ("kind", "options"),
    [("llama", {"block_size": 8, "block_size_pattern": {"v_proj": 16}}),
     ("bert", {"block_size": 16, "bias": "c3a_only", "init_weights": True}),
     ("t5", {"block_size": 4, "init_weights": "gaussian"}),
     ("t5", {"block_size": 2, "init_weights": "kaiming_uniform"})],
)  # fmt: skip
def test_files(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    make, fields = tiny.MODELS[kind], {"target_modules": TARGETS[kind], **options}
    config = quiet(peft.C3AConfig, task_type=TASKS[kind], **fields)
    same_start(make, tmp_path, peftcore.apply(make(), "c3a", **fields), config)
    both_ways(make, tmp_path, peftcore.apply(make(), "c3a", **fields), config)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 7))
def test_the_convolutions_are_the_change_of_the_weight(n: int, m: int, block_size: int) -> None:
    width, out_width = n * block_size, m * block_size
    adapter, x = C3A(C3AConfig(init_weights="gaussian"), block_size, width, out_width), torch.randn(2, width)
    change, _ = adapter.merged(torch.zeros(out_width, width), None)
    torch.testing.assert_close(adapter(lambda x: x.new_zeros(2, out_width), x), x @ change.T, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    x, kernel = (torch.randn(*sizes, dtype=torch.float64, requires_grad=True) for sizes in ((2, 3, 8), (3, 2, 4)))
    assert torch.autograd.gradcheck(Correlation.apply, (x, kernel))


def test_a_block_that_does_not_divide_is_refused() -> None:
    with pytest.raises(peftcore.PeftcoreError, match=r"block_size=256 must divide both sizes, .*: choose (16|32)"):
        peftcore.apply(tiny.llama(), "c3a", target_modules=["q_proj", "down_proj"])


def test_layers_that_are_not_linear_are_refused() -> None:
    with pytest.raises(peftcore.PeftcoreError, match=r"'0' matches Conv2d .* which this method cannot adapt"):
        peftcore.apply(tiny.convnet(), "c3a", target_modules=["0"])
