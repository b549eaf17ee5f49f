"""The method passes the conformance suite, on models with three experts."""

from dataclasses import replace

from peftcore_arrow import ArrowConfig
from support import matrix
from torch import nn

import peftcore
from peftcore import testing
from peftcore.plugin import IDENTITY, MERGE, disturb

EXPERTS = ("maths", "code", "poems")
EXCUSED = {
    IDENTITY: "the experts act at once",
    MERGE: "each token has its own mixture of experts",
    "Qwen3-MoE: no layer is left out without a warning": "its experts are of the other layers here",
}


def experts(model: nn.Module) -> None:
    """LoRA of all linear layers; those of routed experts, which are no layers but slices, stay as they are."""
    routed = any(path.endswith("experts") for path, _ in model.named_modules())
    fields = {"exclude_modules": ".*experts"} if routed else {}
    for seed, name in enumerate(EXPERTS):
        peftcore.apply(model, "lora", r=2, adapter=name, modules_to_save=[], **fields)
        disturb(model, name, seed, std=0.1)
        peftcore.engine.set_trainable(model, name, False)
    peftcore.activate(model, [])


FAMILIES = [replace(family, before=experts) for family in testing.FAMILIES.values()]


def test_conformance() -> None:
    config = ArrowConfig(experts=EXPERTS, top_k=2, rng_seed=0)
    matrix.conformance(config, families=FAMILIES, not_applicable=EXCUSED)
