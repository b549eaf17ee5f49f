"""What fits: the search against estimates of each way, and what is said where nothing does."""

import pytest
import torch
from transformers import LlamaConfig

import peftcore
from peftcore.errors import PeftcoreError

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIG = LlamaConfig(**SIZES, num_hidden_layers=4, vocab_size=320)
METHODS = ("lora",)


def test_ways_lie_on_the_front_and_fit() -> None:
    found = peftcore.fit(
        CONFIG, memory="550MB", device="t4", length=32, examples=100, methods=METHODS, ranks=(4,), most=2
    )
    assert found.memory < 1e8 and found.ways
    for way in found.ways:
        again = peftcore.estimate(
            CONFIG,
            way.method,
            batch_size=way.batch_size,
            length=32,
            gradient_checkpointing=way.gradient_checkpointing,
            optimizer=way.optimizer,
            dtype=torch.bfloat16,
            **way.fields,
        )
        assert again.parts == way.estimate.parts and way.estimate.needed == way.memory <= found.memory
    hours, needs = [way.hours for way in found.ways], [way.memory for way in found.ways]
    assert hours == sorted(hours) and needs == sorted(needs, reverse=True)
    assert found.ways[0].next_need > found.ways[0].memory
    assert f"--batch-size {found.ways[0].batch_size}" in str(found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"memory": "much"}, "memory is bytes, or text such as '24GB', found 'much'"),
        ({"memory": 0}, "no model fits into that"),
        ({"memory": "1MB"}, "nothing fits into 1.0 MB: the least is [0-9.]+ MB, lora"),
        ({"memory": "400MB", "device": "t4"}, "is no more than its context takes: give at least 1GB"),
        ({"device": "h1000"}, "there is no card 'h1000' in the table"),
    ],
)
def test_what_cannot_be_answered(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(PeftcoreError, match=message):
        peftcore.fit(CONFIG, length=16, methods=["lora"], **{"device": "cpu", **arguments})  # type: ignore[arg-type]


def test_a_model_without_layers() -> None:
    with pytest.raises(PeftcoreError, match="a config of transformers with num_hidden_layers is needed"):
        peftcore.fit(object(), memory="1GB", device="t4")
