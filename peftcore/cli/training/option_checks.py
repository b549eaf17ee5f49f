"""Options of `train` that contradict its task or each other, found before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from peftcore.cli import task_names
from peftcore.cli.console import require
from peftcore.cli.data import holdout, mixture, streamed
from peftcore.cli.settings import Display, RunOptions
from peftcore.errors import PeftcoreError

# Options of one task: by the name of the field, the task.
_OF_TASK = {
    "language": task_names.SPEECH,
    "pooling": task_names.EMBEDDING,
    "desirable_weight": task_names.UNPAIRED,
    "undesirable_weight": task_names.UNPAIRED,
}


def check(given: RunOptions, display: Display, task: str, data: Sequence[str], *, continues: bool) -> None:
    """Raise a PeftcoreError for options that contradict the task or each other.

    Args:
        given: options of the run.
        display: options of what it shows.
        task: the task.
        data: values of `--data`.
        continues: whether the run starts from an adapter.
    """
    defaults = RunOptions()
    for name, wanted in _OF_TASK.items():
        if task != wanted and getattr(given, name) != getattr(defaults, name):
            option = f"--{name.replace('_', '-')}"
            raise PeftcoreError(f"{option} is for --task {wanted}, found task {task}. Leave it out")
    if task != task_names.ROLLOUTS:
        for name in ("generations", "temperature"):
            if getattr(given, name) != getattr(defaults, name):
                raise PeftcoreError(f"--{name} is for --task grpo, found task {task}. Leave it out")
    if display.sample is not None and task in task_names.NO_PROMPTS:
        raise PeftcoreError(f"--sample is a prompt for a model of texts, found task {task}. Leave it out")
    if task == task_names.IMAGE and (given.chat_template is not None or given.columns is not None):
        raise PeftcoreError("--chat-template and --columns are for texts, found --task image. Leave them out")
    if given.pooling != "auto" and continues:
        raise PeftcoreError(f"--pooling is the adapter's, found {given.pooling}. Leave it out")
    if given.pack and task != task_names.LANGUAGE_MODEL:
        raise PeftcoreError(f"--pack is for causal-lm, found task {task}. Leave it out")
    if task == task_names.ROLLOUTS:
        require("trl", extra="dpo")
        _check_rollouts(given, data)
    elif given.reward is not None:
        raise PeftcoreError(f"--reward judges the answers of --task grpo, found task {task}. Leave it out")
    has_beta = task in task_names.COMPARED and task != task_names.REWARD
    least = 0.0 if task == task_names.ROLLOUTS else 1e-9
    if given.beta is not None and (not has_beta or given.beta < least):
        raise PeftcoreError(
            f"--beta is for --task dpo, image-dpo, kto, orpo and grpo and must be above 0 (of grpo also 0), found "
            f"{given.beta:g} for {task}. Leave it out, or pass a number above 0"
        )
    if task == task_names.UNPAIRED and given.batch_size < 2:
        raise PeftcoreError(
            "--task kto compares the answers of a batch, found --batch-size 1. Use --batch-size 2 or more"
        )
    if given.teacher is None and given.teacher_weight != defaults.teacher_weight:
        raise PeftcoreError(
            f"--teacher-weight is for --teacher, found {given.teacher_weight:g} without a teacher. Name one, or leave "
            "it out"
        )
    if given.epochs <= 0 or (given.lr is not None and given.lr <= 0):
        raise PeftcoreError(f"--lr and --epochs must be above 0, found {given.lr} and {given.epochs:g}")
    if given.eval_data is None:
        holdout.check(given.holdout)
    if given.streaming:
        _check_streaming(given, task)


def _check_streaming(given: RunOptions, task: str) -> None:
    """Raise a PeftcoreError unless the options fit to examples that stay in their files."""
    if task not in streamed.TASKS:
        raise PeftcoreError(f"--streaming is for {' and '.join(streamed.TASKS)}, found task {task}. Leave it out")
    if given.pack:
        raise PeftcoreError("--pack needs the lengths of all examples, which --streaming does not know. Leave one out")
    if given.eval_data is None and given.holdout < 1:
        raise PeftcoreError(
            "--streaming holds out a number of lines, since a share of large data takes long to measure. Pass "
            "--holdout 500, or --eval-data FILE"
        )


def _check_rollouts(given: RunOptions, data: Sequence[str]) -> None:
    """Raise a PeftcoreError unless the options are those of GRPO."""
    from peftcore.cli.tasks import rollouts

    if given.reward is None:
        raise PeftcoreError("--task grpo needs a function that judges answers. Pass --reward FILE.py:FUNCTION")
    size = given.batch_size * given.grad_accum
    if size % given.generations:
        raise PeftcoreError(
            f"--batch-size times --grad-accum counts answers and must be a multiple of --generations "
            f"{given.generations}, found {size}. Use --batch-size {given.generations}"
        )
    if given.temperature <= 0:
        raise PeftcoreError(f"--temperature must be above 0, since answers are sampled, found {given.temperature:g}")
    weighted = next((each for each in data if mixture.parsed(each).weight != 1), None)
    if weighted is not None:
        raise PeftcoreError(
            f"--task grpo draws every prompt once per epoch, found --data {weighted}. Leave out the weight"
        )
    rollouts.load_reward(given.reward)
