"""Errors of the operators against float64, next to those of Hugging Face PEFT and bitsandbytes.

    python benchmarks/exactness.py [--small] [--level amx] [--only lora grouped linear_4bit nf4 optim]

Every input is what both sides are given, as it is, in float64 for the exact result. "roundings" are an error's median,
99th percentile and maximum, each over that of the exact result rounded once to the output's dtype: 1.0 is the best
there is. "norm" is the error's over the result's. The process ends with 1 if ours is above the peer's, by more than a
fiftieth of it, in a norm or a median; gradients of a bf16 x are held to a norm of 2e-5 instead.
"""

import argparse
import logging
import os
import sys
import warnings
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from peftcore import ops
from peftcore.ops import optim, optim_rules
from peftcore.ops.build_info import build_info

logging.disable(logging.WARNING)
warnings.simplefilter("ignore")
SHAPES = [(256, 576, 1536), (256, 4096, 4096)]
# Rows of whole blocks: of others bitsandbytes' CPU kernel makes nonsense. Sums of fewer than 320 products are
# more exact in MKL's product with one vector than in ours, which adds chains of 128.
SMALL = [(96, 320, 320)]
RANKS = (16, 64, 256)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GRADIENT_NORM = 2e-5  # of dA and dB next to a bf16 x
SLACK = 1.02
_COLUMNS = f"{'median':>9}{'99 %':>9}{'most':>9}{'norm':>10}"
HEAD = f"{'roundings':46}{'ours':>9}{'':28}{'peer':>9}\n{'':46}{_COLUMNS}{_COLUMNS}"


class Error(NamedTuple):
    median: float
    most: float  # 99 %
    largest: float
    norm: float

    @classmethod
    def of(cls, found, exact):
        exact = exact.detach().double().flatten()
        error, once = found.detach().double().flatten() - exact, exact.to(found.dtype).double() - exact

        def sizes(t):
            t = t.abs().sort().values
            return [float(t[min(len(t) - 1, int(share * len(t)))]) for share in (0.5, 0.99, 1.0)]

        over = (e / max(o, 1e-300) if e else 0.0 for e, o in zip(sizes(error), sizes(once), strict=True))
        return cls(*over, float(error.norm() / exact.norm()))

    def __str__(self):
        roundings = (f"{each:9.3f}" if each < 1e4 else f"{each:9.1e}" for each in self[:3])
        return f"{''.join(roundings)}{self.norm:10.1e}"


class Row(NamedTuple):
    what: str
    ours: Error
    peer: Error
    bound: float | None = None  # of the norm, instead of the peer

    def __str__(self):
        return f"{self.what:46}{self.ours}{self.peer}{'' if self.holds else '   LESS EXACT'}"

    @property
    def holds(self):
        if self.bound is not None:
            return self.ours.norm <= self.bound
        return self.ours.norm <= SLACK * self.peer.norm and self.ours.median <= SLACK * self.peer.median


def normal(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def lora(shapes=SHAPES, ranks=RANKS, dtypes=DTYPES):
    """Compare y and the gradients of lora_linear with those of peft's layer over the same weight."""
    import peft

    for m, k, n in shapes:
        for dtype in dtypes:
            for r in ranks:
                x, w = normal(m, k, seed=0, dtype=dtype), (normal(n, k, seed=1) / k**0.5).to(dtype)
                a, b = normal(r, k, seed=2) / k**0.5, normal(n, r, seed=3) / r**0.5
                dy = (normal(m, n, seed=4) / n**0.5).to(dtype)
                layer = nn.Linear(k, n, bias=False, dtype=dtype).requires_grad_(False)
                layer.weight.copy_(w)
                config = peft.LoraConfig(r=r, lora_alpha=r // 2, lora_dropout=0.0, target_modules=["0"])
                theirs = peft.inject_adapter_in_model(config, nn.Sequential(layer))[0].train()
                factors = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
                for factor, value in zip(factors, (a, b), strict=True):
                    factor.data = value.clone()  # fp32, as where peft wraps a model

                def gradients(call, factors, x=x, dy=dy):
                    x = x.clone().requires_grad_()
                    y = call(x)
                    return y, *torch.autograd.grad(y, (x, *factors), dy)

                own = a.clone().requires_grad_(), b.clone().requires_grad_()
                ours = gradients(lambda x, w=w, own=own: ops.lora_linear(x, w, None, *own, 0.5), own)
                peers = gradients(theirs, factors)
                x64, w64, a64, b64, g = (t.double() for t in (x, w, a, b, dy))
                s, t = 0.5 * x64 @ a64.T, 0.5 * g @ b64
                exact = x64 @ w64.T + s @ b64.T, g @ w64 + t @ a64, t.T @ x64, g.T @ s
                for name, one, other, right in zip(("y", "dx", "dA", "dB"), ours, peers, exact, strict=True):
                    bound = GRADIENT_NORM if name in ("dA", "dB") and dtype is torch.bfloat16 else None
                    what = f"lora_linear {name}, {k} -> {n}, r={r}, {str(dtype)[6:]}"
                    yield Row(what, Error.of(one, right), Error.of(other, right), bound)


def grouped(shapes=SHAPES, dtypes=DTYPES):
    """grouped_linear and grouped_lora_linear over four experts, next to transformers' grouped_mm over their weights and
    over weights to which 0.5 B A was added, as peft's `target_parameters` does."""
    offsets = torch.tensor([0.1, 0.1, 0.7, 1.0])
    for m, k, n in shapes:
        ends, r = (offsets * m).to(torch.int32), 16
        for dtype in dtypes:
            x, w = normal(m, k, seed=0, dtype=dtype), (normal(4, n, k, seed=1) / k**0.5).to(dtype)
            a, b = normal(4, r, k, seed=2) / k**0.5, normal(4, n, r, seed=3) / r**0.5
            dy = (normal(m, n, seed=4) / n**0.5).to(dtype)

            def gradients(call, thin, x=x, dy=dy, a=a, b=b):
                inputs = [t.clone().requires_grad_() for t in ((x, a, b) if thin else (x,))]
                y = call(*inputs)
                return y, *torch.autograd.grad(y, inputs, dy)

            def ours(x, *thin, w=w, ends=ends):
                if thin:
                    return ops.grouped_lora_linear(x, ends, w, None, *thin, scale=0.5)
                return ops.grouped_linear(x, ends, w)

            def theirs(x, *thin, w=w, ends=ends, dtype=dtype):
                if thin:
                    w = w + (0.5 * thin[1] @ thin[0]).to(dtype)
                return F.grouped_mm(x, w.mT, offs=ends)

            def exact(x, *thin, w=w, ends=ends):
                w = w.double() + (0.5 * thin[1].double() @ thin[0].double() if thin else 0)
                return torch.cat([part @ w[e].T for e, part in enumerate(x.double().tensor_split(ends[:-1].long()))])

            for thin in (False, True):
                wide = (t.double() for t in (x, dy, a, b))
                rows = zip(gradients(ours, thin), gradients(theirs, thin), gradients(exact, thin, *wide), strict=True)
                for name, (one, other, right) in zip(("y", "dx", "dA", "dB"), rows, strict=False):
                    what = f"grouped{'_lora' if thin else ''}_linear {name}, {k} -> {n}, {str(dtype)[6:]}"
                    yield Row(what, Error.of(one, right), Error.of(other, right))


def linear_4bit(shapes=SHAPES, dtypes=DTYPES):
    """Compare y and dx of a weight in NF4 with bitsandbytes', which unpacks it; exact is by the codes' values."""
    import bitsandbytes.functional as bnb

    for rows, k, n in shapes:
        weight = ops.quantize_4bit(normal(n, k, seed=1) / k**0.5)
        exact_weight = weight.values(torch.float64)
        for dtype in dtypes:
            state = bnb.QuantState(weight.absmax, torch.Size((n, k)), ops.NF4, 64, "nf4", dtype)
            theirs = bnb.dequantize_4bit(weight.codes, state, quant_type="nf4")
            for m in (1, 8, rows):
                x, dy = normal(m, k, seed=0, dtype=dtype).requires_grad_(), normal(m, n, seed=2, dtype=dtype)
                y = ops.linear_4bit(x, weight)
                (dx,) = torch.autograd.grad(y, x, dy)
                exact = x.double() @ exact_weight.T, dy.double() @ exact_weight
                for name, one, other, right in zip(
                    ("y", "dx"), (y, dx), (F.linear(x, theirs), dy @ theirs), exact, strict=True
                ):
                    what = f"linear_4bit {name}, {m} rows, {k} -> {n}, {str(dtype)[6:]}"
                    yield Row(what, Error.of(one, right), Error.of(other, right))


def nf4(shapes=SHAPES, dtypes=DTYPES):
    """Compare values after quantizing and unpacking. The errors include those of four bits, which are equal."""
    import bitsandbytes.functional as bnb

    for _, k, n in shapes:
        for dtype in dtypes:
            exact = torch.randn(n, k, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            x = exact.to(dtype)
            ours = ops.dequantize_4bit(ops.quantize_4bit(x))
            theirs = bnb.dequantize_4bit(*bnb.quantize_4bit(x, blocksize=64, quant_type="nf4"), quant_type="nf4")
            what = f"quantize and dequantize, {n} x {k}, {str(dtype)[6:]}"
            yield Row(what, Error.of(ours, exact), Error.of(theirs, exact))


def _adamw(p, g, m, v, step, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, decay=0.01):
    """Return (p, m, v) after one step in float64."""
    m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
    way = m / (1 - betas[0] ** step) / ((v / (1 - betas[1] ** step)).sqrt() + eps)
    return p * (1 - lr * decay) - lr * way, m, v


def optimizers(shapes=SHAPES, steps=20):
    """Compare p after `steps` steps of AdamW from one start with p in float64."""
    import bitsandbytes as bnb

    count = shapes[0][1] * shapes[0][2]
    start = normal(count, seed=0)
    gradients = [normal(count, seed=i + 1) * 1e-2 for i in range(steps)]
    p, m, v = start.double(), torch.zeros(count).double(), torch.zeros(count).double()
    for step, g in enumerate(gradients, 1):
        p, m, v = _adamw(p, g.double(), m, v, step)

    def ours(rule):
        q, state = start.clone(), optim_rules.RULES[rule].new_state(start)
        for step, g in enumerate(gradients, 1):
            row = optim_rules.RULES[rule].scalars.from_options(step, 1e-3, (0.9, 0.999), 1e-8, 0.01)
            optim.optim_step_([q], [g], state, rule, row, [step], [0])
        return q

    def theirs(make):
        q = nn.Parameter(start.clone())
        optimizer = make([q])
        for g in gradients:
            q.grad = g.clone()
            optimizer.step()
        return q.detach()

    options = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    peers = {
        "adamw": lambda params: torch.optim.AdamW(params, **options),
        "adamw_8bit": lambda params: bnb.optim.AdamW8bit(params, min_8bit_size=1, **options),
    }
    for rule, make in peers.items():
        yield Row(f"{rule}, {steps} steps, {count} values", Error.of(ours(rule), p), Error.of(theirs(make), p))


TABLES = {"lora": lora, "grouped": grouped, "linear_4bit": linear_4bit, "nf4": nf4, "optim": optimizers}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="one small shape")
    parser.add_argument("--level", help="SIMD level of peftcore's kernels")
    parser.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES))
    options = parser.parse_args()
    if options.level:
        ops.extension.set_cpu_level(options.level)
    info = build_info()
    print(f"PyTorch {torch.__version__}, load {os.getloadavg()[0]:.1f}, extension: ", end="")
    print(info.missing_because or f"{options.level or info.cpu_level} ({info.compiler})")
    print(HEAD)
    held = True
    for name in options.only:
        for row in TABLES[name](SMALL if options.small else SHAPES):
            print(row, flush=True)
            held = held and row.holds
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
