"""Distillation (`--teacher`): the model also learns the next-token probabilities of a teacher.

    loss = (1 - w) CE + w KL(teacher || model)

Both terms are means over the learned tokens; w is `--teacher-weight` (Hinton et al. 2015, arXiv 1503.02531).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftcore.errors import PeftcoreError
from peftcore_cli.bases import base_files, models
from peftcore_cli.bases.adapter_folders import adapter_folder
from peftcore_cli.console import say
from peftcore_cli.settings import RunOptions, Settings
from peftcore_cli.tasks import packing, registered
from peftcore_cli.tasks.conversations import IGNORE_INDEX
from peftcore_cli.tasks.encoded_examples import Example
from peftcore_cli.training.trainers import MeasuringTrainer

_ROWS = 1024  # number of tokens compared at a time, in fp32


def check_teacher(run_options: RunOptions, task: str) -> str:
    """Check `--teacher`, and return it as an absolute path or a hub id.

    Raises:
        PeftcoreError: the options do not fit together, or the teacher is not a model.
    """
    teacher = str(run_options.teacher)
    if not registered.find(task).learns_texts:
        raise PeftcoreError(
            f"--teacher only works with {registered.names_with('learns_texts')} (the task is {task}). Remove --teacher"
        )
    if not 0 < run_options.teacher_weight <= 1:
        raise PeftcoreError(f"--teacher-weight must be above 0 and at most 1, found {run_options.teacher_weight:g}")
    if run_options.without_logits == "on":
        raise PeftcoreError(
            "--teacher needs logits, which --without-logits on does not compute. Remove one of the options"
        )
    folder = Path(os.path.expanduser(teacher))
    if not (folder / "config.json").exists() and (adapter_folder(folder) / "adapter_config.json").exists():
        raise PeftcoreError(
            f"--teacher '{teacher}' is an adapter, but the teacher must be a model. Merge it first: peftcore merge "
            f"{teacher} --output FOLDER"
        )
    return base_files.resolve(teacher)


def of_run(
    settings: Settings, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> PreTrainedModel | None:
    """Return the frozen teacher of a run, or None if it has none.

    Raises:
        PeftcoreError: the teacher's tokenizer differs from the model's, or the teacher cannot separate packed examples.
    """
    if settings.teacher is None:
        return None
    name = settings.teacher
    teacher_vocabulary, vocabulary = (
        registered.find(settings.task).load_processor(name).get_vocab(),
        tokenizer.get_vocab(),
    )
    different = [token for token, id_ in vocabulary.items() if teacher_vocabulary.get(token) != id_]
    if different:
        raise PeftcoreError(
            f"the teacher '{name}' and the model have different tokenizers: {len(different):,} of "
            f"{len(vocabulary):,} tokens differ, such as {min(different, key=vocabulary.__getitem__)!r}. Pass a "
            "teacher with the model's tokenizer"
        )
    say(f"loading {name} as the teacher")
    teacher = models.load_model(name, settings.task, dtype=settings.dtype, device=settings.device)
    if settings.pack:
        packing.check(teacher, examples, "the teacher")
    return teacher.requires_grad_(False)


def divergence(logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of KL(teacher || model) over the learned tokens.

    Logits that only one of the models has (from a padded embedding) are ignored.

    Args:
        logits: logits of the model, [batch, length, vocabulary].
        teacher_logits: logits of the teacher, [batch, length, vocabulary].
        labels: labels [batch, length], with ignored tokens.
    """
    is_learned = labels[:, 1:] != IGNORE_INDEX
    width = min(logits.shape[-1], teacher_logits.shape[-1])
    student_rows, teacher_rows = logits[:, :-1][is_learned][:, :width], teacher_logits[:, :-1][is_learned][:, :width]
    total = logits.new_zeros((), dtype=torch.float32)
    for student_part, teacher_part in zip(student_rows.split(_ROWS), teacher_rows.split(_ROWS), strict=True):
        log_probabilities, target = student_part.float().log_softmax(-1), teacher_part.float().log_softmax(-1)
        total = total + nn.functional.kl_div(log_probabilities, target, reduction="sum", log_target=True)
    return total


class DistillingTrainer(MeasuringTrainer):
    """Trainer of a language model with an additional distillation loss.

    Args:
        teacher: frozen model with the same tokenizer.
        weight: weight of the distillation loss.
    """

    def __init__(self, *args: Any, teacher: PreTrainedModel, weight: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher, self.weight = teacher, weight

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, output = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        with torch.no_grad():
            teacher_logits = self.teacher(**{name: value for name, value in inputs.items() if name != "labels"}).logits
        total = divergence(output.logits, teacher_logits, inputs["labels"])
        if num_items_in_batch is None or not self.model_accepts_loss_kwargs:  # a mean over this batch
            distance = total / (inputs["labels"][:, 1:] != IGNORE_INDEX).sum().clamp_min(1)
        else:
            processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            distance = total / num_items_in_batch * processes
        loss = (1 - self.weight) * loss + self.weight * distance
        return (loss, output) if return_outputs else loss
