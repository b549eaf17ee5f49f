"""The integrations of the core, which go through the hook of packages that add integrations.

transformers            `saving`: `save_pretrained` writes adapters
transformers.trainer    `trainer`: `Trainer.__init__` and `Trainer.train` give a trainer the mixin for adapters
accelerate              `accelerate`: keeps adapters in memory when it offloads a model, where they would not train
peft                    `peft`: refuses a model with adapters, whose tensors it would save as its own
diffusers               `diffusers`: refuses calls that would ignore adapters, and `save_pretrained`
sentence_transformers   `saving`: refuses to save what it could not load
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

from peftcore.plugin.extensions import Integration
from peftcore.plugin.hooks import hookimpl

if TYPE_CHECKING:
    from torch import nn


def _import(module: str) -> None:
    import_module(f"peftcore.training.integrations.{module}")


def _call(module: str, function: str, *args: nn.Module) -> None:
    getattr(import_module(f"peftcore.training.integrations.{module}"), function)(*args)


@hookimpl
def peftcore_integrations() -> list[Integration]:
    """Return the integrations of the core."""
    return [
        Integration(
            name="transformers", library="transformers", on_apply=partial(_call, "saving", "patch_transformers")
        ),
        Integration(name="trainer", library="transformers.trainer", on_import=partial(_import, "trainer")),
        Integration(name="accelerate", library="accelerate.big_modeling", on_import=partial(_import, "accelerate")),
        Integration(name="peft", library="peft", on_import=partial(_import, "peft")),
        Integration(name="diffusers", library="diffusers", on_apply=partial(_call, "diffusers", "patch_model")),
        Integration(
            name="pipelines",
            library="diffusers.pipelines.pipeline_utils",
            on_import=partial(_call, "diffusers", "patch_pipelines"),
        ),
        Integration(
            name="sentence-transformers",
            library="sentence_transformers",
            on_apply=partial(_call, "saving", "patch_sentence_transformers"),
        ),
    ]
