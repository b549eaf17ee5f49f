"""`--report-to`: services that receive Trainer's log, such as tensorboard and wandb."""

from __future__ import annotations

from peftcore.errors import PeftcoreError, nearest


def services(text: str | None) -> list[str]:
    """Split service names at commas.

    Raises:
        PeftcoreError: transformers does not know a service, or its library is not installed.
    """
    from transformers.integrations import integration_utils

    names = [part.strip() for part in (text or "").split(",") if part.strip() not in ("", "none")]
    callbacks = integration_utils.INTEGRATION_TO_CALLBACK
    for name in names:
        if name not in callbacks:
            raise PeftcoreError(
                f"--report-to must name installed services, found '{name}'{nearest(name, callbacks)}. Choose from "
                f"{', '.join(callbacks)}"
            )
        try:
            callbacks[name]()  # before a model is loaded
        except (RuntimeError, ImportError) as error:
            raise PeftcoreError(f"--report-to {name}: {' '.join(str(error).split())}") from error
    return names
