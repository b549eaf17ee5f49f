"""`--optim-args` of Trainer's optimizers and of peftcore's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peftcore_cli.settings import Settings
from peftcore_cli.training import optim_options, trainer_arguments

from peftcore import PeftcoreError
from peftcore.training.integrations.trainer_optimizer import optimizer_of


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (None, {"optim_args": None}),
        ("budget=256MB,page_bytes=65536", {"optim_args": "budget=256MB,page_bytes=65536"}),
        (
            "betas=(0.9, 0.95),eps=1e-5",
            {"optim_args": None, "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-5},
        ),
        ("rank=4, betas=(0.8,0.9)", {"optim_args": "rank=4", "adam_beta1": 0.8, "adam_beta2": 0.9}),
    ],
)
def test_trainers_own_arguments_are_separated(given: str | None, found: dict[str, Any]) -> None:
    assert optim_options.arguments(given) == found


@pytest.mark.parametrize("given", ["betas", "betas=0.9", "betas=(0.9,x)", "eps=small"])
def test_wrong_values_are_refused(given: str) -> None:
    with pytest.raises(PeftcoreError, match="--optim-args"):
        optim_options.arguments(given)


def test_betas_reach_the_optimizers(tmp_path: Path) -> None:
    from transformers import Trainer

    for optim in ("adamw_torch", "paged_adamw_8bit"):
        settings = Settings(
            "m", "d", "causal-lm", "lora", optim=optim, optim_args="betas=(0.8,0.95),eps=1e-5", device="cpu"
        )
        args = trainer_arguments.of_run(settings, tmp_path, 4)
        _, options = optimizer_of(args) or Trainer.get_optimizer_cls_and_kwargs(args)
        assert options["betas"] == (0.8, 0.95) and options["eps"] == 1e-5
