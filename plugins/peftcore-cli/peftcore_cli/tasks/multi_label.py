"""Multi-label classification: any number of labels per text (`--task multi-label`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from peftcore.errors import PeftcoreError
from peftcore_cli.data import labels as data_labels
from peftcore_cli.data.first_lines import FirstLines
from peftcore_cli.data.labels import Label
from peftcore_cli.data.row import Row
from peftcore_cli.tasks import metrics
from peftcore_cli.tasks.classification import names_of
from peftcore_cli.tasks.labelled import Labelled, keys_with
from peftcore_cli.tasks.metrics import Metrics
from peftcore_cli.tasks.task import Task


class MultiLabel(Labelled):
    """One binary output per label; the label applies if its probability is above one half."""

    name = "multi-label"
    keys = (*keys_with("label"), *keys_with("labels"))
    shown_keys = "text/labels"
    columns_example = "text=body,labels=topics"
    figures = ("micro_f1", "macro_f1", "exact_match")
    main_figure = "micro_f1"

    def recognises(self, lines: FirstLines) -> bool:
        return lines.are_labelled and lines.media is None and data_labels.names(lines.labels[0]) is not None

    def label_of(self, location: str, key: str, value: Any) -> Label:
        names = data_labels.names(value)
        short = data_labels.short(value)
        if names is None:
            raise PeftcoreError(f'{location}: \'{key}\' must be a list of names, such as ["a", "b"], found {short}')
        labels = tuple(data_labels.class_name(location, key, name) for name in names)
        duplicate = next((name for name in labels if labels.count(name) > 1), None)
        if duplicate is not None:
            raise PeftcoreError(
                f"{location}: '{key}' names {duplicate} twice: {short}. List only the labels that apply, instead of a "
                "zero or one for every label"
            )
        return labels

    def any_label(self, labels: Sequence[str]) -> Label:
        return (labels[0],)

    def head(self, labels: tuple[str, ...]) -> dict[str, Any]:
        return {"problem_type": "multi_label_classification", **names_of(labels)}

    def continues(self, task: Task, *, is_recorded: bool = True, labels: Sequence[str] = ()) -> bool:
        may_be_multi_label = not is_recorded and bool(labels)  # folders of PEFT do not record the loss of a classifier
        return may_be_multi_label or super().continues(task)

    def figures_of(self, answers: Tensor, labels: Tensor) -> Metrics:
        return metrics.of_label_sets(answers > 0, labels)

    def answer_of(self, scores: Tensor, targets: Tensor, row: Row, labels: Sequence[str]) -> dict[str, Any]:
        chances = dict(zip(labels, (round(probability, 6) for probability in scores.sigmoid().tolist()), strict=True))
        return {"labels": [label for label, chance in chances.items() if chance > 0.5], "probabilities": chances}

    def format_answer(self, logits: Tensor, labels: Sequence[str]) -> str:
        chances = zip(labels, logits.sigmoid().tolist(), strict=True)
        return ", ".join(f"{label} ({100 * chance:.1f} %)" for label, chance in chances if chance > 0.5) or "none"
