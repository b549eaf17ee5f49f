"""LoRA (Hu et al. 2021, arXiv 2106.09685): y = W x + scale · B A x, with W frozen and A, B of rank r.

            y [out]
            |
           (+)----------------.
            |                 |  · scale = lora_alpha / r
      .-----+-----.       .---+---.
      |           |       |   B   |  [out, r], zero at the start
      |     W     |       '---+---'
      |  [out,in] |           |  [r]
      |  (frozen) |       .---+---.
      |           |       |   A   |  [r, in], random at the start
      '-----+-----'       '---+---'
            |                 |  dropout
            '--------+--------'
                  x [in]

Only r · (in + out) parameters are trained instead of in · out. Merging adds scale · B A to W, so inference costs
nothing extra.
"""

from __future__ import annotations

from peftcore.plugin import Method, hookimpl
from peftcore_lora.config import LoraConfig, config_for_ranks, is_computed
from peftcore_lora.files import RULES
from peftcore_lora.loftq import loftq_start
from peftcore_lora.placing import place
from peftcore_lora.replication import replicate_layers
from peftcore_lora.starts import initialize
from peftcore_lora.training import parameter_groups

peftcore_api = ">=3.4,<4"

__all__ = ["LoraConfig", "loftq_start", "peftcore_methods", "replicate_layers"]


@hookimpl
def peftcore_methods() -> list[Method]:
    return [
        Method(
            "lora",
            LoraConfig,
            place,
            RULES,
            initialize=initialize,
            initializes=is_computed,
            parameter_groups=parameter_groups,
            low_rank=config_for_ranks,
            learning_rate=1e-3,
        )
    ]
