"""Several data sets with weights: how often examples are drawn, each with its own format, and the report."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st
from peftcore_cli import options
from peftcore_cli.data import mixture, row_reading
from peftcore_cli.data.mixture import Source
from peftcore_cli.training.sampler import LengthGroupedSampler
from support.commands import Run, write_jsonl

from peftcore import PeftcoreError

METHOD = ("--method", "lora", "--set", "r=4", "--device", "cpu")


def test_weights_and_paths_with_colons(tmp_path: Path) -> None:
    odd = tmp_path / "a:2"
    odd.write_text("")
    assert mixture.parse("a.jsonl:2") == Source("a.jsonl", 2.0)
    assert mixture.parse("owner/name:0.5") == Source("owner/name", 0.5)
    assert mixture.parse(str(odd)) == Source(str(odd)) and mixture.parse(f"{odd}:3") == Source(str(odd), 3.0)
    for path in ("a.jsonl", "C:\\a.jsonl", "a:b", ":2"):
        assert mixture.parse(path) == Source(path)
    for wrong in ("a:0", "a:-1", "a:nan", "a:inf"):
        with pytest.raises(PeftcoreError, match="must be a number above 0"):
            mixture.parse(wrong)


def test_settings_keep_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    assert options.absolute_data(["a.jsonl:2", "o/n:0.5"]) == [f"{tmp_path}/a.jsonl:2", "o/n:0.5"]


@given(st.lists(st.tuples(st.integers(0, 20), st.floats(0.05, 4)), min_size=1, max_size=4), st.integers(0, 3))
def test_each_example_is_drawn_by_its_weight(parts: list[tuple[int, float]], seed: int) -> None:
    lengths = [1 + i % 5 for i in range(sum(size for size, _ in parts))]
    sampler = LengthGroupedSampler(lengths, 3, seed, parts)
    order = list(sampler)
    assert len(order) == len(sampler) and order == list(LengthGroupedSampler(lengths, 3, seed, parts))
    found, begin = Counter(order), 0
    for size, weight in parts:
        counts = [found[i] for i in range(begin, begin + size)]
        begin += size
        if size:
            assert sum(counts) == max(1, round(size * weight)) and max(counts) - min(counts) <= 1


def test_a_half_is_another_half_in_each_epoch() -> None:
    sampler = LengthGroupedSampler([5] * 40, 4, 0, [(40, 0.5)])
    first = set(sampler)
    sampler.set_epoch(1)
    assert len(first) == 20 and set(sampler) != first
    assert list(mixture.sample_epoch([(2, 1.0), (3, 2.0)], random.Random(0))) == [0, 1, 2, 3, 4, 2, 3, 4]


@pytest.fixture
def two(reviews: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Prompts with completions, and texts in a column of another name."""
    texts = [{"sentence": f"the story is {word}"} for word in ("good", "bad", "dull", "bright", "fun", "much")]
    return reviews, write_jsonl(tmp_path / "texts.jsonl", texts)


def test_each_data_set_has_its_format_and_its_line_in_the_report(
    run: Run, llama: Path, two: tuple[Path, Path], tmp_path: Path
) -> None:
    reviews, texts = two
    output = tmp_path / "run"
    arguments = ("-d", f"{reviews}:0.5", "-d", f"{texts}:2", "--columns", "text=sentence", "--holdout", 6)
    text = run("train", "-m", llama, *arguments, "-o", output, *METHOD, "--epochs", 1, "--batch-size", 2).output
    found = json.loads((output / "result.json").read_text())
    first, second = found["data_sets"]
    assert (first["path"], first["weight"], second["weight"]) == (str(reviews), 0.5, 2.0)
    assert first["rows"] + second["rows"] == found["train_rows"] == 14
    assert first["held_out"] + second["held_out"] == 6
    assert second["tokens"] == 5 * second["rows"]
    assert found["steps"] == -(-(round(first["rows"] / 2) + 2 * second["rows"]) // 2)
    for each in (first, second):
        assert each["after"] != each["before"]
    assert "data set" in text and "loss after" in (output / "report.html").read_text()
    assert f"--data {reviews} --data {texts}" in text.replace("\n", " ")
    assert json.loads((output / "run.json").read_text())["data"] == [f"{reviews}:0.5", f"{texts}:2"]
    again = run("eval", output, "-d", f"{texts}:2", "--columns", "text=sentence", code=1).output
    assert "eval measures every example once" in again


@pytest.mark.nightly
def test_packed_rows_are_drawn_by_weight_too(run: Run, llama: Path, two: Any, tmp_path: Path) -> None:
    reviews, texts = two
    arguments = ("-d", f"{reviews}:2", "-d", texts, "--columns", "text=sentence", "--pack", "--max-length", 512)
    run("train", "-m", llama, *arguments, "-o", tmp_path / "run", *METHOD, "--epochs", 2, "--batch-size", 1)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 2 * (2 + 1)


def test_columns_of_several_data_sets(two: tuple[Path, Path], tmp_path: Path) -> None:
    paths = list(map(str, two))
    rows = row_reading.read_rows(paths, "causal-lm", {"text": "sentence"})
    assert [row.source for row in rows] == [0] * 14 + [1] * 6 and {row.kind for row in rows} == {
        "prompt/completion",
        "text",
    }
    with pytest.raises(PeftcoreError, match=r"reviews.jsonl:1: --columns maps text to the column 'sentense'"):
        row_reading.read_rows(paths, "causal-lm", {"text": "sentense"})
