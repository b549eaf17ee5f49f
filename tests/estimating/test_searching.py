"""Pareto front of memory and time, and the lines that it is read from."""

import pytest
import torch
from transformers import LlamaConfig

import peftcore
from peftcore.estimating.devices import CARDS
from peftcore.estimating.searching import PLAIN, Choice, Line, Search, Sized, front, layers_of, shallow
from peftcore.estimating.step import Step

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIG = LlamaConfig(**SIZES, num_hidden_layers=6, vocab_size=320)


def sized(name: str, memory: float, seconds: float, trained: float = 1.0, packed: bool = False) -> Sized:
    return Sized(Choice(name, (), False, PLAIN), 1, memory, seconds, trained, packed)


def names(found: list[Sized]) -> list[str]:
    return [each.choice.method for each in found]


def test_the_front_is_of_what_nothing_else_beats() -> None:
    found = front([sized("slow", 10, 3), sized("small", 5, 2), sized("fast", 10, 1), sized("worse", 6, 2.5)])
    assert names(found) == ["fast", "small"]


def test_of_those_that_are_alike_the_one_that_trains_most() -> None:
    assert names(front([sized("few", 10, 1), sized("many", 10.3, 1.02, trained=2)])) == ["many"]
    assert names(front([sized("few", 10, 1), sized("hardly more", 10.3, 1.02, trained=1.03)])) == ["few"]
    assert names(front([sized("few", 10, 1), sized("many, and slower", 10, 1.1, trained=2)])) == ["few"]


def test_a_base_in_4_bits_beats_no_dense_one() -> None:
    found = front([sized("packed", 5, 1, packed=True), sized("dense", 10, 1), sized("packed, more", 9, 2, packed=True)])
    assert names(found) == ["packed", "dense"]
    assert names(front([sized("dense", 5, 1), sized("packed", 5, 1.5, packed=True)])) == ["dense"]


def test_a_line_is_corrected_by_what_was_found() -> None:
    search = Search(CONFIG, CARDS["t4"], Step(length=16), torch.bfloat16)
    line = Line((1e6, 2.0), (1e5, 0.5), 1.0, False)
    assert line.at(3) == pytest.approx((1.2e6, 3.0))
    found = search.whole(Choice("lora", (("r", 4),), False, PLAIN), 4)
    line.correct(4, found)
    assert line.at(4) == pytest.approx((found.needed, found.seconds))


def test_lines_of_equal_layers_are_right() -> None:
    search = Search(CONFIG, CARDS["t4"], Step(length=64), torch.bfloat16)
    choice = Choice("lora", (("r", 4), ("target_modules", ["q_proj"])), False, PLAIN)
    line, whole = search.line(choice), search.whole(choice, 8)
    trained = peftcore.estimate(CONFIG, "lora", r=4, target_modules=["q_proj"], batch_size=1, length=8).summary
    assert line.trained == trained.trainable_parameters
    assert line.at(8)[1] == pytest.approx(whole.seconds, rel=0.02)
    # segments are of 2 and 20 MiB
    assert line.at(8)[0] == pytest.approx(whole.needed, abs=22 << 20)
    assert search.whole(choice, 8) is whole


def test_shallow_models_have_lists_for_their_layers() -> None:
    config = LlamaConfig(**SIZES, num_hidden_layers=6, vocab_size=320)
    config.layer_types = ["full_attention"] * 6
    small = shallow(config, 2)
    assert (layers_of(small), small.layer_types, layers_of(config)) == (2, ["full_attention"] * 2, 6)
