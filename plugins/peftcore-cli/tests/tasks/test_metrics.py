"""Figures of predictions, by hand and by their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st
from peftcore_cli.tasks import metrics


def test_classes_by_hand() -> None:
    found = metrics.of_classes(torch.tensor([0, 0, 1, 1, 0]), torch.tensor([0, 0, 0, 1, 1]), 3)
    assert found.confusion == [[2, 1, 0], [1, 1, 0], [0, 0, 0]]
    # F1 of the first 4/6, of the second 2/4; the third neither occurs nor is answered.
    assert found.figures == {"accuracy": pytest.approx(0.6), "macro_f1": pytest.approx((2 / 3 + 1 / 2) / 2)}
    assert found.baseline == ("most frequent label", pytest.approx(0.6))
    rows = metrics.confusion_rows(found.confusion, ["a", "b", "c"])
    assert rows[:2] == [("", "a", "b", "c"), ("a", "2", "1", "0")]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_f1_of_classes(pairs: list[tuple[int, int]]) -> None:
    answers, wanted = (torch.tensor(column) for column in zip(*pairs, strict=True))
    scores = []
    for label in set(answers.tolist()) | set(wanted.tolist()):
        right = sum(a == w == label for a, w in pairs)
        precision = right / max(1, sum(a == label for a, _ in pairs))
        recall = right / max(1, sum(w == label for _, w in pairs))
        scores.append(2 * precision * recall / (precision + recall) if right else 0.0)
    found = metrics.of_classes(answers, wanted, 4)
    assert found.figures["macro_f1"] == pytest.approx(sum(scores) / len(scores))
    assert found.figures["accuracy"] == pytest.approx(sum(a == w for a, w in pairs) / len(pairs))


def test_label_sets_by_hand() -> None:
    wanted = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    answers = torch.tensor([[True, True, False, False], [False, True, False, False], [False, False, False, False]])
    assert metrics.of_label_sets(answers, wanted).figures == {
        "micro_f1": pytest.approx(4 / 6),  # two right, one missed, one too many
        "macro_f1": pytest.approx((1 + 2 / 3 + 0) / 3),
        "exact_match": pytest.approx(2 / 3),
    }
    nothing = metrics.of_label_sets(torch.zeros(2, 3), torch.zeros(2, 3)).figures
    assert nothing == {"micro_f1": 0.0, "macro_f1": 0.0, "exact_match": 1.0}


def test_numbers_by_hand() -> None:
    found = metrics.of_numbers(torch.tensor([1.0, 2.0, 4.0, 3.0]), torch.tensor([1.0, 10.0, 100.0, 100.0]))
    # Ranks 0 1 3 2 beside 0 1 2.5 2.5: covariance 4.5, squared lengths 5 and 4.5.
    assert found.figures["spearman"] == pytest.approx(4.5 / (5 * 4.5) ** 0.5)
    assert found.loss == pytest.approx((64 + 96**2 + 97**2) / 4)
    assert found.baseline == ("loss of the mean", pytest.approx(2242.6875))
    assert metrics.of_numbers(torch.ones(3), torch.tensor([1.0, 2.0, 3.0])).figures == {"pearson": 0.0, "spearman": 0.0}


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=2, max_size=20))
def test_correlations(pairs: list[tuple[int, int]]) -> None:
    a, b = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    if len(a.unique()) == 1 or len(b.unique()) == 1:
        assert metrics.pearson(a, b) == 0.0
        return
    assert metrics.pearson(a, b) == pytest.approx(float(torch.corrcoef(torch.stack([a, b]))[0, 1]))
    below = [sum(x < y for x in a.tolist()) + (a.tolist().count(y) - 1) / 2 for y in a.tolist()]
    assert metrics.ranks(a).tolist() == below


def test_what_is_printed() -> None:
    assert str(metrics.Metrics(0.5, 3)) == "loss 0.5000, perplexity 1.65"
    found = metrics.Metrics(0.5, 3, {"accuracy": 0.25, "macro_f1": 0.5}, ("most frequent label", 0.75))
    assert str(found) == "loss 0.5000, accuracy 25.0 %, macro F1 50.0 %"
    assert metrics.rows(found, found) == [
        ("loss", "0.5000", "0.5000"),
        ("accuracy", "0.2500", "0.2500"),
        ("macro F1", "0.5000", "0.5000"),
        ("most frequent label", "0.7500", "0.7500"),
    ]
