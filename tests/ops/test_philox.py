"""Known answers of Philox4x32 (Random123, kat_vectors)."""

import pytest
import torch

from peftcore.ops._philox import LOW, philox


@pytest.mark.parametrize(
    ("rounds", "word", "key", "wanted"),
    [
        (7, 0, 0, "5f6fb709 0d893f64 4f121f81 4f730a48"),
        (7, LOW, 2**64 - 1, "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (10, 0, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (10, LOW, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ],
)
def test_words_are_those_of_the_published_generator(rounds, word, key, wanted):
    numbers = philox([torch.tensor([word])] * 4, key, rounds)[0].tolist()
    words = [low | high << 16 for low, high in zip(numbers[::2], numbers[1::2], strict=True)]
    assert " ".join(f"{word:08x}" for word in words) == wanted
