"""Groups of options in the help of commands with many options.

`--help` shows the most used options, which have no group. `--help-all` shows all options. The group of an option is its
`rich_help_panel`. A command with few options shows them in a single list.
"""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

from peftcore_cli import console

DATA = "Data"
MODEL = "Model"
TASK = "Task"
TRAINING = "Training"
EVALUATION = "Evaluation"
MEMORY = "Memory and speed"
OUTPUT = "Output"

_ORDER = (None, DATA, MODEL, TASK, TRAINING, EVALUATION, MEMORY, OUTPUT)
_ALL = "--help-all"
_FEW = 12  # maximum number of options in a single list


class GroupedCommand(TyperCommand):
    """Command whose `--help` hides options with a group, which `--help-all` shows."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._grouped_options: list[Any] = [param for param in self.params if getattr(param, "rich_help_panel", None)]
        self._shows_all = False
        if len(self.params) > _FEW:
            self.params.sort(key=lambda param: _ORDER.index(getattr(param, "rich_help_panel", None)))
            self.context_settings = {**self.context_settings, "help_option_names": ["--help", _ALL]}
            return
        for option in self._grouped_options:
            option.rich_help_panel = None
        self._grouped_options = []

    def get_help_option_names(self, ctx: Any) -> list[str]:
        return sorted(super().get_help_option_names(ctx))  # click stores the names in a set

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        self._shows_all = _ALL in args
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        if self._shows_all or not self._grouped_options:
            super().format_help(ctx, formatter)
            return
        for option in self._grouped_options:  # hidden only while the help is printed, so that the shell completes them
            option.hidden = True
        super().format_help(ctx, formatter)
        for option in self._grouped_options:
            option.hidden = False
        console.say(f" {len(self._grouped_options)} more options: peftcore {ctx.info_name} {_ALL}\n")
