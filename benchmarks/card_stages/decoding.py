"""Tokens a second of the 1.1 B shape in generation, launched by the host and by a CUDA graph.

python -m card_stages.decoding --results FILE --until SECONDS
"""

from __future__ import annotations

from functools import partial

import torch

from card_stages import models
from card_stages.clock import by_events, captured
from card_stages.jobs import Job, measure_jobs, measurement, stage_parser
from card_stages.results import Results
from card_stages.training import GROUP

GROUP = GROUP.replace("a training step", "a token of generation").replace("4 x 512 tokens, ", "")
ROOM = 256  # tokens of the cache


def token_times(kind: str, batch: int) -> dict[str, float]:
    """Return milliseconds of a token, with every sequence at the same position of a static cache."""
    from transformers import StaticCache

    model = models.with_lora(kind).eval()
    cache = StaticCache(config=model.config, max_cache_len=ROOM)
    tokens = torch.ones(batch, 1, dtype=torch.long, device=models.DEVICE)
    position = torch.full((1,), 100, device=models.DEVICE)

    @torch.no_grad()
    def call() -> torch.Tensor:
        inputs = {"position_ids": position[None].expand(batch, 1), "cache_position": position}
        return model(input_ids=tokens, past_key_values=cache, use_cache=True, **inputs).logits

    expected = call().clone()
    ms = by_events([call]).median / 1000
    graph, logits = captured(call)
    graph_ms = by_events([graph.replay]).median / 1000
    return {
        "ms": ms,
        "ms in a graph": graph_ms,
        "tokens/s in a graph": batch * 1000 / graph_ms,
        "largest difference of logits": float((logits - expected).abs().max()),
    }


def main() -> None:
    options = stage_parser(__doc__).parse_args()
    jobs = []
    for kind in ("peftcore QLoRA", "frozen", "peft LoRA", "peftcore LoRA", "peftcore QLoRA, fused"):
        for batch in (1, 8):
            measure = partial(token_times, kind, batch)
            jobs.append(Job(f"{kind}, batch {batch}", measurement(measure, group=GROUP), slow=True))
    measure_jobs("decoding", jobs, Results(options.results), options.until)


if __name__ == "__main__":
    main()
