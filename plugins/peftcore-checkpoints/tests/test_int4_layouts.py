"""int4 weights of GPTQ, AutoAWQ and compressed-tensors, read from their tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from int4_checkpoints import Values, awq, compressed, config, gptq, values
from peftcore_checkpoints.int4 import Int4Weight
from torch import Tensor

import peftcore
from peftcore.quantization.checkpoint_layouts import find_layout, pack_empty

GROUPS = (32, 96)  # of 96 inputs


def read(tensors: dict[str, Tensor], settings: dict[str, Any]) -> Int4Weight:
    layout = find_layout(settings, "folder")
    assert layout is not None and tensors.keys() <= {*layout.parts}
    return layout.read(tensors, "layer")


CASES: dict[str, tuple[Callable[[Values], dict[str, Tensor]], dict[str, Any], dict[str, Any]]] = {
    "gptq": (gptq, {}, {"smallest": 1}),
    "gptq, symmetric": (gptq, {"sym": True}, {"symmetric": True}),
    "gptq, zeros of 0": (gptq, {"meta": {"quantizer": ["gptqmodel:4.0.0"]}}, {}),
    "gptq_v2": (lambda found: gptq(found, version=2), {"checkpoint_format": "gptq_v2"}, {}),
    "gptq, act-order": (
        lambda found: gptq(found, act_order=True),
        {"desc_act": True},
        {"smallest": 1, "act_order": True},
    ),
    "awq": (awq, {}, {}),
    "compressed-tensors": (compressed, {}, {}),
    "compressed-tensors, symmetric": (
        lambda found: compressed(found, symmetric=True),
        {"weights": {"symmetric": True}},
        {"symmetric": True, "dtype": torch.bfloat16},
    ),
    "compressed-tensors, act-order": (
        lambda found: compressed(found, act_order=True),
        {"weights": {"actorder": "group"}},
        {"act_order": True},
    ),
}


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_the_layout(case: str, group: int) -> None:
    write, changes, options = CASES[case]
    weight_values = values(40, 96, group, **options)
    kind = case.partition(",")[0].removesuffix("_v2")
    weight = read(write(weight_values), config(kind, group if group < 96 else -1, **changes))
    assert torch.equal(weight.values(torch.float64), weight_values.dense())
    assert (weight.shape, weight.group, weight.scales.dtype) == ((40, 96), group, weight_values.scales.dtype)
    assert torch.equal(weight.scales, weight_values.scales)
    assert (weight.zeros is None) == ("symmetric" in case)
    assert (weight.order is not None) == ("act-order" in case and group < 96)


def test_widths_that_are_no_whole_words() -> None:
    weight_values = values(36, 36, 36)
    weight = read(compressed(weight_values), config("compressed-tensors", -1, weights={"strategy": "channel"}))
    assert torch.equal(weight.values(torch.float64), weight_values.dense())


def test_zero_points_in_bytes() -> None:
    """As compressed-tensors before 0.9 stores them."""
    weight_values = values(40, 96, 32)
    tensors = {
        **compressed(weight_values),
        "weight_zero_point": torch.from_numpy(weight_values.zeros - 8).to(torch.int8),
    }
    assert torch.equal(read(tensors, config("compressed-tensors", 32)).values(torch.float64), weight_values.dense())


def test_an_order_that_is_none() -> None:
    weight_values = values(40, 96, 32, smallest=1)
    assert read(gptq(weight_values, act_order=True), config("gptq", 32)).order is None
    tensors = {**compressed(weight_values), "weight_g_idx": torch.full((96,), -1, dtype=torch.int32)}
    weight = read(tensors, config("compressed-tensors", 32))
    assert weight.order is None and torch.equal(weight.values(torch.float64), weight_values.dense())


def test_the_tensors_of_a_checkpoint_are_not_changed() -> None:
    for write, settings in ((gptq, config("gptq", 32)), (awq, config("awq", 32))):
        tensors = write(values(40, 96, 32, smallest=1))
        before = {name: t.clone() for name, t in tensors.items()}
        read(tensors, settings)
        assert all(torch.equal(tensors[name], t) for name, t in before.items())
    tensors = compressed(values(40, 96, 32))
    packed = tensors["weight_packed"].clone()
    read(tensors, config("compressed-tensors", 32))
    assert torch.equal(tensors["weight_packed"], packed)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (config("gptq", 32, bits=3), "'folder' is quantized with GPTQ in 3 bits, but only 4 bits can be read. Use a"),
        (config("gptq", 32, checkpoint_format="marlin"), "with GPTQ in format 'marlin', but only .* Save it"),
        (config("gptq", 32, is_marlin_format=True), "in format 'marlin'"),
        (config("gptq", 32, dynamic={"-:lm_head": {}, "+:.*down.*": {"bits": 8}}), "in 8 bits for layers '.*down"),
        (config("gptq", 0), "group_size=0 in its config"),
        (config("gptq", 32, pack_dtype="int16"), "GPTQ in words of 'int16'"),
        (config("awq", 32, bits=8), "AWQ in 8 bits"),
        (config("awq", 32, version="gemv"), "AWQ in the version 'gemv', but only the version 'gemm' can be read"),
        (config("awq", 32, backend="llm-awq"), "AWQ in the version 'llm-awq'"),
        (config("compressed-tensors", 32, format="marlin-24"), "in the format 'marlin-24'"),
        (config("compressed-tensors", 32, weights={"num_bits": 8}), "with weights of int8 per group in 'group_0'"),
        (config("compressed-tensors", 32, weights={"strategy": "tensor"}), "int4 per tensor"),
        (config("compressed-tensors", 32, scheme={"input_activations": {"num_bits": 8}}), "with quantized inputs"),
        ({**(mixed := config("compressed-tensors", 32)), "config_groups": {
            **mixed["config_groups"], "group_1": {"weights": {"num_bits": 4, "strategy": "channel"}}}},
         "with symmetric and asymmetric groups, but only groups of one kind"),
        (config("compressed-tensors", 32, transform_config={"config_groups": {"a": 1}}), "with transforms"),
        (config("compressed-tensors", 32, sparsity_config={"format": "sparse-bitmask"}), r"sparse weights \('sparse"),
        (config("compressed-tensors", 32, config_groups={"W4A16": ["Linear"]}), r"W4A16=\['Linear'\] in its config"),
        (config("compressed-tensors", 32, config_groups=["W4A16"]), "config_groups=.*, expected an object"),
        (config("gptq", 32, dynamic=["-:lm_head"]), r"dynamic=\['-:lm_head'\] in its config, expected an object"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "config_groups": {"g": {"weights": "int4"}}},
         "'folder' has weights='int4' in its config, expected an object"),
    ],
)  # fmt: skip
def test_layouts_that_are_not_read(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(peftcore.PeftcoreError, match=message):
        find_layout(settings, "folder")


def test_other_formats_have_no_layout() -> None:
    assert find_layout({"quant_method": "bitsandbytes"}, "folder") is None


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("gptq", lambda t: t.pop("qzeros"), "the int4 weight 'layer' lacks 'layer.qzeros'"),
        ("gptq", lambda t: t.update(qweight=t["qweight"].float()), r"'qweight' torch.float32 .* expected torch.int32"),
        ("gptq", lambda t: t.update(qzeros=t["qzeros"][:-1]), r"'qzeros' .* \[2, 5\], expected torch.int32 \[3, 5\]"),
        ("gptq", lambda t: t["scales"][0, 0].fill_(float("nan")), "NaN or Inf in 'scales'"),
        ("gptq", lambda t: t.update(g_idx=torch.zeros(96, dtype=torch.int32)), "whose 3 groups do not have 32 inputs"),
        (
            "compressed-tensors",
            lambda t: t.update(weight_shape=torch.full((2,), float("nan"))),
            r"'weight_shape' torch.float32 \[2\], expected torch.int64 \[2\]",
        ),
        ("gptq", lambda t: t.update(g_idx=torch.zeros(5, dtype=torch.int32)), r"has g_idx torch.int32 \[5\]"),
        ("gptq", lambda t: t.update(qzeros=-torch.ones_like(t["qzeros"])), "zero points of 15 in format 'gptq'"),
        ("gptq", lambda t: t.update({k: t[k][:2] for k in ("qzeros", "scales")}), "2 groups for 96 inputs, but"),
        ("awq", lambda t: t.update(scales=t["scales"].int()), "'scales' torch.int32, expected float32, float16 or"),
        ("awq", lambda t: t.update(qweight=t["qweight"][0]), r"has 'qweight' of shape \[5\]"),
        ("compressed-tensors", lambda t: t.pop("weight_zero_point"), "lacks 'weight_zero_point', but the config says"),
        ("compressed-tensors", lambda t: t.update(weight_shape=torch.tensor([40, 88])), "expected .*40, 11"),
        (
            "compressed-tensors",
            lambda t: t.update(weight_zero_point=torch.full((40, 3), 9, dtype=torch.int8)),
            "values of 'weight_zero_point' outside -8..7",
        ),
    ],
)  # fmt: skip
def test_damaged_weights_are_refused(kind: str, change: Callable[[dict[str, Tensor]], Any], message: str) -> None:
    write = {"gptq": gptq, "awq": awq, "compressed-tensors": compressed}[kind]
    tensors = write(values(40, 96, 32, smallest=1))
    change(tensors)
    with pytest.raises(peftcore.CheckpointError, match=message):
        read(tensors, config(kind, 32))


@pytest.mark.parametrize(
    ("settings", "blocksize", "has_zeros"),
    [
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, 64, False),
        ({"quant_method": "awq", "bits": 4, "q_group_size": 32}, 32, True),
    ],
)
def test_empty_weights_of_a_config_without_groups_or_with_awqs_name_of_them(
    settings: dict[str, Any], blocksize: int, has_zeros: bool
) -> None:
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(64, 128))
    layout = find_layout(settings, "folder")
    assert layout is not None
    pack_empty(model, layout)
    packed = model[0].packed
    assert packed.shape == (128, 64) and packed.blocksize == blocksize
    assert packed.absmax.numel() == 128 * 64 // blocksize and (packed.zeros is not None) == has_zeros
