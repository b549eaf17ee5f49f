"""lora_linear on a GPU: QLoRA and LoRA next to peft with bitsandbytes, and autograd written by hand as Unsloth does.

    python benchmarks/lora_cuda.py [--sizes 2048 4096 8192] [--batches 1 16 512 8192] [--rank 16] [--dropout 0]

Needs a GPU; without one it says so and ends. Without bitsandbytes its rows are left out, and times are compared with
the frozen dense layer. A layer is [size, size] in bf16 with A and B in fp32, as training has them. Forward alone up to
16 rows, as in generation; forward and gradients of x, A and B beyond. Each row of a table goes through layers that
together exceed L2, so that weights come from memory as in a model; calls are queued without waiting, and rows of a
table are timed in turn. Times are of one layer.

The floor is the larger of what must be moved (weight as stored, x, y) over the bandwidth of a device copy, and the
operations of the base products over the rate of a large cuBLAS product, both measured in this run.
"""

import argparse
import importlib.util
import logging
import statistics
import sys

import torch
from measure_cuda import milliseconds, rates
from torch import nn
from torch.nn import functional as F

from peftcore import ops
from peftcore.ops import lora_linear

logging.disable(logging.WARNING)  # bitsandbytes reports optional packages
DTYPE = torch.bfloat16
BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
PEER = "peft + bitsandbytes" if BITSANDBYTES else "frozen, dense"


class ByHand(torch.autograd.Function):
    """LoRA over bitsandbytes' 4 bits with a hand-written gradient: W is unpacked once each way, sums are in place."""

    @staticmethod
    def forward(ctx, x, weight, state, a, b, scale):
        from bitsandbytes.functional import dequantize_4bit

        a, b = a.to(x.dtype), b.to(x.dtype)
        y = x @ dequantize_4bit(weight, state).t()
        y.addmm_(x @ a.t(), b.t(), alpha=scale)
        ctx.save_for_backward(x, a, b)
        ctx.rest = weight, state, scale
        return y

    @staticmethod
    def backward(ctx, grad):
        from bitsandbytes.functional import dequantize_4bit

        x, a, b = ctx.saved_tensors
        weight, state, scale = ctx.rest
        t = grad @ b
        da = (t.t() @ x).mul_(scale)
        db = (grad.t() @ (x @ a.t())).mul_(scale)
        dx = grad @ dequantize_4bit(weight, state)
        dx.addmm_(t, a, alpha=scale)
        return dx, None, None, da.float(), db.float(), None


def peft_layer(weight, rank, scale, dropout):
    """Return peft's LoRA around bitsandbytes' Linear4bit, on the weight's device."""
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model

    size = weight.shape[0]
    base = bnb.nn.Linear4bit(size, size, bias=False, compute_dtype=DTYPE, quant_type="nf4")
    base.load_state_dict({"weight": weight.cpu()})
    model = nn.Sequential(base).to(weight.device)
    config = LoraConfig(r=rank, lora_alpha=scale * rank, lora_dropout=dropout, target_modules=["0"])
    layer = get_peft_model(model, config).base_model.model[0]
    nn.init.normal_(layer.lora_B["default"].weight, std=0.01)
    return layer


def calls_of(size, rank, dropout, device, hand_written):
    """Return {name: layer}, each a function of x with another weight."""
    scale, weight = 2.0, torch.randn(size, size, device=device) / size**0.5
    a = nn.Parameter(torch.randn(rank, size, device=device) / size**0.5)
    b = nn.Parameter(torch.randn(size, rank, device=device) * 0.01)
    four = ops.quantize_4bit(weight, double_quant=True)
    dense = weight.to(DTYPE)
    calls = {
        "frozen, dense": lambda x: F.linear(x, dense),
        "peftcore LoRA, dense": lambda x: lora_linear(x, dense, None, a, b, scale, dropout),
        "peftcore QLoRA": lambda x: lora_linear(x, four, None, a, b, scale, dropout),
    }
    if not BITSANDBYTES:
        return calls
    calls[PEER] = peft_layer(weight, rank, scale, dropout)
    if hand_written:
        from bitsandbytes.functional import quantize_4bit

        theirs, state = quantize_4bit(dense, quant_type="nf4", compress_statistics=True)
        calls["by hand, bitsandbytes"] = lambda x: ByHand.apply(x, theirs, state, a, b, scale)
    return calls


def step(layer, x, grad):
    """Run forward and, if x requires a gradient, backward for all tensors that require one."""
    with torch.autocast(x.device.type, DTYPE), torch.set_grad_enabled(x.requires_grad):
        y = layer(x)
    if x.requires_grad:
        y.backward(grad)


def table(size, batch, options, bandwidth, flops):
    back = batch > 16
    layers = max(1, min(32, 2**28 // (size * size // 2)))
    kinds = [calls_of(size, options.rank, options.dropout, "cuda", back and not options.dropout) for _ in range(layers)]
    x = torch.randn(batch, size, device="cuda", dtype=DTYPE).requires_grad_(back)
    grad = torch.randn_like(x)

    def through_all(name):
        def run():
            for calls in kinds:
                step(calls[name], x, grad)

        return run

    passes = 1 + back
    operations = 2 * batch * size**2 * passes
    print(f"\n{size} x {size}, {batch} rows, forward{' and backward' if back else ''} (us of a layer)")
    print(f"{'':24}{'min':>9}{'median':>9}{'IQR':>8}{'GB/s':>8}{'TFLOP/s':>9}   of {PEER}")
    found = milliseconds({name: through_all(name) for name in kinds[0]})
    peer = min(found[PEER]) / layers
    for name, times in found.items():
        least, (low, median, high) = min(times) / layers, (t / layers for t in statistics.quantiles(times, n=4))
        weight = size**2 * (2 if "dense" in name else 0.516)  # 4 bits, and nested scales by 64
        moved = (weight + 4 * batch * size) * passes
        floor = max(moved / bandwidth / 1e6, operations / flops / 1e9)
        print(
            f"{name:24}{least * 1e3:9.1f}{median * 1e3:9.1f}{(high - low) * 1e3:8.1f}{moved / least / 1e6:8.0f}"
            f"{operations / least / 1e9:9.1f}   {least / peer:7.3f}   floor {floor * 1e3:.1f}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 512, 8192])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/lora_cuda.py needs a GPU, and PyTorch sees none: nothing was measured")
        sys.exit(0)
    bandwidth, flops = rates()
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, rank {options.rank}, ", end="")
    print(f"dropout {options.dropout}; copy {bandwidth:.0f} GB/s, product {flops:.0f} TFLOP/s")
    for size in options.sizes:
        for batch in options.batches:
            table(size, batch, options, bandwidth, flops)


if __name__ == "__main__":
    main()
