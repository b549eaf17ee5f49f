"""bf16 and fp16 over fp32 on this processor: dense, LoRA, 4-bit layers, and a QLoRA step of SmolLM2-135M's shape.

    python benchmarks/processors.py [--level avx2] [--dtypes bfloat16 float16] [--rows 64 256 1024] [--only layers step]

Each row of a table is a layer; each cell is the time of a forward pass / of a forward and a backward pass to x and to
LoRA's factors, over the time of the same computation in fp32 in the same run. "PyTorch" is `F.linear` with a frozen
weight and the gradient of x. The floor of a 16-bit product without instructions for it is fp32's time: 1.

`--clock process` measures processor time of one thread, for a machine that others use too.
"""

import argparse
import gc
import time

import measure
import torch
from torch.nn import functional as F

import peftcore
from peftcore import ops

SHAPES = [(576, 1536), (1536, 576), (2048, 2048)]
RANK = 16


def calls(rows, k, n, dtype, rank):
    """Return {name: (forward, forward and backward)} of layers k -> n."""
    torch.manual_seed(0)
    x, dy = torch.randn(rows, k).to(dtype).requires_grad_(), torch.randn(rows, n).to(dtype)
    weight = (torch.randn(n, k) / k**0.5).to(dtype)
    packed = ops.quantize_4bit(weight)
    a, b = torch.randn(rank, k).requires_grad_(), torch.randn(n, rank).requires_grad_()
    made = {
        "PyTorch, dense": (lambda: F.linear(x, weight), (x,)),
        "dense": (lambda: ops.dense_linear(x, weight), (x,)),
        "dense + LoRA": (lambda: ops.lora_linear(x, weight, None, a, b), (x, a, b)),
        "NF4": (lambda: ops.linear_4bit(x, packed), (x,)),
        "NF4 + LoRA": (lambda: ops.lora_linear(x, packed, None, a, b), (x, a, b)),
    }

    def pair(call, inputs):
        def forward():
            with torch.no_grad():
                call()

        return forward, lambda: torch.autograd.grad(call(), inputs, dy)

    return {name: pair(*given) for name, given in made.items()}


def layers(options, clock):
    names = [str(dtype).removeprefix("torch.") for dtype in options.dtypes]
    print(f"\n{'layer':18}{'rows':>6}{'':18}{'fp32, ms':>16}" + "".join(f"{name:>18}" for name in names))
    for k, n in SHAPES:
        for rows in options.rows:
            made = {dtype: calls(rows, k, n, dtype, options.rank) for dtype in (torch.float32, *options.dtypes)}
            timed = {
                (dtype, name, part): pair[part]
                for dtype, pairs in made.items()
                for name, pair in pairs.items()
                for part in (0, 1)
            }
            times = measure.interleaved(timed, options.seconds, clock=clock)
            for name in made[torch.float32]:
                base = [min(times[torch.float32, name, part]) for part in (0, 1)]
                cells = []
                for dtype in options.dtypes:
                    of = [min(times[dtype, name, part]) / base[part] for part in (0, 1)]
                    cells.append(f"{of[0]:.2f} / {of[1]:.2f}")
                fp32 = f"{base[0]:.2f} / {base[1]:.2f}"
                print(
                    f"{k:>5} -> {n:<9}{rows:>6}  {name:16}{fp32:>16}" + "".join(f"{cell:>18}" for cell in cells),
                    flush=True,
                )


def step(options, clock):
    """Time steps of QLoRA on a model of SmolLM2-135M's shape with random weights, a batch of 8 x 96 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=options.layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    tokens = torch.randint(0, config.vocab_size, (8, 96))
    found = {}
    for dtype in (torch.float32, *options.dtypes):
        torch.manual_seed(0)
        model = peftcore.quantize(LlamaForCausalLM(config).to(dtype))
        peftcore.apply(model, "lora", r=RANK, target_modules="all-linear").train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

        def one(model=model, optimizer=optimizer):
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()

        one()
        found[dtype] = []
        for _ in range(options.steps):
            start = clock()
            loss = one()
            found[dtype].append(clock() - start)
        low, median, width = measure.spread(found[dtype])
        base = measure.spread(found[torch.float32])
        name, ratios = str(dtype).removeprefix("torch."), f"{low / base[0]:.2f}, {median / base[1]:.2f}"
        print(f"QLoRA step, {options.layers} layers, {name:9} shortest {low:6.2f} s, median {median:6.2f} s ", end="")
        print(f"(IQR {width:.2f}), of fp32's {ratios}; loss {loss:.3f}", flush=True)
        del model, optimizer, one
        gc.collect()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_level_argument(parser)
    parser.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float16"], default=["bfloat16", "float16"])
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--rank", type=int, default=RANK)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=3, help="of each shape and number of rows")
    parser.add_argument("--layers", type=int, default=30, help="of the model that is trained")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--only", nargs="+", choices=["layers", "step"], default=["layers", "step"])
    parser.add_argument("--clock", choices=["wall", "process"], default="wall")
    options = parser.parse_args()
    measure.run_at(options.level)
    options.dtypes = [getattr(torch, name) for name in options.dtypes]
    torch.set_num_threads(1 if options.clock == "process" else options.threads)
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    measure.print_surroundings(torch.get_num_threads())
    print(f"PyTorch's capability: {torch.backends.cpu.get_cpu_capability()}; {options.clock} time")
    if "layers" in options.only:
        layers(options, clock)
    if "step" in options.only:
        step(options, clock)


if __name__ == "__main__":
    main()
