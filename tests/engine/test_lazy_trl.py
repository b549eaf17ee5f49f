"""TRL's functions of logits, and its trainers, with lazy logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from commands import WORDS, save_tokenizer
from lazily import adapted, same
from torch import Tensor, nn

import peftcore


def functions(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Return TRL's log-probabilities and entropies, and gradients, each of two calls."""
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax, selective_log_softmax_and_entropy

    model.zero_grad()
    tokens = tiny.TOKENS[:, 1:]
    logits = model(input_ids=tiny.TOKENS).logits[:, :-1]
    first = selective_log_softmax(logits, tokens, temperature=0.7)
    logits = model(input_ids=tiny.TOKENS).logits
    one, other = logits.chunk(2, dim=0)
    logs, entropy = selective_log_softmax_and_entropy(one[:, :-1], tokens[:1], entropy_requires_grad=False)
    with torch.no_grad():
        more = entropy_from_logits(other, chunk_size=3)
    hits = (logits[..., :-1, :].contiguous().argmax(dim=-1) == tokens).float()
    (first.square().sum() + logs.sum()).backward()
    found = torch.cat([each.detach().flatten().float() for each in (first, logs, entropy, more, hits)])
    return found, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trained", [False, True])
def test_functions(trained: bool, dtype: torch.dtype, computed: list[int]) -> None:
    pytest.importorskip("trl")
    model = adapted(tiny.llama(), **({"modules_to_save": ["lm_head"]} if trained else {})).to(dtype).train()
    wanted = functions(model)
    found = functions(peftcore.lazy_logits(model))
    same(found, wanted, 2e-5 if dtype is torch.float32 else 1e-1)
    assert computed == [0]


def losses_of(kind: str, folder: Path, enabled: bool) -> list[float]:
    """Return the losses of a TRL trainer's first steps."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    save_tokenizer(folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    settings: dict[str, Any] = {"max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True}
    settings |= {"learning_rate": 0.05, "bf16": False, "report_to": "none", "disable_tqdm": True}
    settings |= {"save_strategy": "no", "dataloader_pin_memory": False}
    prompts = [f"the film is {word}" for word in WORDS]
    torch.manual_seed(0)
    model = peftcore.lazy_logits(adapted(tiny.llama()), enabled=enabled)
    model.generation_config.pad_token_id = 0
    more: dict[str, Any] = {}
    if kind == "orpo":
        from trl.experimental.orpo import ORPOConfig as Config, ORPOTrainer as Trainer

        settings |= {"max_length": 16}
    elif kind == "dpo":
        from trl import DPOConfig as Config, DPOTrainer as Trainer

        settings |= {"max_length": 16}
        more["ref_model"] = peftcore.reference_model(model)
    elif kind == "grpo":
        from trl import GRPOConfig as Config, GRPOTrainer as Trainer

        settings |= {"num_generations": 2, "max_completion_length": 3}
        more["reward_funcs"] = lambda completions, **_: [float(len(set(text))) for text in completions]
    else:
        from trl import SFTConfig as Config, SFTTrainer as Trainer

        settings |= {"max_length": 16}
    rows: list[dict[str, str]] = [{"prompt": each, "chosen": " good", "rejected": " bad story"} for each in prompts]
    if kind == "grpo":
        rows = [{"prompt": each} for each in prompts]
    elif kind == "sft":
        rows = [{"text": each} for each in prompts]
    arguments = Config(str(folder / "run"), **settings)
    trainer = Trainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **more
    )
    trainer.train()
    return [
        value
        for entry in trainer.state.log_history
        for name, value in sorted(entry.items())
        if "time" not in name and "per_second" not in name and "runtime" not in name
    ]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo", "orpo"])
def test_trainers(kind: str, tmp_path: Path, computed: list[int]) -> None:
    """All logged values agree; SFT, DPO and GRPO read the head past its call, and ORPO reads mean logits, too."""
    runs = [losses_of(kind, tmp_path, enabled) for enabled in (False, True)]
    assert len(runs[0]) > 4 and runs[1] == pytest.approx(runs[0], rel=1e-4, abs=1e-5, nan_ok=True)
    assert computed == [0] or kind == "orpo"
