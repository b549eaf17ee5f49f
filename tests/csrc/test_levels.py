"""SIMD levels: each that was compiled can be forced and is itself, and caches change no result."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.levels import LEVELS_OF

from peftcore import ops
from peftcore.ops import PackedWeight, lora_linear
from peftcore.ops.build_info import build_info

ROOT = Path(__file__).resolve().parents[2]
ALL_LEVELS = tuple(dict.fromkeys(level for levels in LEVELS_OF.values() for level in levels))
needs_extension = pytest.mark.skipif(ops.extension is None, reason="no extension")


@pytest.fixture
def levels():
    before = ops.extension.cpu_level()
    yield ops.extension.cpu_levels()
    ops.extension.set_cpu_level(before)


@needs_extension
def test_a_build_level_is_a_run_time_level():
    info = build_info()
    known = next(levels for levels in LEVELS_OF.values() if set(info.compiled_cpu_levels) <= set(levels))
    assert info.compiled_cpu_levels == known[: len(info.compiled_cpu_levels)]
    assert info.cpu_levels == known[: len(info.cpu_levels)]
    assert info.out_of_reach == (
        *info.compiled_cpu_levels[len(info.cpu_levels) :],
        *(["CUDA"] if info.cuda_architectures and not torch.cuda.is_available() else []),
    )


@needs_extension
def test_each_level_is_forced_by_its_name(levels):
    for level in levels:
        ops.extension.set_cpu_level(level)
        assert ops.extension.cpu_level() == level
    command = [sys.executable, "-c", "from peftcore import ops; print(ops.extension.cpu_level())"]
    done = subprocess.run(command, env={"PEFTCORE_CPU_LEVEL": levels[-1]}, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == [levels[-1]], done.stderr


@needs_extension
@pytest.mark.parametrize("level", ALL_LEVELS)
def test_dot_products_of_bf16_round_the_codebook_s_entry(levels, level):
    """By which a level is known: without them a weight is code times scale in fp32, rounded once.

    The codebook is scaled first, by the factor of 128 at which its entries lose least.
    """
    if level not in levels:
        pytest.skip(f"no {level} on this machine")
    ops.extension.set_cpu_level(level)
    code = (torch.arange(16) - 8) / 8 + 2.0**-10  # none of which bf16 holds
    packed = torch.arange(256, dtype=torch.uint8).repeat(16)[:, None]  # [128, 64]
    absmax = torch.full((128,), 1.5)
    x = torch.zeros(4, 64, dtype=torch.bfloat16)
    x[range(4), range(4)] = 1
    y = ops.linear_4bit(x, PackedWeight(packed, absmax, code, (128, 64)))
    exact = code[torch.stack([packed[:, 0] >> 4, packed[:, 0] & 15], 1).int().view(128, 64)[:, :4].T]
    if level not in ("avx512bf16", "neonbf16"):
        assert torch.equal(y, (exact * 1.5).bfloat16())
        return
    factors = 1 + torch.arange(128.0)[:, None] / 128
    rounded = (code * factors).bfloat16().float()
    best = ((rounded - code * factors) / factors).square().sum(1).argmin()
    assert best != 0
    exact = (exact * factors[best]).bfloat16().float()
    for rows in (4, 1):  # as tiles, and as rows of W
        y = ops.linear_4bit(x[:rows], PackedWeight(packed, absmax, code, (128, 64)))
        assert torch.equal(y, (exact[:rows] * 1.5 / factors[best]).bfloat16())


@needs_extension
def test_the_size_of_caches_changes_no_bit(levels):
    weight = torch.randn(200, 2112).bfloat16()
    x = torch.randn(130, 2112).bfloat16().requires_grad_()
    a, b = torch.randn(16, 2112).requires_grad_(), torch.randn(200, 16).requires_grad_()
    packed = ops.quantize_4bit(weight)

    def results():
        y = lora_linear(x, weight, None, a, b) + ops.linear_4bit(x, packed)
        return (y, *torch.autograd.grad(y, (x, a, b), torch.ones_like(y)))

    found = ops.extension.caches()
    assert all(size > 0 for size in found) and list(found) == sorted(found)
    for level in levels:
        ops.extension.set_cpu_level(level)
        before = results()
        try:
            for sizes in [(32 << 10, 256 << 10, 2 << 20), (256 << 10, 16 << 20, 1 << 30)]:
                ops.extension.set_caches(*sizes)
                assert all(torch.equal(one, other) for one, other in zip(before, results(), strict=True)), (
                    level,
                    sizes,
                )
        finally:
            ops.extension.set_caches(*found)
