"""It passes the conformance suite, on a model with three experts."""

import matrix
import tiny
from peftcore_arrow import ArrowConfig
from torch import nn

import peftcore
from peftcore.testing import IDENTITY, MERGE, check_method, disturb

EXPERTS = ("maths", "code", "poems")
EXCUSED = {
    IDENTITY: "the experts act at once",
    MERGE: "each token has its own mixture of experts",
    "a quantized base (NF4)": "quantize comes before the experts; so it is in its tests",
}


def experts() -> nn.Module:
    model = tiny.llama()
    for seed, name in enumerate(EXPERTS):
        peftcore.apply(model, "lora", r=2, target_modules=["down_proj"], adapter=name)
        disturb(model, name, seed, std=0.5)
        peftcore.engine.set_trainable(model, name, False)
    peftcore.activate(model, [])
    return model


def test_conformance() -> None:
    config = ArrowConfig(experts=EXPERTS, top_k=2, rng_seed=0)
    matrix.check(check_method(config, families=[experts], not_applicable=EXCUSED))
