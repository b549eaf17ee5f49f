"""Patches for other libraries, applied when the first adapter is applied to one of their models.

If a library is imported later, it is patched on import. Without adapters nothing is patched.

    transformers            `pretrained`: `save_pretrained`
    transformers.trainer    `transformers`: `Trainer` and its subclasses
    peft                    `peft`: refuses a model with adapters
    diffusers               `diffusers`, `diffusers_pipelines`: refuse calls that would ignore adapters
"""

from __future__ import annotations

import sys
from functools import partial
from importlib import import_module
from typing import Any

from peftcore.events import adapter_applied
from peftcore.integrations.late_import import when_imported

_PATCHES = {  # by the module that each patches
    "transformers": "peftcore.integrations.pretrained",
    "transformers.trainer": "peftcore.integrations.transformers",
    "peft": "peftcore.integrations.peft",
    "diffusers.pipelines.pipeline_utils": "peftcore.integrations.diffusers_pipelines",
}


def _patch(model: Any) -> None:
    if "transformers" in sys.modules and hasattr(model, "save_pretrained"):
        for theirs, ours in _PATCHES.items():
            when_imported(theirs, partial(import_module, ours))
    if any(cls.__module__.startswith("diffusers.") for cls in type(model).__mro__):
        import_module("peftcore.integrations.diffusers").patch_model(model)


adapter_applied.subscribe(_patch)
