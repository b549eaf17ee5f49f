"""`--report-to`: Trainer's log in a service."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.commands import Run

METHOD = ("--method", "lora", "--set", "r=4", "--set", "lora_alpha=8")
STEPS = ("--steps", 6, "--batch-size", 4, "--lr", "0.02", "--eval-every", 3)


def test_the_log_goes_to_a_service_too(
    run: Run, llama: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import TrainerCallback
    from transformers.integrations import integration_utils

    logged: list[dict[str, float]] = []

    class Service(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            logged.append({"step": state.global_step, **logs})

    def gone() -> None:
        raise RuntimeError("it requires wandb to be installed.\n  Run `pip install wandb`.")

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Service)
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", gone)
    arguments = ("train", "-m", llama, "-d", reviews, "-o", tmp_path / "run", *METHOD, *STEPS, "--report-to")
    assert "--report-to wandb: it requires wandb to be installed. Run" in run(*arguments, "wandb", code=1).output
    assert (
        "--report-to must name installed services, found 'wandbb' (nearest: 'wandb'"
        in run(*arguments, "wandbb", code=1).output
    )
    run(*arguments, "none,tensorboard")
    assert [entry["step"] for entry in logged if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert [entry["step"] for entry in logged if "eval_loss" in entry] == [3, 6]
