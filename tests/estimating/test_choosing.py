"""Ways that fit: the search compared with estimates of each way, and errors where nothing fits."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config, Gemma3Config, LlamaConfig

import peftcore
from peftcore.errors import PeftcoreError
from peftcore.estimating.devices import Device, usable

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIG = LlamaConfig(**SIZES, num_hidden_layers=4, vocab_size=320)
WIDE = {**SIZES, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 3}
ONE: dict[str, Any] = {
    "device": "t4",
    "methods": ("lora",),
    "fields": {"target_modules": ["q_proj"]},
    "max_ways": 1,
}  # few operators


@pytest.fixture(scope="module")
def found() -> peftcore.Suggestion:
    return peftcore.suggest(CONFIG, memory="600MB", length=32, r=(4,), **{**ONE, "max_ways": 2})


def test_ways_fit_with_the_largest_batch(found: peftcore.Suggestion) -> None:
    assert found.memory == pytest.approx(64e6) and found.ways
    for way in found.ways:
        again = peftcore.estimate(
            CONFIG,
            way.method,
            batch_size=way.batch_size,
            length=32,
            gradient_checkpointing=way.gradient_checkpointing,
            optimizer=way.optimizer,
            dtype=torch.bfloat16,
            device="t4",
            **way.fields,
        )
        assert again.parts == way.estimate.parts and again.needed == way.memory.high <= found.memory
        twice = peftcore.estimate(
            CONFIG,
            way.method,
            step=replace(way.estimate.step, batch_size=2 * way.batch_size),
            dtype=torch.bfloat16,
            device="t4",
            **way.fields,
        )
        assert way.batch_size == 64 or twice.needed > found.memory
    batches = [way.batch_size for way in found.ways]
    assert batches == sorted(set(batches)) and not found.ways[0].gradient_checkpointing
    assert f"--batch-size {found.ways[0].batch_size}" in str(found)
    assert "--set 'target_modules=[\"q_proj\"]'" in str(found)


def test_on_this_machine_the_process_is_a_range_with_its_libraries(found: peftcore.Suggestion) -> None:
    way = replace(found.ways[0], libraries=5e8)
    assert way.memory.low < way.memory.high == 5e8 + way.estimate.needed
    here = replace(found, ways=(way,), device=Device("this machine", 1e9))
    assert "including Python and its libraries:" in str(here) and str(way.memory) in str(here)


def test_a_dense_base_comes_before_one_in_4_bits() -> None:
    found = peftcore.suggest(CONFIG, ["qlora", "lora"], memory="600MB", length=32, device="t4")
    assert [way.method for way in found.ways] == ["lora", "qlora"]


def test_gradient_checkpointing_where_it_makes_room_for_a_larger_batch() -> None:
    config = LlamaConfig(**SIZES, num_hidden_layers=8, vocab_size=320)
    found = peftcore.suggest(config, ["lora"], memory="600MB", length=256, device="t4")
    assert [way.gradient_checkpointing for way in found.ways] == [False, True]
    assert found.ways[0].batch_size < found.ways[1].batch_size


def test_layers_that_differ_are_followed_whole() -> None:
    """The experts follow three dense layers."""
    experts = {"n_routed_experts": 64, "moe_intermediate_size": 256, "first_k_dense_replace": 3, "n_group": 1}
    config = DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8},
        **experts, v_head_dim=16, qk_nope_head_dim=16, num_hidden_layers=6, vocab_size=64, topk_group=1,
    )  # fmt: skip
    (way,) = peftcore.suggest(
        config, memory="850MB", length=16, **{**ONE, "fields": {"target_modules": ["o_proj"]}}
    ).ways
    assert 100e6 < way.memory.high <= usable(850e6)


def test_a_language_model_inside_another_and_fields_that_are_lists() -> None:
    text = {**SIZES, "num_hidden_layers": 4, "head_dim": 16, "vocab_size": 320}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text, vision_config={**vision, "image_size": 32, "patch_size": 8}, mm_tokens_per_image=4
    )
    fields = {"target_modules": ["q_proj"]}
    found = peftcore.suggest(config, memory="800MB", length=16, **{**ONE, "fields": fields})
    assert found.ways[0].fields == {"target_modules": ["q_proj"], "r": 16}
    assert "--set 'target_modules=[\"q_proj\"]'" in str(found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"memory": "much"}, "memory must be a number of bytes or text such as '24GB', found 'much'"),
        ({"memory": 0}, "is too small for any model"),
        ({"memory": "lots"}, "memory must be a number of bytes or text such as '24GB', found 'lots'"),
        ({"memory": "-3GB"}, "memory must be a number of bytes or text such as '24GB', found '-3GB'"),
        ({"memory": "1MB"}, "memory='1MB' on this machine is no more than Python and its libraries take"),
        ({"memory": "400MB", "device": "t4"}, "is no more than the CUDA context takes. Pass at least 1GB"),
        (
            {"batch_size": 4},
            "suggest chooses batch_size, .*, optimizer itself. Omit batch_size",
        ),
        ({"alpha": 4}, "suggest has no argument alpha. Pass fields of a method's config as fields="),
        ({"methods": []}, r"methods must be a list of names, found \[\]"),
        ({"methods": "lora"}, "methods must be a list of names, found 'lora'"),
        ({"ranks": 0}, "ranks must be a whole number of at least 1, found 0"),
        ({"device": "h1000"}, "unknown device 'h1000'"),
    ],
)
def test_what_cannot_be_answered(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(PeftcoreError, match=message):
        peftcore.suggest(CONFIG, length=16, **{"methods": ["lora"], "device": "cpu", **arguments})  # type: ignore[arg-type]


def test_ranks_share_the_base(found: peftcore.Suggestion) -> None:
    shared = {"ranks": 8, "shard": True, "length": 32}
    alone, eight = found.ways[0], peftcore.suggest(CONFIG, memory="600MB", r=(4,), **shared, **ONE).ways[0]
    assert eight.estimate.step.ranks == 8 and eight.estimate.parts["base"] < 0.2 * alone.estimate.parts["base"]


def test_no_config() -> None:
    with pytest.raises(PeftcoreError, match="expected a transformers config or a model with a config, found object"):
        peftcore.suggest(object(), ["lora"], memory="1GB", device="t4")


def test_a_step_that_runs_with_one_example_alone() -> None:
    classifier = LlamaConfig(**WIDE, vocab_size=320, architectures=["LlamaForSequenceClassification"])  # no pad token
    with pytest.raises(PeftcoreError, match="padding token"):
        peftcore.suggest(classifier, memory="24GB", length=64, **ONE)


def test_what_would_help_where_nothing_fits() -> None:
    wide = LlamaConfig(**WIDE, vocab_size=32000)
    with pytest.raises(PeftcoreError, match=r"Examples of at most \d+ tokens would fit \(--max-length"):
        peftcore.suggest(wide, memory="900MB", length=4096, **ONE)
    least = r"nothing fits into 26.4 MB: the smallest configuration is lora with one example at a time"
    wanted = "for the base. A method with a 4-bit base needs less; GPUs with"
    with pytest.raises(PeftcoreError, match=f"{least}.*{wanted}"):
        peftcore.suggest(wide, memory="560MB", length=64, **ONE)
