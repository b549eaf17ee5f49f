"""The kernels of the table: layers of 4096 x 4096 in bf16, 4 bits with double quantization, LoRA of rank 16.

Products of few rows also from MXFP4, from NVFP4, and from affine4 with groups of 128, scales in 16 and zero points in 8
bits. Layers of experts have eight of that size, of which each token chooses two; each expert has as many rows as the
others.
"""

from typing import NamedTuple

from cards import CARDS, Work

N = K = 4096
RANK = 16
TOKENS = 8192  # of training
LINEAR = "quant4/cuda/linear.cu"
EXPERTS, CHOSEN = 8, 2  # of a layer, and of them a token's


class Format(NamedTuple):
    """Format of W in 4 bits."""

    name: str  # in labels
    scales: str  # their kind, and the blocks in a lane's columns, as template arguments
    bytes: float  # of W, with all that belongs to its blocks


NESTED = Format("4 bits", "(peftcore::ScaleKind)1, 1", N * K / 2 + N * K / 64 + N * K / 64 / 256 * 4)
MXFP4 = Format("MXFP4", "(peftcore::ScaleKind)2, 2", N * K / 2 + N * K / 32)
NVFP4 = Format("NVFP4", "(peftcore::ScaleKind)1, 4", N * K / 2 + N * K / 16)
AFFINE4 = Format("affine4", "(peftcore::ScaleKind)3, 2", N * K / 2 + N * K / 128 * 3)


def lane_scales(w: Format) -> str:
    """Return the type of scales that kernels of few rows are compiled for."""
    return f"peftcore::quant4::LaneScales<{w.scales}> "


def linear(w: Format, batch: int, kernel: str, blocks: int, threads: int, in_flight: float, readers: int) -> Work:
    """Return the work of a linear layer. `readers`: how often all of x comes from the second cache."""
    x, y = batch * K * 2.0, batch * N * 2.0
    mma = N * K / 256 * -(-batch // 8)
    return Work(
        label=f"linear from {w.name}, {batch} row{'s' if batch > 1 else ''}",
        source=LINEAR,
        kernel=kernel,
        marker="HMMA.16816",
        markers=mma,
        bytes=w.bytes + x + y,
        blocks=blocks,
        threads=threads,
        again=(readers - 1) * x,
        in_flight=in_flight,
        weight_bytes=N * K / 2,
    )


def panel(batch: int, tiles: int, w: Format = NESTED) -> Work:
    """Blocks of 128 rows of W and a part of its columns. Their sums in fp32 their cluster adds, or the last of them."""
    row_blocks = N // 128
    splits = 128 // row_blocks
    name = f"panel_kernel<peftcore::BFloat16, {tiles}, {lane_scales(w)}>"
    work = linear(w, batch, name, row_blocks * splits, 256, 256 * 128, row_blocks)
    stages = 3 * tiles * 8 * 256 * 2
    return work._replace(sums=splits * batch * N * 4, dynamic_shared=stages)


def rows(batch: int, parts: int, w: Format = NESTED) -> Work:
    name = f"rows_kernel<peftcore::BFloat16, {parts}, {lane_scales(w)}>"
    # A lane waits for 64 bytes. The 64 KB of x stay in the first cache of a multiprocessor.
    return linear(w, batch, name, N // (16 // parts), 128, 128 * 64, CARDS[0].multiprocessors)


def one_launch(batch: int, parts: int) -> Work:
    """The same with LoRA's A and B, each from memory once, and s by the second cache to every block."""
    work = rows(batch, parts)
    return work._replace(
        label=work.label + ", LoRA in the same launch",
        source="lora/cuda/one_launch.cu",
        kernel=f"one_launch_kernel<peftcore::BFloat16, {parts}, {lane_scales(NESTED)}>",
        bytes=work.bytes + RANK * (K + N) * 4,
        again=work.again + (work.blocks + RANK) * batch * RANK * 4,
    )


def few_rows_of_experts(tokens: int) -> Work:
    """Blocks as for a single layer of up to eight rows, for each expert that has any."""
    some = min(EXPERTS, tokens * CHOSEN)
    one = rows(tokens * CHOSEN // some, 1)
    return one._replace(
        label=f"experts from 4 bits, {tokens} token{'s' if tokens > 1 else ''}",
        source="grouped/cuda/skinny.cu",
        kernel=f"skinny_kernel<peftcore::BFloat16, 1, {lane_scales(NESTED)}>",
        **{name: getattr(one, name) * some for name in ("markers", "bytes", "blocks", "again", "weight_bytes")},
    )


# One mma.m16n8k8 for each half of 16 numbers along the sum and each piece of the fp32 operand.
THIN = TOKENS / 16 * K / 16 * RANK / 8 * 4

WORK = (
    rows(1, 2),
    rows(4, 2),
    rows(8, 1),
    one_launch(1, 2),
    one_launch(8, 1),
    panel(16, 2),
    panel(32, 4),
    panel(64, 8),
    *(
        kernel
        for w in (MXFP4, NVFP4, AFFINE4)
        for kernel in (rows(1, 2, w), rows(8, 1, w), panel(16, 2, w), panel(64, 8, w))
    ),
    few_rows_of_experts(1),
    few_rows_of_experts(8),
    Work(
        label="dequantize",
        source="quant4/cuda/dequantize.cu",
        kernel="dequantize_kernel<peftcore::BFloat16, (peftcore::ScaleKind)1>",
        marker="LDG.E.128",
        markers=N * K / 1024,
        bytes=NESTED.bytes + N * K * 2,
        blocks=N * K // 1024 // 8,
        threads=256,
        in_flight=8 * 512,
        weight_bytes=N * K / 2,
    ),
    Work(
        label="quantize",
        source="quant4/cuda/quantize.cu",
        kernel="quantize_kernel<peftcore::BFloat16, true>",
        marker="LDG.E.128",
        markers=N * K / 8 / 32,
        bytes=N * K * 2.5 + N * K / 64 * 4,
        blocks=1056,
        threads=256,
        in_flight=256 * 16,
        weight_bytes=N * K / 2,
    ),
    Work(
        label="LoRA down, 8,192 rows",
        source="lora/cuda/down.cu",
        kernel="down_kernel<peftcore::BFloat16, 4, 2>",
        marker="HMMA.1688",
        markers=THIN,
        bytes=TOKENS * K * 2 + RANK * K * 4 + TOKENS * RANK * 4,
        blocks=TOKENS // 64 * 2,
        threads=128,
        again=(TOKENS / 64 - 1) * RANK * K * 4,
        in_flight=5 * 64 * 32 * 2,
    ),
    Work(
        label="LoRA reduce and product, 8,192 rows",
        source="lora/cuda/reduce.cu",
        kernel="reduce_kernel<peftcore::BFloat16, 2, true>",
        marker="HMMA.1688",
        markers=2 * THIN,
        bytes=TOKENS * K * 2 + TOKENS * RANK * 4 + K * RANK * 4,
        blocks=N // 128 * 9,
        threads=128,
        again=K / 128 * TOKENS * RANK * 4 * 2,
        in_flight=2 * 32 * 128 * 2,
        tickets=True,
    ),
    Work(
        label="LoRA up, 8,192 rows",
        source="lora/cuda/up.cu",
        kernel="up_kernel<peftcore::BFloat16>",
        marker="HMMA.1688",
        markers=TOKENS / 16 * N / 8 * RANK / 8 * 3,
        bytes=TOKENS * N * 2 + TOKENS * RANK * 4 + N * RANK * 4,
        blocks=TOKENS // 64 * N // 64,
        threads=128,
        again=(TOKENS / 64 - 1) * N * RANK * 4,
    ),
)
