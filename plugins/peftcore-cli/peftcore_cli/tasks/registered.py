"""Registry of tasks: built-in tasks and tasks of plugins, from the hook `peftcore_tasks`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftcore.errors import PeftcoreError
from peftcore.plugin import builtin, offered
from peftcore_cli import core_tasks

if TYPE_CHECKING:
    from peftcore_cli.tasks.task import Task

builtin(core_tasks)


def tasks() -> list[Task]:
    """Return all tasks, built-in tasks first.

    The first task is the fallback for rows that no other task recognises.
    """
    from peftcore_cli.tasks.task import Task

    return list(offered("peftcore_tasks", Task).values())


def find(name: str) -> Task:
    """Return the task of this name.

    Raises:
        PeftcoreError: there is no such task.
    """
    tasks_by_name = {task.name: task for task in tasks()}
    if name not in tasks_by_name:
        raise PeftcoreError(f"--task must be one of {', '.join(tasks_by_name)}, found '{name}'")
    return tasks_by_name[name]


def names_with(attribute: str) -> str:
    """Return the names of the tasks whose attribute is true, for messages."""
    return join_names([task.name for task in tasks() if getattr(task, attribute)])


def names_with_option(name: str) -> str:
    """Return the names of the tasks that take an option, for messages."""
    return join_names([task.name for task in tasks() if name in task.options])


def join_names(names: list[str]) -> str:
    """Format names as `a, b and c`."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def default_name(labels: object = ()) -> str:
    """Return the default task: classification if there are labels, otherwise causal-lm."""
    return "classification" if labels else "causal-lm"
