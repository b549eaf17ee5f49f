"""The method passes the conformance suite, on models with two bottlenecks."""

from dataclasses import replace

from peftcore_adapter_fusion import AdapterFusionConfig
from support import matrix
from torch import nn

import peftcore
from peftcore import testing
from peftcore.plugin import IDENTITY, MERGE, disturb

NAMES = ("reviews", "tweets")
EXCUSED = {
    IDENTITY: "its adapters act at once",
    MERGE: "its adapters are not changes of a weight",
}


def fused(model: nn.Module) -> None:
    for seed, name in enumerate(NAMES):
        peftcore.apply(model, "adapter", bottleneck_size=4, placement="pfeiffer", adapter=name, modules_to_save=[])
        disturb(model, name, seed, std=0.5)
        peftcore.engine.set_trainable(model, name, False)
    peftcore.activate(model, [])


FAMILIES = [replace(family, before=fused) for family in testing.FAMILIES.values()]


def test_conformance() -> None:
    config = AdapterFusionConfig(NAMES, modules_to_save=())
    matrix.conformance(config, families=FAMILIES, not_applicable=EXCUSED)
