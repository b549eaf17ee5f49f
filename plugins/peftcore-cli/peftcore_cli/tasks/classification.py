"""Text classification (`--task classification`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

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


class Classification(Labelled):
    """A classifier with one class per text."""

    name = "classification"
    figures = ("accuracy", "macro_f1")
    main_figure = "accuracy"
    peft_task_type: ClassVar[str | None] = "SEQ_CLS"

    def recognises(self, lines: FirstLines) -> bool:
        return lines.are_labelled and lines.media is None

    def label_of(self, location: str, key: str, value: Any) -> Label:
        if not isinstance(value, (int, str)):
            raise PeftcoreError(f"{location}: '{key}' must be text, found {data_labels.short(value)}")
        return data_labels.class_name(location, key, str(value))

    def any_label(self, labels: Sequence[str]) -> Label:
        return labels[0]

    def head(self, labels: tuple[str, ...]) -> dict[str, Any]:
        return {"problem_type": "single_label_classification", **names_of(labels)}

    def from_peft(self, info: AdapterInfo) -> AdapterTask | None:
        if self.peft_task_type is None or info.task_type != self.peft_task_type:
            return None
        outputs = outputs_of_peft(info)
        return AdapterTask(self.name, 512, tuple(str(i) for i in range(outputs))) if outputs > 1 else None

    def figures_of(self, answers: Tensor, labels: Tensor) -> Metrics:
        return metrics.of_classes(answers.argmax(-1), labels, answers.shape[1])

    def answer_of(self, scores: Tensor, targets: Tensor, row: Row, labels: Sequence[str]) -> dict[str, Any]:
        best = int(scores.argmax())
        return {"label": labels[best], "probability": round(float(scores.softmax(-1)[best]), 6)}

    def format_answer(self, logits: Tensor, labels: Sequence[str]) -> str:
        probabilities = logits.softmax(-1)
        best = int(probabilities.argmax())
        return f"{labels[best]} ({100 * probabilities[best]:.1f} %)"


def names_of(labels: Sequence[str]) -> dict[str, Any]:
    """Return the config fields that name the outputs of a head; empty without labels."""
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    return names if labels else {}
