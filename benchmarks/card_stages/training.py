"""A training step of the 1.1 B shape with LoRA and QLoRA, with peft's next to them.

python -m card_stages.training --results FILE --until SECONDS
"""

from __future__ import annotations

import statistics
import time
from functools import partial

import torch

from card_stages import models
from card_stages.jobs import Job, measure_jobs, measurement, stage_parser
from card_stages.results import Results

BATCH, LENGTH = 4, 512
GROUP = f"a training step of a Llama of 1.1 B parameters, {BATCH} x {LENGTH} tokens, bf16, LoRA of rank 16"


def step_times(kind: str, steps: int = 8) -> dict[str, float]:
    torch.cuda.reset_peak_memory_stats()
    model = models.with_lora(kind).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    tokens = torch.randint(models.SIZES["vocab_size"], (BATCH, LENGTH), generator=torch.Generator().manual_seed(0)).to(
        models.DEVICE
    )
    times, losses = [], []
    for _ in range(steps):
        torch.cuda.synchronize()
        began = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        times.append((time.perf_counter() - began) * 1000)
    if not losses[-1] < losses[0]:
        raise AssertionError(f"the loss did not fall: {losses}")
    median = statistics.median(times[2:])
    return {
        "ms": median,
        "least": min(times[2:]),
        "tokens/s": BATCH * LENGTH / median * 1000,
        "peak memory, GB": torch.cuda.max_memory_allocated() / 1e9,
        "first loss": losses[0],
        "last loss": losses[-1],
    }


def main() -> None:
    options = stage_parser(__doc__).parse_args()
    kinds = ("peftcore LoRA", "peftcore QLoRA", "peft LoRA", "peftcore QLoRA, fused")
    jobs = [Job(kind, measurement(partial(step_times, kind), group=GROUP), slow=True) for kind in kinds]
    measure_jobs("training", jobs, Results(options.results), options.until)


if __name__ == "__main__":
    main()
