"""Metrics on held-out examples: the mean loss and the task's own metrics.

F1 of a label is 2 TP / (2 TP + FP + FN). Macro F1 is the mean F1 over the labels that occur or are predicted. Micro F1
uses the summed counts of all labels (van Rijsbergen 1979; Yang 1999). Spearman's correlation is Pearson's correlation
of ranks, where equal values share their mean rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

TITLES = {
    "macro_f1": "macro F1",
    "micro_f1": "micro F1",
    "entity_f1": "entity F1",
    "exact_match": "exact match",
    "rouge_l": "ROUGE-L",
    "log_odds": "log odds ratio",
    "mrr": "mean reciprocal rank",
    "recall_at_1": "recall@1",
    "wer": "word error rate",
    "preference_accuracy": "preference accuracy",
}
# Metrics that are shown as percentages.
SHARES = ("accuracy", "macro_f1", "micro_f1", "entity_f1", "exact_match", "preference_accuracy", "recall_at_1", "wer")


@dataclass(frozen=True)
class Metrics:
    """Mean loss over `count` predictions (tokens or examples), and the task's other metrics.

    Args:
        figures: other metrics by name, such as `accuracy`; empty for a language model.
        baseline: (name, accuracy) of a constant answer; for regression (name, loss).
        confusion: confusion[label][answer] is the number of examples, for classification.
    """

    loss: float
    count: int
    figures: Mapping[str, float] = field(default_factory=dict)
    baseline: tuple[str, float] | None = None
    confusion: list[list[int]] | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def as_dict(self) -> dict[str, float]:
        """Return `loss`, and `perplexity` or the task's metrics, as a dict."""
        return {"loss": self.loss, **(self.figures or {"perplexity": self.perplexity})}

    def __str__(self) -> str:
        return ", ".join(f"{title(name)} {format_value(name, value)}" for name, value in self.as_dict().items())


def title(name: str) -> str:
    """Return the name of a metric for output."""
    return TITLES.get(name, name)


def format_value(name: str, value: float) -> str:
    """Format the value of a metric for output."""
    if name in SHARES:
        return f"{100 * value:.1f} %"
    return f"{value:.2f}" if name == "perplexity" else f"{value:.4f}"


def rows(before: Metrics, after: Metrics) -> list[tuple[str, str, str]]:
    """Return (name, before, after) of every metric for a table, with the baseline last."""
    after_figures = after.as_dict()
    cells = [(title(name), f"{value:.4f}", f"{after_figures[name]:.4f}") for name, value in before.as_dict().items()]
    if after.baseline is not None:
        name, value = after.baseline
        cells.append((name, f"{value:.4f}", f"{value:.4f}"))
    return cells


def confusion_rows(confusion: list[list[int]], names: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the confusion matrix as a table: columns are predictions, rows are true labels."""
    counts = [(name, *map(str, row)) for name, row in zip(names, confusion, strict=True)]
    return [("", *names), *counts]


def of_classes(answers: Tensor, labels: Tensor, classes: int) -> Metrics:
    """Return the metrics of predicted classes `answers` [n] against `labels` [n], with a loss of zero.

    The baseline always predicts the most frequent class.
    """
    confusion = torch.bincount(labels * classes + answers, minlength=classes * classes).view(classes, classes)
    correct, label_counts, answer_counts = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    figures = {"accuracy": float(correct.sum() / len(labels)), "macro_f1": _macro(correct, label_counts, answer_counts)}
    baseline = ("most frequent label", float(label_counts.max() / len(labels)))
    return Metrics(0.0, len(labels), figures, baseline, confusion.tolist())


def of_label_sets(answers: Tensor, labels: Tensor) -> Metrics:
    """Return the metrics of label sets, [n, labels] of zeros and ones. Each label counts separately."""
    answers, labels = answers.bool(), labels.bool()
    correct, label_counts, answer_counts = (answers & labels).sum(0), labels.sum(0), answers.sum(0)
    total = int(label_counts.sum() + answer_counts.sum())
    figures = {
        "micro_f1": float(2 * correct.sum() / total) if total else 0.0,
        "macro_f1": _macro(correct, label_counts, answer_counts),
        "exact_match": float((answers == labels).all(1).double().mean()),
    }
    return Metrics(0.0, len(labels), figures)


def of_numbers(answers: Tensor, labels: Tensor) -> Metrics:
    """Return the metrics of numbers [n]. The loss is the mean squared error; the baseline always predicts the mean."""
    answers, labels = answers.double(), labels.double()
    error = float((answers - labels).square().mean())
    figures = {"pearson": pearson(answers, labels), "spearman": pearson(ranks(answers), ranks(labels))}
    return Metrics(error, len(labels), figures, ("loss of the mean", float(labels.var(correction=0))))


def pearson(a: Tensor, b: Tensor) -> float:
    """Return Pearson's correlation of two vectors, or 0 if one is constant."""
    a, b = a - a.mean(), b - b.mean()
    norm = float(a.norm() * b.norm())
    return float(a @ b) / norm if norm > 0 else 0.0


def ranks(values: Tensor) -> Tensor:
    """Return 0-based ranks, where equal values share their mean rank."""
    _, group, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts + 1) / 2)[group].double()


def _macro(correct: Tensor, label_counts: Tensor, answer_counts: Tensor) -> float:
    counts = label_counts + answer_counts
    occurs = counts > 0
    return float((2 * correct[occurs] / counts[occurs]).double().mean()) if bool(occurs.any()) else 0.0
