"""`Train`: parameters of the base are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftcore.plugin.peft_keys import key_in_model
from peftcore.plugin.placements.placement import Placement

if TYPE_CHECKING:
    from peftcore.plugin.placements.placement import Attachments


@dataclass(frozen=True)
class Train(Placement):
    """Placement that trains parameters of the base directly. `remove` restores their original values.

    Args:
        names: full names of the parameters.
        saved: only used in `tensor_name`: whether the tensor belongs to `modules_to_save` and was not selected by the
            method.
    """

    names: Sequence[str]
    saved: bool = False
    has_adapter = False

    def attach(self, to: Attachments) -> None:
        to.train(self.names)

    def tensor_name(self, name: str) -> str:
        """Return the name on disk of the parameter `name`."""
        return key_in_model("", name)
