"""Weight format of AQLM (Egiazarian et al. 2024, arXiv 2401.06118): blocks of W are sums of codebook entries.

    W[block of out_group x in_group] = s[out group] · Σ_c codebook_c[code_c[block]]

For each layer X a checkpoint has

    X.codes        int8 or int16 [out / out_group, in / in_group, codebooks], modulo 2^bits
    X.codebooks    [codebooks, 2^bits, out_group, in_group]
    X.scales       [out / out_group, 1, 1, 1]

They stay in memory in this form. Forward and backward each dequantize the layer's weight.
"""

from __future__ import annotations

from peftcore.plugin import WeightFormat, hookimpl, when_imported
from peftcore_aqlm.layer import (
    AqlmLinear as AqlmLinear,
    decode,
    dequantize as dequantize,
    has_codes,
    read,
    to_linear,
    write,
)

peftcore_api = ">=3.1,<4"


def _register() -> None:
    from peftcore_aqlm import checkpoints

    checkpoints.register()


def _update_config(model: object) -> None:
    from peftcore_aqlm import checkpoints

    checkpoints.update_config(model)


@hookimpl
def peftcore_weight_formats() -> list[WeightFormat]:
    return [WeightFormat("aqlm", has_codes, read, write, decode=decode, plain=to_linear, update_config=_update_config)]


# Only where transformers is used: importing it here would slow down every start of peftcore.
when_imported("transformers.quantizers.auto", _register)
