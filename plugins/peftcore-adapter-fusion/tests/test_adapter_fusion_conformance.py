"""It passes the conformance suite, on a model with two bottlenecks."""

import matrix
import tiny
from peftcore_adapter_fusion import AdapterFusionConfig
from torch import nn

import peftcore
from peftcore.testing import IDENTITY, MERGE, check_method, disturb

NAMES = ("reviews", "tweets")
EXCUSED = {
    IDENTITY: "its adapters act at once",
    MERGE: "its adapters are no change of a weight",
    "a quantized base (NF4)": "quantize comes before its adapters; so it is in its tests",
}


def fused() -> nn.Module:
    model = tiny.llama()
    for seed, name in enumerate(NAMES):
        peftcore.apply(model, "adapter", bottleneck_size=4, placement="pfeiffer", adapter=name)
        disturb(model, name, seed, std=0.5)
        peftcore.engine.set_trainable(model, name, False)
    peftcore.activate(model, [])
    return model


def test_conformance() -> None:
    matrix.check(check_method(AdapterFusionConfig(NAMES), families=[fused], not_applicable=EXCUSED))
