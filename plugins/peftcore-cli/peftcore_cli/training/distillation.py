"""Distillation (`--teacher`): a model learns another's probabilities of the next token, next to the token itself.

    loss = (1 - w) CE + w KL(teacher || model)

Both are means over the learned tokens; w is `--teacher-weight` (Hinton et al. 2015, arXiv 1503.02531).
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
from peftcore_cli.tasks.conversations import IGNORED
from peftcore_cli.tasks.encoded_examples import Example
from peftcore_cli.training.trainers import MeasuringTrainer

_ROWS = 1024  # tokens whose probabilities are compared at once, in fp32


def checked(given: RunOptions, task: str) -> str:
    """Return `--teacher` as an absolute path or a hub id.

    Raises:
        PeftcoreError: the options do not fit together, or the teacher is not a model.
    """
    teacher = str(given.teacher)
    if not registered.find(task).learns_texts:
        raise PeftcoreError(
            f"--teacher is for {registered.names_with('learns_texts')}, found task {task}. Leave it out"
        )
    if not 0 < given.teacher_weight <= 1:
        raise PeftcoreError(f"--teacher-weight must be above 0 and at most 1, found {given.teacher_weight:g}")
    if given.without_logits == "on":
        raise PeftcoreError("--teacher compares logits, which --without-logits on does not compute. Leave one out")
    folder = Path(os.path.expanduser(teacher))
    if not (folder / "config.json").exists() and (adapter_folder(folder) / "adapter_config.json").exists():
        raise PeftcoreError(
            f"--teacher '{teacher}' is an adapter, and the teacher must be a model. Write one with peftcore merge "
            f"{teacher} --output FOLDER, and pass that"
        )
    return base_files.resolve(teacher)


def of_run(
    settings: Settings, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> PreTrainedModel | None:
    """Return the frozen teacher of a run, or None if it has none.

    Raises:
        PeftcoreError: it reads other tokens than the model, or cannot separate packed examples.
    """
    if settings.teacher is None:
        return None
    name = settings.teacher
    theirs, ours = registered.find(settings.task).load_processor(name).get_vocab(), tokenizer.get_vocab()
    other = [token for token, id_ in ours.items() if theirs.get(token) != id_]
    if other:
        raise PeftcoreError(
            f"the teacher '{name}' has other tokens than the model: {len(other):,} of {len(ours):,}, such as "
            f"{min(other, key=ours.__getitem__)!r}, differ. Pass a teacher with the model's tokenizer"
        )
    say(f"loading {name} as the teacher")
    teacher = models.load_model(name, settings.task, dtype=settings.dtype, device=settings.device)
    if settings.pack:
        packing.check(teacher, examples, "the teacher")
    return teacher.requires_grad_(False)


def divergence(logits: Tensor, wanted: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of KL(wanted || logits) over the learned tokens.

    Rows for more tokens than both have, which pad a table of embeddings, are left out.

    Args:
        logits: [batch, length, tokens].
        wanted: of the teacher, [batch, length, tokens].
        labels: [batch, length]; those after the first predict nothing where they are ignored.
    """
    learned = labels[:, 1:] != IGNORED
    most = min(logits.shape[-1], wanted.shape[-1])
    ours, theirs = logits[:, :-1][learned][:, :most], wanted[:, :-1][learned][:, :most]
    total = logits.new_zeros((), dtype=torch.float32)
    for some, right in zip(ours.split(_ROWS), theirs.split(_ROWS), strict=True):
        kept, target = some.float().log_softmax(-1), right.float().log_softmax(-1)
        total = total + nn.functional.kl_div(kept, target, reduction="sum", log_target=True)
    return total


class DistillingTrainer(MeasuringTrainer):
    """Trainer on a language model's examples and a teacher's probabilities.

    Args:
        teacher: a frozen model with the same tokens.
        weight: of the divergence from it.
    """

    def __init__(self, *args: Any, teacher: PreTrainedModel, weight: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher, self.weight = teacher, weight

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, output = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        with torch.no_grad():
            wanted = self.teacher(**{name: value for name, value in inputs.items() if name != "labels"}).logits
        total = divergence(output.logits, wanted, inputs["labels"])
        if num_items_in_batch is None or not self.model_accepts_loss_kwargs:  # a mean over this batch
            away = total / (inputs["labels"][:, 1:] != IGNORED).sum().clamp_min(1)
        else:
            together = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            away = total / num_items_in_batch * together
        loss = (1 - self.weight) * loss + self.weight * away
        return (loss, output) if return_outputs else loss
