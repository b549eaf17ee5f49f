"""Weight format of AQLM (Egiazarian et al. 2024, arXiv 2401.06118): sums of entries of codebooks, times a scale.

    W[block of out_group x in_group] = s[out group] · Σ_c codebook_c[code_c[block]]

A checkpoint has `X.codes` int8 or int16 `[out / out_group, in / in_group, codebooks]`, whose integers stand for 0 to
2^bits - 1 modulo 2^bits, `X.codebooks` `[codebooks, 2^bits, out_group, in_group]` and `X.scales`
`[out / out_group, 1, 1, 1]`. Memory has them as they are on disk. A layer's weight is dequantized for each product, in
forward and in backward.
"""

from __future__ import annotations

from peftcore.plugin import WeightFormat, hookimpl, when_imported
from peftcore_aqlm.layer import (
    AqlmLinear as AqlmLinear,
    decode,
    dequantized as dequantized,
    matches,
    plain,
    read,
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
    return [WeightFormat("aqlm", matches, read, write, decode=decode, plain=plain, update_config=_update_config)]


when_imported("transformers.quantizers.auto", _register)
