"""Time kernels and layers next to other libraries and to their lower bounds.

The libraries are cuBLAS, PyTorch's int4 and grouped products, torch.compile, peft's formula, bitsandbytes and Liger.

    python -m card_stages.timings --results FILE --until SECONDS

The lower bound of a call is the time to move its bytes at the rate of a copy, or to compute its products at the rate of
a large cuBLAS product, whichever is longer. Both rates are measured in the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from card_stages.clock import Call, by_events, in_graph, l2_cache_bytes, rates
from card_stages.jobs import Job, measure_jobs, measurement, stage_parser
from card_stages.results import MEASURED, Results
from peftcore import ops, optim

DEVICE, N, RANK, DTYPE = "cuda", 4096, 16, torch.bfloat16
MANY = 8192  # rows of training
PEFT = "peft's formula, dense"
CLASSES, EXPERTS = 128256, (128, 2048, 1536)  # experts, in, out
PACKED = 0.5 + 1 / 64 + 4 / 64 / 256  # bytes of a value in 4 bits, with nested scales


class Row(NamedTuple):
    """A measurement: `make` returns a call on tensors of its own."""

    group: str
    label: str
    make: Callable[[], Call]
    moved: float  # bytes
    operations: float = 0
    resident: float = 0  # bytes of the tensors of one call that another call does not share
    graph: bool = True
    slow: bool = False  # whether torch.compile compiles it


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE)


def factors(out: int, width: int, rank: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rank, width, device=DEVICE) / 64, torch.randn(out, rank, device=DEVICE) * 0.01


def theirs(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return peft's formula, under bf16."""
    return F.linear(x, weight) + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) * 2.0


def int4_product(out: int, width: int) -> Callable[[Tensor], Tensor]:
    """Return PyTorch's product with a weight of int4 in groups of 64, in its layout for CUDA."""
    codes = torch.randint(256, (out, width // 2), device=DEVICE, dtype=torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    scales_and_zeros = normal(width // 64, out, 2)
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, 64, scales_and_zeros)


def layer(rows: int, shape: tuple[int, int] | None = None, rank: int = RANK) -> Iterator[Row]:
    """Yield forward passes of a layer; from 512 rows on, forward and backward.

    `shape`: of W, [out, in]; None: [N, N].
    """
    out, width = shape or (N, N)
    back = rows >= 512
    group = f"{out} x {width}, {rows} rows, bf16, rank {rank}, forward{' and backward' if back else ''}"
    x, grad = normal(rows, width).requires_grad_(back), normal(rows, out)
    passes, wide = 1 + back, 2 * rows * (out + width)

    def step(call: Callable[[Tensor], Tensor], *leaves: Tensor) -> Call:
        if not back:
            return lambda: call(x)
        return lambda: torch.autograd.grad(call(x), [x, *leaves], grad)

    def dense() -> Call:
        weight = normal(out, width)
        return step(lambda x: F.linear(x, weight))

    def packed() -> Call:
        weight = ops.quantize_4bit(normal(out, width), double_quant=True)
        return step(lambda x: ops.linear_4bit(x, weight))

    def with_lora(kind: str) -> Callable[[], Call]:
        def make() -> Call:
            weight = normal(out, width)
            a, b = (t.requires_grad_(back) for t in factors(out, width, rank))
            if kind == "dense":
                return step(lambda x: ops.lora_linear(x, weight, None, a, b, 2.0), a, b)
            if kind == "peft":
                return step(lambda x: theirs(x, weight, a, b), a, b)
            four = ops.quantize_4bit(weight, double_quant=True)
            if kind == "peft4":
                return step(lambda x: theirs(x, ops.dequantize_4bit(four, DTYPE), a, b), a, b)
            return step(lambda x: ops.lora_linear(x, four, None, a, b, 2.0), a, b)

        return make

    products, kinds = 2 * rows * out * width * passes, {"dense": 2.0, "4 bits": PACKED}
    for label, make, kind in (
        ("F.linear (cuBLAS)", dense, "dense"),
        ("peftcore 4 bits, frozen", packed, "4 bits"),
        ("peftcore QLoRA", with_lora("4 bits"), "4 bits"),
        ("peftcore LoRA, dense", with_lora("dense"), "dense"),
        (PEFT, with_lora("peft"), "dense"),
        ("peft's formula over unpacked 4 bits", with_lora("peft4"), "4 bits"),
    ):
        weight = kinds[kind] * out * width
        yield Row(group, label, make, (weight + wide) * passes, products, weight)
    if back:
        return

    def bitsandbytes() -> Call:
        import bitsandbytes as bnb

        data, state = bnb.functional.quantize_4bit(normal(out, width), quant_type="nf4", compress_statistics=True)
        return step(lambda x: bnb.matmul_4bit(x, data.t(), state))

    def int4() -> Call:
        return step(int4_product(out, width))

    weight = PACKED * out * width
    yield Row(group, "bitsandbytes, frozen", bitsandbytes, weight + wide, products, weight)
    yield Row(group, "torch._weight_int4pack_mm, frozen", int4, weight + wide, products, weight)


def high_ranks() -> Iterator[Row]:
    """Yield training rows of ranks at which cuBLAS, which rounds A and B to bf16, may be faster than our kernels."""
    for rank in (64, 128):
        yield from (row for row in layer(MANY, rank=rank) if row.label in ("peftcore LoRA, dense", PEFT))


def four_bits() -> Iterator[Row]:
    group, count = f"{N} x {N} to 4 bits and back, bf16", N * N

    def dequantize() -> Call:
        weight, out = ops.quantize_4bit(normal(N, N), double_quant=True), normal(N, N)
        return lambda: ops.dequantize_4bit(weight, out=out)

    def quantize() -> Call:
        x = normal(N, N)
        return lambda: ops.quantize_4bit(x, double_quant=True)

    def copy() -> Call:
        x, out = normal(N, N), normal(N, N)
        return lambda: out.copy_(x)

    yield Row(group, "peftcore dequantize", dequantize, (PACKED + 2) * count, 0, 2.5 * count)
    yield Row(group, "peftcore quantize", quantize, (PACKED + 2) * count, 0, 2.5 * count)
    yield Row(group, "copy of bf16", copy, 4 * count, 0, 4 * count)


def experts(tokens: int) -> Iterator[Row]:
    """Yield products of a layer of 128 experts, 8 of them for each token."""
    (count, width, out), rows = EXPERTS, tokens * 8
    group = f"{count} experts [{out}, {width}], {tokens} tokens, top 8, bf16, forward"
    generator = torch.Generator(DEVICE).manual_seed(0)
    index = torch.rand(tokens, count, device=DEVICE, generator=generator).topk(8).indices.flatten()
    offsets = torch.bincount(index, minlength=count).cumsum(0).to(torch.int32)
    used, x = len(index.unique()), normal(rows, width)
    wide, products = 2 * rows * (width + out), 2 * rows * width * out

    def make(kind: str) -> Callable[[], Call]:
        def call() -> Call:
            weight = normal(count, out, width)
            if kind == "torch":
                return lambda: torch._grouped_mm(x, weight.mT, offs=offsets)
            if kind != "dense":
                weight = ops.quantize_4bit(weight, double_quant=True)
            if kind != "lora":
                return lambda: ops.grouped_linear(x, offsets, weight)
            a, b = torch.randn(count, RANK, width, device=DEVICE) / 45, torch.randn(count, out, RANK, device=DEVICE)
            return lambda: ops.grouped_lora_linear(x, offsets, weight, None, a, b)

        return call

    for label, kind, size in (
        ("peftcore, dense", "dense", 2.0),
        ("peftcore, 4 bits", "4 bits", PACKED),
        ("peftcore LoRA, 4 bits", "lora", PACKED),
        ("torch._grouped_mm", "torch", 2.0),
    ):
        weight = used * out * width * size
        yield Row(group, label, make(kind), weight + wide, products, weight)


def entropy() -> Iterator[Row]:
    rows, classes = N // 2, CLASSES
    group = f"cross-entropy and its gradient, {rows} x {classes}, bf16"
    labels = torch.randint(classes, (rows,), device=DEVICE)

    def ours() -> Call:
        logits = normal(rows, classes)
        settings = [0.0, 1.0, 0.0, 0.0]
        return lambda: torch.ops.peftcore.cross_entropy_rows_(logits, labels, None, None, settings, -100, True)

    def formula(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels)

    def peer(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Call]:
        def make() -> Call:
            logits = normal(rows, classes).requires_grad_()
            return lambda: torch.autograd.grad(loss(logits, labels), logits)

        return make

    size = 2 * rows * classes
    yield Row(group, "peftcore", ours, 2 * size, 0, size)
    yield Row(group, "F.cross_entropy", peer(formula), 2 * size, 0, size)
    compiled = peer(torch.compile(formula))
    yield Row(group, "torch.compile of F.cross_entropy", compiled, 2 * size, 0, size, slow=True)
    yield Row(group, "Liger", peer(partial(liger, "liger_cross_entropy")), 2 * size, 0, size)


def liger(name: str, *arguments: Tensor | float) -> Tensor:
    """Call a function of Liger."""
    from liger_kernel.transformers import functional

    return getattr(functional, name)(*arguments)


def norms() -> Iterator[Row]:
    """Yield RMSNorms with a frozen weight and gated activations: forward, and forward and backward."""
    size = 2 * MANY * N  # bytes of a matrix

    def silu(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    for back in (False, True):
        passes = "forward and backward" if back else "forward"
        grad = normal(MANY, N)

        def step(call: Callable[..., Tensor], count: int, back: bool = back, grad: Tensor = grad) -> Callable[[], Call]:
            def make() -> Call:
                inputs = [normal(MANY, N).requires_grad_(back) for _ in range(count)]
                if not back:
                    return lambda: call(*inputs)
                return lambda: torch.autograd.grad(call(*inputs), inputs, grad)

            return make

        weight = normal(N)

        def llama(x: Tensor, weight: Tensor = weight) -> Tensor:
            wide = x.float()
            return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)

        group, moved = f"RMSNorm of {MANY} x {N}, bf16, {passes}", (5 if back else 2) * size
        yield Row(group, "peftcore", step(lambda x, w=weight: ops.rms_norm(x, w, 1e-5), 1), moved, 0, moved)
        yield Row(group, "F.rms_norm", step(lambda x, w=weight: F.rms_norm(x, (N,), w, 1e-5), 1), moved, 0, moved)
        yield Row(group, "Llama's formula", step(llama, 1), moved, 0, moved)
        compiled = step(torch.compile(llama), 1)
        yield Row(group, "torch.compile of Llama's formula", compiled, moved, 0, moved, slow=True)
        ligers = step(lambda x, w=weight: liger("liger_rms_norm", x, w, 1e-5), 1)
        yield Row(group, "Liger", ligers, moved, 0, moved)
        group, moved = f"silu(g) u of {MANY} x {N}, bf16, {passes}", (8 if back else 3) * size
        yield Row(group, "peftcore", step(ops.gated, 2), moved, 0, moved)
        yield Row(group, "F.silu(g) * u", step(silu, 2), moved, 0, moved)
        compiled = step(torch.compile(silu), 2)
        yield Row(group, "torch.compile of F.silu(g) * u", compiled, moved, 0, moved, slow=True)
        yield Row(group, "Liger", step(partial(liger, "liger_swiglu"), 2), moved, 0, moved)


def steps() -> Iterator[Row]:
    shapes, count = [(N, N)] * 6, 6 * N * N
    group = f"a step of AdamW, {count / 1e6:.0f} M parameters in fp32"

    def make(kind: str) -> Callable[[], Call]:
        def call() -> Call:
            params = [torch.nn.Parameter(torch.zeros(shape, device=DEVICE)) for shape in shapes]
            for p in params:
                p.grad = torch.full_like(p, 1e-3)
            if kind == "torch":
                return torch.optim.AdamW(params, fused=True).step
            return getattr(optim, kind)(params).step

        return call

    for label, kind, each in (("peftcore AdamW", "AdamW", 28), ("peftcore AdamW8bit", "AdamW8bit", 16)):
        yield Row(group, label, make(kind), each * count, 0, 1e12, graph=False)
    yield Row(group, "torch.optim.AdamW(fused=True)", make("torch"), 28 * count, 0, 1e12, graph=False)


def all_rows() -> Iterator[Row]:
    """Yield all rows, those that decide most first: the panel, then one launch, training, experts."""
    yield from four_bits()
    for rows in (64, 1, MANY):
        yield from layer(rows)
    yield from experts(16)
    yield from high_ranks()
    yield from norms()
    yield from entropy()
    yield from steps()
    yield from experts(MANY // 2)
    for rows in (16, 512, 4, 8, 32):
        yield from layer(rows)


def measure(row: Row, bandwidth: float, product: float) -> dict[str, float]:
    copies = max(1, min(64, int(3 * l2_cache_bytes() // max(1, row.resident))))
    calls = [row.make() for _ in range(copies)]
    bound = max(row.moved / bandwidth / 1e3, row.operations / product / 1e6)
    eager = by_events(calls)
    if not row.graph:
        values = {"µs": eager.median, "least": eager.least}
    else:
        cold, warm = in_graph(calls), in_graph(calls[:1])
        values = {"µs": cold.median, "least": cold.least, "warm": warm.median, "by events": eager.median}
    return values | {"lower bound, µs": bound, "over lower bound": values["least"] / bound}


def rates_of_card(stage: str, results: Results) -> tuple[float, float]:
    """Measure the rates that lower bounds are computed from, and add them as a row."""
    bandwidth, product = rates()
    values = {"copy, GB/s": bandwidth, "bf16 product, TFLOP/s": product}
    results.add(stage, "rates of the card", MEASURED, values=values, group="rates of the card")
    return bandwidth, product


def job_of(row: Row, label: str, bandwidth: float, product: float) -> Job:
    call = measurement(partial(measure, row, bandwidth, product), group=row.group, label=label)
    return Job(f"{row.group}: {label}", call, row.slow)


def main() -> None:
    options = stage_parser(__doc__).parse_args()
    results = Results(options.results)
    bandwidth, product = rates_of_card("timings", results)
    jobs = (job_of(row, row.label, bandwidth, product) for row in all_rows())
    measure_jobs("timings", jobs, results, options.until)


if __name__ == "__main__":
    main()
