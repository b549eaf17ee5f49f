"""Metrics on held-out examples: a mean loss, and the task's figures.

F1 of a label is 2 TP / (2 TP + FP + FN); macro F1 is its mean over the labels that occur or are predicted, micro F1 is
that of all labels' counts together (van Rijsbergen 1979; Yang 1999). Correlations are Pearson's and Spearman's, which
is Pearson's on ranks, where equal values share their mean rank.
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
# Figures that are shown as percentages.
SHARES = ("accuracy", "macro_f1", "micro_f1", "entity_f1", "exact_match", "preference_accuracy", "recall_at_1", "wer")


@dataclass(frozen=True)
class Metrics:
    """Mean loss over `count` predictions (tokens or examples), and the task's other figures.

    Args:
        figures: by name, such as `accuracy`; empty for a language model.
        baseline: (name, accuracy or, for numbers, loss) of a constant answer.
        confusion: [label][answer] -> number of examples, for classes.
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
        """Return `loss`, and `perplexity` or the task's figures."""
        return {"loss": self.loss, **(self.figures or {"perplexity": self.perplexity})}

    def __str__(self) -> str:
        return ", ".join(f"{title(name)} {shown(name, value)}" for name, value in self.as_dict().items())


def title(name: str) -> str:
    """Return a figure's printed name."""
    return TITLES.get(name, name)


def shown(name: str, value: float) -> str:
    """Return a figure's printed value."""
    if name in SHARES:
        return f"{100 * value:.1f} %"
    return f"{value:.2f}" if name == "perplexity" else f"{value:.4f}"


def rows(before: Metrics, after: Metrics) -> list[tuple[str, str, str]]:
    """Return (name, before, after) of every figure, as tables show them; the baseline last."""
    later = after.as_dict()
    found = [(title(name), f"{value:.4f}", f"{later[name]:.4f}") for name, value in before.as_dict().items()]
    if after.baseline is not None:
        name, value = after.baseline
        found.append((name, f"{value:.4f}", f"{value:.4f}"))
    return found


def confusion_rows(confusion: list[list[int]], names: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the matrix as a table: answers in the first row, labels in the first column."""
    counts = [(name, *map(str, row)) for name, row in zip(names, confusion, strict=True)]
    return [("", *names), *counts]


def of_classes(answers: Tensor, wanted: Tensor, classes: int) -> Metrics:
    """Return figures of predicted classes `answers` [n] against `wanted` [n]; the loss is zero.

    The baseline always answers the most frequent class of these examples.
    """
    confusion = torch.bincount(wanted * classes + answers, minlength=classes * classes).view(classes, classes)
    right, real, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    figures = {"accuracy": float(right.sum() / len(wanted)), "macro_f1": _macro(right, real, predicted)}
    most = ("most frequent label", float(real.max() / len(wanted)))
    return Metrics(0.0, len(wanted), figures, most, confusion.tolist())


def of_label_sets(answers: Tensor, wanted: Tensor) -> Metrics:
    """Like `of_classes` for sets of labels, [n, labels] of zeros and ones: each label counts separately."""
    answers, wanted = answers.bool(), wanted.bool()
    right, real, predicted = (answers & wanted).sum(0), wanted.sum(0), answers.sum(0)
    counted = int(real.sum() + predicted.sum())
    figures = {
        "micro_f1": float(2 * right.sum() / counted) if counted else 0.0,
        "macro_f1": _macro(right, real, predicted),
        "exact_match": float((answers == wanted).all(1).double().mean()),
    }
    return Metrics(0.0, len(wanted), figures)


def of_numbers(answers: Tensor, wanted: Tensor) -> Metrics:
    """Like `of_classes` for numbers [n]; the loss is the mean squared error, the baseline always answers the mean."""
    answers, wanted = answers.double(), wanted.double()
    error = float((answers - wanted).square().mean())
    figures = {"pearson": pearson(answers, wanted), "spearman": pearson(ranks(answers), ranks(wanted))}
    return Metrics(error, len(wanted), figures, ("loss of the mean", float(wanted.var(correction=0))))


def pearson(a: Tensor, b: Tensor) -> float:
    """Return the correlation of two vectors; 0 if one is constant."""
    a, b = a - a.mean(), b - b.mean()
    norm = float(a.norm() * b.norm())
    return float(a @ b) / norm if norm > 0 else 0.0


def ranks(values: Tensor) -> Tensor:
    """Return ranks from 0; equal values share their mean."""
    _, group, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts + 1) / 2)[group].double()


def _macro(right: Tensor, real: Tensor, predicted: Tensor) -> float:
    counted = real + predicted
    occur = counted > 0
    return float((2 * right[occur] / counted[occur]).double().mean()) if bool(occur.any()) else 0.0
