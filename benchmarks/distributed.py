"""Cost of two processes: a DDP step next to peft's, and a rank's memory of a 4-bit base under FSDP2.

    python benchmarks/distributed.py [--steps 8]

Two gloo ranks of one thread each on one machine; the model has the shape of SmolLM2-135M and random weights
(engine.py), bf16, batch 1 x 64 on each rank, r=16 on every linear layer. The steps of all rows are interleaved on the
same ranks, the time of a step is the slower rank's. "our part of it" is what peftcore adds to a step of Trainer: the
callback behind it. Floor of what a rank holds: half of the base.
"""

import argparse
import json
import logging
import os
import random
import statistics
import tempfile
import time
import warnings

import engine
import measure
import torch
from torch import distributed, multiprocessing

logging.disable(logging.WARNING)
warnings.simplefilter("ignore")

BATCH, LENGTH, RANKS = 1, 64, 2


def steppers():
    """Return this rank's step of each kind, all with one accelerator."""
    from accelerate import Accelerator

    found = {}
    for kind in ("peft", "peftcore"):
        torch.manual_seed(0)
        model = engine.with_adapter(kind, engine.llama())
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
        accelerator = Accelerator(cpu=True)
        spread, optimizer = accelerator.prepare(model, optimizer)
        found[f"DDP, {kind}"] = stepper(spread, optimizer)
        if kind == "peftcore":
            found["our part of it"] = our_part(model)
    model = sharded()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    found["FSDP2, 4-bit base"] = stepper(model, optimizer)
    return found


def stepper(model, optimizer):
    tokens = torch.randint(0, 49152, (BATCH, LENGTH), generator=torch.Generator().manual_seed(distributed.get_rank()))

    def step():
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_part(model):
    import peftcore

    return lambda: peftcore.after_step(model, 1, 2)


def sharded():
    import peftcore

    model = peftcore.quantize(engine.llama())
    return peftcore.shard(peftcore.apply(model, "lora", r=engine.R, lora_alpha=engine.R))


def work(rank, folder, steps, path):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    rows = steppers()
    times = {name: [] for name in rows}
    order = random.Random(0)
    for number in range(steps + 1):
        for name, step in order.sample(list(rows.items()), len(rows)):
            distributed.barrier()
            start = time.perf_counter()
            step()
            taken = torch.tensor((time.perf_counter() - start) * 1e3, dtype=torch.float64)
            distributed.all_reduce(taken, distributed.ReduceOp.MAX)
            if number:  # the first is for warming up
                times[name].append(taken.item())
    if rank == 0:
        with open(path, "w") as out:
            json.dump(times, out)
    distributed.destroy_process_group()


def held(rank, folder, path):
    """Write the bytes of the base on this rank: its shards and buffers, and the most that is gathered at once."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    model = sharded()
    base = {id(p): p for p in model.parameters() if not p.requires_grad}.values()
    scales = sum(b.nbytes for b in model.buffers())
    shards = sum(p.to_local().nbytes for p in base)
    layers = [sum(p.nbytes for p in layer.parameters() if not p.requires_grad) for layer in model.model.layers]
    if rank == 0:
        found = {
            "whole": sum(p.nbytes for p in base) + scales,
            "rank": shards + scales,
            "layers, whole": sum(layers),
            "a layer": max(layers),
            "embedding": model.model.embed_tokens.weight.nbytes,
        }
        with open(path, "w") as out:
            json.dump(found, out)
    distributed.destroy_process_group()


def on_ranks(function, *arguments):
    """Return what rank 0 wrote when all ranks ran `function`."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(function, (folder, *arguments, f"{folder}/out.json"), nprocs=RANKS)
        with open(f"{folder}/out.json") as found:
            return json.load(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    print(f"PyTorch {torch.__version__}, {RANKS} gloo ranks of one thread, load {os.getloadavg()[0]:.1f}")
    times = on_ranks(work, options.steps)
    peers = statistics.median(times["DDP, peft"])
    print("\na training step, 135M Llama shape, bf16 (ms)\n" + " " * 22 + "min   median      IQR   to peft's DDP")
    for name, row in times.items():
        low, median, iqr = measure.spread(row)
        print(f"{name:18}{low:8.2f}{median:9.2f}{iqr:9.2f}{median / peers:14.4f}")
    measure.note_pairs("a training step", times)
    found = on_ranks(held)
    print("\nthe base in 4 bits (MB)")
    for name, count in found.items():
        print(f"{name:18}{count / 1e6:8.1f}")
    print(
        f"a rank's share at rest {found['rank'] / found['whole']:.3f}; with one layer whole, as between two blocks, "
        f"{(found['rank'] + found['a layer']) / found['whole']:.3f}; with the tied embedding whole besides, as in a "
        f"forward, {(found['rank'] + found['a layer'] + found['embedding']) / found['whole']:.3f}"
    )


if __name__ == "__main__":
    main()
