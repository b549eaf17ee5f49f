"""Predicted steps whose loss is computed without logits, compared with real ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.step_memory import allocated, predicted, real
from transformers import BertConfig, LlamaConfig

import peftcore
from peftcore.estimating import Step

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIG = LlamaConfig(**SIZES, num_hidden_layers=2, vocab_size=4096, pad_token_id=0, eos_token_id=2)
STEP = {"batch_size": 4, "length": 64, "optimizer": "adamw_torch"}


@pytest.mark.parametrize(
    ("method", "fields", "dtype"),
    [
        ("lora", {}, torch.float32),
        ("lora", {}, torch.bfloat16),
        ("lora", {"quantize": "nf4"}, torch.float32),
        ("lora", {"modules_to_save": ["lm_head"]}, torch.float32),
        (None, {}, torch.float32),
    ],
    ids=["frozen", "bf16", "4 bits", "trained", "full"],
)
def test_is_what_a_step_takes(method: str | None, fields: dict[str, Any], dtype: torch.dtype) -> None:
    found, with_logits = (
        peftcore.estimate(CONFIG, method, step=Step(**STEP, without_logits=without), dtype=dtype, **fields)
        for without in (True, False)
    )
    model = peftcore.loss_without_logits(real(CONFIG, method, Step(**STEP), dtype, **fields))
    most = allocated(model, Step(**STEP))
    assert predicted(found) == pytest.approx(most, rel=0.06)
    assert predicted(found) < 0.8 * predicted(with_logits)
    assert "without logits" in found.title


def test_models_that_need_their_logits() -> None:
    config = BertConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}, num_hidden_layers=1)
    config.architectures = ["BertForSequenceClassification"]
    found, plain = (peftcore.estimate(config, "lora", **STEP, without_logits=without) for without in (True, False))
    assert predicted(found) == predicted(plain)
    found, plain = (
        peftcore.estimate(CONFIG, "lora", target_modules=["lm_head"], **STEP, without_logits=without)
        for without in (True, False)
    )
    assert predicted(found) == predicted(plain)
