"""The order of examples: every one once, like lengths together, by seed and epoch alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, strategies as st
from peftcore_cli.training.sampler import LengthGroupedSampler
from support.commands import Run


@given(st.lists(st.integers(1, 99), min_size=1, max_size=300), st.integers(1, 9), st.integers(0, 3))
def test_every_example_once(lengths: list[int], batch_size: int, seed: int) -> None:
    order = list(LengthGroupedSampler(lengths, batch_size, seed))
    assert sorted(order) == list(range(len(lengths)))
    assert order == list(LengthGroupedSampler(lengths, batch_size, seed))


@given(st.lists(st.integers(1, 99), min_size=1, max_size=300), st.integers(1, 4), st.integers(0, 3))
def test_the_order_is_that_of_lists_of_batches(lengths: list[int], batch_size: int, seed: int) -> None:
    """The sampler keeps indices in arrays; this is the same order in plain lists."""
    generator, order = random.Random(f"{seed} 0"), list(range(len(lengths)))
    generator.shuffle(order)
    full, batches = len(order) - len(order) % batch_size, []
    for start in range(0, full, 50 * batch_size):
        group = sorted(order[:full][start : start + 50 * batch_size], key=lengths.__getitem__)
        batches += [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
    generator.shuffle(batches)
    expected = [index for batch in (*batches, order[full:]) for index in batch]
    assert list(LengthGroupedSampler(lengths, batch_size, seed)) == expected


def test_epochs_and_seeds_differ() -> None:
    sampler = LengthGroupedSampler([5] * 40, 4, seed=0)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first != list(LengthGroupedSampler([5] * 40, 4, seed=1))


def test_padding_is_little() -> None:
    lengths = [1 + (37 * i) % 100 for i in range(1000)]

    def padded(order: list[int]) -> int:
        return sum(8 * max(lengths[i] for i in order[start : start + 8]) for start in range(0, 1000, 8))

    assert padded(list(LengthGroupedSampler(lengths, 8, 0))) < 1.04 * sum(lengths) < 0.7 * padded(list(range(1000)))


def test_each_epoch_has_its_own_order(
    run: Run, llama: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs, original = [], LengthGroupedSampler.__iter__

    def noting(self: LengthGroupedSampler) -> Iterator[int]:
        epochs.append(self.epoch)
        return original(self)

    monkeypatch.setattr(LengthGroupedSampler, "__iter__", noting)
    run("train", "-m", llama, "-d", reviews, "-o", tmp_path / "run", "--method", "lora", "--epochs", 3)
    assert epochs == [0, 1, 2]
