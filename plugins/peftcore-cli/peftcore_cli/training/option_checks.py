"""Options of `train` that contradict its task or each other, found before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from peftcore.errors import PeftcoreError
from peftcore_cli.data import holdout
from peftcore_cli.settings import Display, RunOptions
from peftcore_cli.tasks import registered
from peftcore_cli.tasks.task import Task


def check(given: RunOptions, display: Display, name: str, data: Sequence[str], *, continues: bool) -> None:
    """Raise a PeftcoreError for options that contradict the task or each other.

    Args:
        given: options of the run.
        display: options of what it shows.
        name: of the task.
        data: values of `--data`.
        continues: whether the run starts from an adapter.
    """
    task, defaults = registered.find(name), RunOptions()
    _refuse_options_of_others(given, task)
    if display.sample is not None and not task.answers_texts:
        raise PeftcoreError(f"--sample is a prompt for a model of texts, found task {name}. Leave it out")
    if given.pack and not task.learns_texts:
        raise PeftcoreError(f"--pack is for {registered.names_with('learns_texts')}, found task {name}. Leave it out")
    task.check_options(given, data, continues=continues)
    _check_beta(given, task)
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


def _refuse_options_of_others(given: RunOptions, task: Task) -> None:
    defaults = RunOptions()
    for name in dict.fromkeys(name for each in registered.tasks() for name in each.options):
        if name not in task.options and getattr(given, name) != getattr(defaults, name):
            option, others = f"--{name.replace('_', '-')}", registered.names_with_option(name)
            raise PeftcoreError(f"{option} is for --task {others}, found task {task.name}. Leave it out")


def _check_beta(given: RunOptions, task: Task) -> None:
    least = task.least_beta
    if given.beta is None or (least is not None and given.beta >= least):
        return
    betas = {each.name: each.least_beta for each in registered.tasks() if each.least_beta is not None}
    zero = registered.join_names([name for name, least in betas.items() if least == 0])
    raise PeftcoreError(
        f"--beta is for --task {registered.join_names([*betas])} and must be above 0 (of {zero} also 0), found "
        f"{given.beta:g} for {task.name}. Leave it out, or pass a number above 0"
    )


def _check_streaming(given: RunOptions, task: Task) -> None:
    """Raise a PeftcoreError unless the options fit to examples that stay in their files."""
    if not task.streams:
        raise PeftcoreError(
            f"--streaming is for {registered.names_with('streams')}, found task {task.name}. Leave it out"
        )
    if given.pack:
        raise PeftcoreError("--pack needs the lengths of all examples, which --streaming does not know. Leave one out")
    if given.eval_data is None and given.holdout < 1:
        raise PeftcoreError(
            "--streaming holds out a number of lines, since a share of large data takes long to measure. Pass "
            "--holdout 500, or --eval-data FILE"
        )
