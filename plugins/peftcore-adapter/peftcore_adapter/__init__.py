"""Bottleneck adapters: f(x) = U · act(D x + d) + u, with narrow D and U, parallel to or after a frozen sublayer F.

    series (Houlsby et al. 2019)      series, after the norm            parallel (He et al. 2021)
                                      (Pfeiffer et al. 2020)
        x                                 x                                 x
        |                                 |                                 |
        F                                 F                                 |------.
        | h                               | h                               F      f
        |------.                          |---- + x, norm --- f             | h    | · scaling
        |      f                          |                   |            (+)-----'
       (+)-----' · scaling               (+)------------------' · scaling   |
        |                                 |                                 |
     + x, norm                         + x, norm                         + x, norm

arXiv 1902.00751, 2005.00247, 2110.04366. U and u are zero at the start, which leaves the model unchanged. Each f has
2 · d · bottleneck + d + bottleneck trained numbers. It cannot be merged, since act is not linear. Variants: D and U can
be sums of Kronecker products (Compacter, `phm`); f can be added after the norm (AdapterPlus, Steitz and Roth 2024,
arXiv 2406.06820: `original_ln_after=False`, a scale per channel); the embedding can have an invertible adapter (MAD-X,
`invertible`).
"""

from __future__ import annotations

from peftcore.plugin import Method, StateRules, hookimpl
from peftcore_adapter import hub
from peftcore_adapter.bottleneck import AfterNorm, Bottleneck, Series, after_norm
from peftcore_adapter.config import ACTIVATIONS, AdapterConfig
from peftcore_adapter.placing import place

peftcore_api = ">=3.0,<4"

__all__ = ["ACTIVATIONS", "AdapterConfig", "AfterNorm", "Bottleneck", "Series", "after_norm", "peftcore_methods"]


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(peft_type="BOTTLENECK_ADAPTER", formats=(hub.FORMAT,))
    return [Method("adapter", AdapterConfig, place, rules, learning_rate=3e-3)]
