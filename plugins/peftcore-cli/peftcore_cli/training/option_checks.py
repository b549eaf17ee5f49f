"""Check that the options of `train` fit the task and each other, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from peftcore.errors import PeftcoreError
from peftcore_cli.data import holdout
from peftcore_cli.settings import Display, RunOptions
from peftcore_cli.tasks import registered
from peftcore_cli.tasks.task import Task


def check(run_options: RunOptions, display: Display, name: str, data: Sequence[str], *, continues: bool) -> None:
    """Raise a PeftcoreError for options that contradict the task or other options.

    Args:
        run_options: options of the run.
        display: options about what the run prints and logs.
        name: name of the task.
        data: values of `--data`.
        continues: whether the run starts from an adapter.
    """
    task, defaults = registered.find(name), RunOptions()
    _refuse_options_of_others(run_options, task)
    if display.sample is not None and not task.answers_texts:
        raise PeftcoreError(f"--sample only works with tasks that generate text (the task is {name}). Remove --sample")
    if run_options.pack and not task.learns_texts:
        raise PeftcoreError(
            f"--pack only works with {registered.names_with('learns_texts')} (the task is {name}). Remove --pack"
        )
    task.check_options(run_options, data, continues=continues)
    _check_beta(run_options, task)
    if run_options.teacher is None and run_options.teacher_weight != defaults.teacher_weight:
        raise PeftcoreError(
            f"--teacher-weight {run_options.teacher_weight:g} has no effect without --teacher. Pass a teacher, or "
            "remove --teacher-weight"
        )
    if run_options.epochs <= 0 or (run_options.lr is not None and run_options.lr <= 0):
        raise PeftcoreError(f"--lr and --epochs must be above 0, found {run_options.lr} and {run_options.epochs:g}")
    if run_options.eval_data is None:
        holdout.check(run_options.holdout)
    if run_options.streaming:
        _check_streaming(run_options)


def _refuse_options_of_others(run_options: RunOptions, task: Task) -> None:
    defaults = RunOptions()
    for name in dict.fromkeys(name for any_task in registered.tasks() for name in any_task.options):
        if name not in task.options and getattr(run_options, name) != getattr(defaults, name):
            option, names = f"--{name.replace('_', '-')}", registered.names_with_option(name)
            raise PeftcoreError(f"{option} only works with {names} (the task is {task.name}). Remove {option}")


def _check_beta(run_options: RunOptions, task: Task) -> None:
    smallest_beta = task.least_beta
    if run_options.beta is None or (smallest_beta is not None and run_options.beta >= smallest_beta):
        return
    betas = {any_task.name: any_task.least_beta for any_task in registered.tasks() if any_task.least_beta is not None}
    zero = registered.join_names([name for name, smallest_beta in betas.items() if smallest_beta == 0])
    raise PeftcoreError(
        f"--beta only works with {registered.join_names([*betas])} and must be above 0 ({zero} also allows 0), found "
        f"{run_options.beta:g} for {task.name}. Remove --beta, or pass a number above 0"
    )


def _check_streaming(run_options: RunOptions) -> None:
    """Raise a PeftcoreError for options that do not work with --streaming."""
    if run_options.pack:
        raise PeftcoreError(
            "--pack needs the lengths of all examples, which --streaming does not know. Remove one of the options"
        )
    if run_options.eval_data is None and run_options.holdout < 1:
        raise PeftcoreError(
            "--streaming needs --holdout as a number, because evaluating a fraction of large data takes long. Pass "
            "--holdout 500, or --eval-data FILE"
        )
