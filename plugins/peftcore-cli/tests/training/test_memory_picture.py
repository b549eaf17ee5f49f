"""The picture of a step's memory: what is stacked is the estimate, at its place in the step."""

import struct

import pytest
from peftcore_cli.training import memory_picture
from peftcore_cli.training.forecast import Forecast
from peftcore_cli.training.memory_trace import Trace
from transformers import LlamaConfig

import peftcore

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIG = LlamaConfig(**SIZES, num_hidden_layers=2, vocab_size=320)


def test_the_stack_is_the_estimate() -> None:
    found = peftcore.estimate(CONFIG, "lora", batch_size=2, length=16, gradient_accumulation=2)
    places, sizes = memory_picture.stack(found)
    assert len(found.phases) == 5 and min(places) == 0.0 and max(places) <= 5.0
    totals = [sum(values) for values in zip(*sizes.values(), strict=True)]
    assert max(totals) == found.peak
    assert 3.0 <= places[totals.index(max(totals))] <= 4.0  # as `where` says
    assert found.where.startswith("backward of batch 2")
    assert sizes["weights"] == [found.parts["base"]] * len(places)


@pytest.mark.pictures
def test_a_png_of_that_width() -> None:
    found = peftcore.estimate(CONFIG, "lora", batch_size=2, length=16)
    said = Forecast(found, libraries=500_000_000, room=1e10)
    was = Trace(samples=[(0.5, 501_000_000), (1.5, 502_000_000), (2.5, 500_000_000)], ends=[0.0, 1.0, 2.0, 3.0])
    for width in (9.0, 4.6):
        for trace in (was, None):
            png = memory_picture.picture(said, trace, width)
            assert png[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">I", png[16:20]) == (round(150 * width),)
