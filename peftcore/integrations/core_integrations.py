"""The integrations of the core, which go through the hook of packages that add integrations.

transformers            `pretrained`: `save_pretrained`; `adapter_methods`: `load_adapter` and others, `from_pretrained`
transformers.trainer    `trainer`: `Trainer` and its subclasses; `peft_config=` of TRL
transformers' Llama 4   an attribute of its language model's output that its forward reads
accelerate              `accelerate`: keeps adapters in memory when it offloads a model
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
AT_IMPORT = ("trainer", "adapter-methods", "auto-classes", "pipelines", "diffusers-calls", "llama4")


# Integrations whose module patches their library when it is imported: (name, library, module of this package).
_BY_IMPORT = (
    ("pretrained", "transformers.modeling_utils", "pretrained"),
    ("trainer", "transformers.trainer", "trainer"),
    ("adapter-methods", "transformers.integrations.peft", "adapter_methods"),
    ("accelerate", "accelerate.big_modeling", "accelerate"),
    ("peft", "peft", "peft"),
    ("diffusers-calls", "diffusers.pipelines.pipeline_utils", "diffusers_calls"),
)
# Modules of transformers whose functions find adapters: (name, module).
_FINDING = (("auto-classes", "transformers.models.auto.auto_factory"), ("pipelines", "transformers.pipelines"))


def _module(name: str) -> Any:
    return import_module(f"peftcore.integrations.{name}")


def _patch_model(name: str, model: Any) -> None:
    _module(name).patch_model(model)


def _find_adapters(module: str) -> None:
    _module("adapter_methods").find_adapters(module)


def _give_image_outputs() -> None:
    """Let Llama 4 run: in transformers 5.24 its forward reads `image_outputs` of an output that has no such field."""
    output = import_module("transformers.modeling_outputs").MoeCausalLMOutputWithPast
    if not hasattr(output, "image_outputs"):
        output.image_outputs = None


@hookimpl
def peftcore_integrations() -> list[Integration]:
    """Return the integrations of the core."""
    return [
        *(
            Integration(name=name, library=library, on_import=partial(_module, module))
            for name, library, module in _BY_IMPORT
        ),
        *(
            Integration(name=name, library=module, on_import=partial(_find_adapters, module))
            for name, module in _FINDING
        ),
        Integration(name="llama4", library="transformers.models.llama4.modeling_llama4", on_import=_give_image_outputs),
        Integration(
            name="diffusers",
            library="diffusers.pipelines.pipeline_utils",
            on_import=partial(_module, "diffusers_pipelines"),
            on_apply=partial(_patch_model, "diffusers"),
        ),
        Integration(
            name="sentence-transformers",
            library="sentence_transformers",
            on_apply=partial(_patch_model, "sentence_transformers"),
        ),
    ]
