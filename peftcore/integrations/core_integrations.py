"""The integrations of the core, which go through the hook of packages that add integrations.

transformers            `pretrained`: `save_pretrained`; `adapter_methods`: `load_adapter` and others, `from_pretrained`
transformers.trainer    `transformers`: `Trainer` and its subclasses; `peft_config=` of TRL
peft                    `peft`: refuses a model with adapters
diffusers               `diffusers`, `diffusers_pipelines`: refuse calls that would ignore adapters
                        `diffusers_calls`: `load_lora_weights` and others, where PEFT is not installed
sentence_transformers   `sentence_transformers`: refuses to save what it could not load
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

from peftcore.extensions import Integration
from peftcore.hookspecs import hookimpl

# Integrations that also concern models without adapters: they run when `library` is imported, before any `apply`.
AT_IMPORT = ("trainer", "adapter-methods", "auto-classes", "pipelines", "diffusers-calls")


def _patch_diffusers(model: Any) -> None:
    import_module("peftcore.integrations.diffusers").patch_model(model)


def _find_adapters(module: str) -> None:
    import_module("peftcore.integrations.adapter_methods").find_adapters(module)


def _patch_sentence_transformers(model: Any) -> None:
    import_module("peftcore.integrations.sentence_transformers").patch_model(model)


@hookimpl
def peftcore_integrations() -> list[Integration]:
    """Return the integrations of the core. The modules patch their library when they are imported."""
    return [
        Integration(
            name="transformers",
            library="transformers.modeling_utils",
            on_import=partial(import_module, "peftcore.integrations.pretrained"),
        ),
        Integration(
            name="trainer",
            library="transformers.trainer",
            on_import=partial(import_module, "peftcore.integrations.transformers"),
        ),
        Integration(
            name="adapter-methods",
            library="transformers.integrations.peft",
            on_import=partial(import_module, "peftcore.integrations.adapter_methods"),
        ),
        Integration(
            name="auto-classes",
            library="transformers.models.auto.auto_factory",
            on_import=partial(_find_adapters, "transformers.models.auto.auto_factory"),
        ),
        Integration(
            name="pipelines",
            library="transformers.pipelines",
            on_import=partial(_find_adapters, "transformers.pipelines"),
        ),
        Integration(name="peft", library="peft", on_import=partial(import_module, "peftcore.integrations.peft")),
        Integration(
            name="diffusers-calls",
            library="diffusers.pipelines.pipeline_utils",
            on_import=partial(import_module, "peftcore.integrations.diffusers_calls"),
        ),
        Integration(
            name="diffusers",
            library="diffusers.pipelines.pipeline_utils",
            on_import=partial(import_module, "peftcore.integrations.diffusers_pipelines"),
            on_apply=_patch_diffusers,
        ),
        Integration(
            name="sentence-transformers", library="sentence_transformers", on_apply=_patch_sentence_transformers
        ),
    ]
