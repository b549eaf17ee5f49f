"""The values of codes are bitsandbytes', and the quantiles of a normal."""

import statistics

import pytest
import torch

from peftcore import ops


def test_codebooks_are_bitsandbytes(bnb):
    assert torch.equal(ops.NF4, bnb.get_4bit_type("nf4", "cpu"))
    assert torch.equal(ops.FP4, bnb.get_4bit_type("fp4", "cpu"))
    assert torch.equal(ops.DYNAMIC8, bnb.create_dynamic_map())
    assert (ops.DYNAMIC8 < 0).sum() == 127 and ops.DYNAMIC8[127] == 0 and (ops.DYNAMIC8 > 0).sum() == 128


def test_nf4_is_the_normals_quantiles():
    quantile = statistics.NormalDist().inv_cdf
    first, middle = 0.9677083, 0.5  # of the outermost points; QLoRA, appendix E
    positive = [quantile(first + (middle - first) * i / 8) for i in range(8)]
    negative = [-quantile(first + (middle - first) * i / 7) for i in range(7)]
    wanted = torch.tensor(sorted([0.0, *positive, *negative]), dtype=torch.float64) / max(positive)
    assert (ops.NF4.double() - wanted).abs().max() < 3e-7


def test_codebook_by_name_is_a_copy():
    ops.codebook("nf4").zero_()
    assert ops.codebook("nf4")[0] == -1
    with pytest.raises(ValueError, match=r"unknown codebook 'nf5'.*nf4, fp4, mxfp4, nvfp4, affine4, dynamic8, e4m3"):
        ops.codebook("nf5")


def test_e4m3_has_the_values_of_the_specification():
    """Sign, four bits of exponent with bias 7, three of mantissa; the codes of NaN would be 480."""
    wanted = [2.0**-9 * m if e == 0 else 2.0 ** (e - 7) * (1 + m / 8) for e in range(16) for m in range(8)]
    assert ops.codebook("e4m3")[:128].tolist() == wanted
    assert (-ops.codebook("e4m3")[128:]).tolist() == wanted
