"""Finished call of a model, on which a method's loss can depend: its arguments, its output, and a teacher's output."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any


class FinishedCall(Mapping[str, Any]):
    """Arguments of a finished call of the model by name, read-only, as `Method.call_loss` gets them.

    Arguments that were not passed are missing, as are defaults. Arguments that only adapters take are included.

    Attributes:
        output: what the model returned, with gradients.
        state: values that adapters left in `current_call().state`, with gradients.
    """

    def __init__(
        self, values: Mapping[str, Any], output: Any, state: Mapping[Hashable, Any], run_base: Callable[[], Any]
    ) -> None:
        self.output = output
        self.state = state
        self._values = values
        self._run_base = run_base
        self._of_base: tuple[Any, ...] = ()

    def teacher(self) -> Any:
        """Return what the model returns for the same arguments without adapters, without gradients.

        The first request calls the model, in evaluation mode and inside `disabled`; later ones return the same object.

        Raises:
            PeftcoreError: the call got a cache, to which a second call would append.
        """
        if not self._of_base:
            self._of_base = (self._run_base(),)
        return self._of_base[0]

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)
