"""Regression: a number per text (`--task regression`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from peftcore.errors import PeftcoreError
from peftcore_cli.bases.adapter_folders import AdapterTask, outputs_of_peft
from peftcore_cli.data import labels as data_labels
from peftcore_cli.data.first_lines import FirstLines
from peftcore_cli.data.labels import Label
from peftcore_cli.data.row import Row
from peftcore_cli.tasks import metrics
from peftcore_cli.tasks.labelled import Labelled
from peftcore_cli.tasks.metrics import Metrics

if TYPE_CHECKING:
    from peftcore import AdapterInfo


class Regression(Labelled):
    """A base with a single output, trained with the squared error."""

    name = "regression"
    figures = ("pearson", "spearman")
    main_figure = "pearson"
    peft_task_type = "SEQ_CLS"

    def recognises(self, lines: FirstLines) -> bool:
        if not lines.are_labelled or lines.media is not None:
            return False
        numbers = [data_labels.number(label) for label in lines.labels]
        are_whole = all(float(number or 0).is_integer() for number in numbers)
        return not are_whole and all(number is not None for number in numbers)

    def label_of(self, location: str, key: str, value: Any) -> Label:
        number = data_labels.number(value)
        if number is None:
            raise PeftcoreError(f"{location}: '{key}' must be a number, found {data_labels.short(value)}")
        return number

    def any_label(self, labels: Sequence[str]) -> Label:
        return 0.0

    def head(self, labels: tuple[str, ...]) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def from_peft(self, info: AdapterInfo) -> AdapterTask | None:
        is_own = info.task_type == self.peft_task_type and outputs_of_peft(info) == 1
        return AdapterTask(self.name, 512) if is_own else None

    def figures_of(self, answers: Tensor, labels: Tensor) -> Metrics:
        return metrics.of_numbers(answers[:, 0], labels)

    def answer_of(self, scores: Tensor, targets: Tensor, row: Row, labels: Sequence[str]) -> dict[str, Any]:
        return {"label": round(float(scores[0]), 6)}

    def format_answer(self, logits: Tensor, labels: Sequence[str]) -> str:
        return f"{logits.item():.4g}"
