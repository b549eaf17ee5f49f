"""Other libraries are taught of adapters when the first one is applied to a model of theirs, or is already there when
they are imported. Who never does either pays for none of them.

    transformers            `pretrained`: `save_pretrained`
    transformers.trainer    `transformers`: `Trainer`, and what is made of it
    peft                    `peft`: refuses a model with adapters
    diffusers               `diffusers`, `diffusers_pipelines`: refuse what would pass adapters over
"""

from __future__ import annotations

import sys
from functools import partial
from importlib import import_module
from typing import Any

from peftcore.events import adapter_applied
from peftcore.integrations.late_import import when_imported

_PATCHES = {  # by the module of others that each teaches
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
