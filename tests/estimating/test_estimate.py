"""What a step is said to take, beside what PyTorch's CPU allocator reports of the same step."""

import gc
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import LlamaConfig

import peftcore
from peftcore.errors import PeftcoreError
from peftcore.estimating import step
from peftcore.estimating.prediction import KINDS, checkpoint
from peftcore.estimating.standing import stand_in

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIG = LlamaConfig(**SIZES, num_hidden_layers=2, vocab_size=320)
RUN = {"batch_size": 3, "length": 40}


def extra(model: nn.Module) -> Any:
    return peftcore.extra_loss(model) if not all(p.requires_grad for p in model.parameters()) else 0.0


def allocated(model: nn.Module, **run: Any) -> int:
    """Bytes that a second step for real has taken at most above what there was before it."""
    inputs = {
        name: torch.rand(value.shape, dtype=value.dtype) if value.is_meta else value
        for name, value in step.make_inputs(model, run["batch_size"], run["length"]).items()
    }
    optimizer = step.make_optimizer(model, run.get("optimizer", "adamw_torch"))
    parameters = [p for p in model.parameters() if p.requires_grad]

    def train() -> None:
        for _ in range(run.get("gradient_accumulation", 1)):
            loss = model(**inputs).loss
            (loss + extra(model)).backward()
            del loss
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    train()
    gc.collect()
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        train()
    sizes = [event.nbytes() for event in profile.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for size in sizes:
        held += size
        most = max(most, held)
    return most


def predicted(found: peftcore.Estimate) -> int:
    """The same of an estimate: tensors alone, without what lies in memory before a step and inside operators."""
    apart = ("base", "adapters", "optimizer state", "inputs", "inside operators", "kept by operators")
    own = [i for i, kind in enumerate(KINDS) if kind not in apart]
    return max(sum(sizes[i] for i in own) for _, sizes in found.timeline)


FIELDS: dict[str, dict[str, Any]] = {
    "adalora": {"total_step": 1000},
    "alora": {"alora_invocation_tokens": [3]},
    "trainable-tokens": {"token_indices": [5, 6]},
    "bitfit": {"add_missing": True},
    "c3a": {"block_size": 16},
    "road": {"group_size": 16},
    "arrow": {"experts": ["one", "two", "three"]},
    "shira": {"r": 4},
    "vblora": {"vector_length": 32},
    "miss": {"r": 16},
    "oft": {"oft_block_size": 16},
    "psoft": {"r": 4},
    "fourierft": {"n_frequency": 100},
    "waveft": {"n_frequency": 100},
    "cpt": {"cpt_token_ids": [5, 6, 7, 8], "cpt_tokens_type_mask": [1, 2, 3, 4]},
}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    # These two need adapters that are trained.
    **{name: (name, {}) for name in peftcore.methods() if name not in ("arrow", "adapter-fusion")},
    "every parameter": (None, {}),
    "8 bits": ("lora", {"optimizer": "paged_adamw_8bit"}),
    "checkpointing": ("lora", {"gradient_checkpointing": True}),
    "older checkpointing": ("dora", {"gradient_checkpointing": "reentrant"}),
    "two batches": (None, {"gradient_accumulation": 2}),
    "in 4 bits": ("lora", {"quantize": "nf4"}),
    "in 16 bits": ("lora", {"dtype": torch.bfloat16}),
    "long": ("lora", {"length": 400, "batch_size": 1}),
}


def real(method: Any, **run: Any) -> nn.Module:
    model = transformers.LlamaForCausalLM._from_config(deepcopy(CONFIG), dtype=run.get("dtype", torch.float32)).train()
    if "quantize" in run:
        peftcore.quantize(model, run["quantize"])
    if method is not None:
        peftcore.apply(model, method, **FIELDS.get(method, {}))
    if kind := run.get("gradient_checkpointing"):
        checkpoint(model, kind)
    return model


@pytest.mark.parametrize("case", CASES)
def test_is_what_the_allocator_reports(case: str) -> None:
    method, more = CASES[case]
    run = {**RUN, **more}
    found = peftcore.estimate(CONFIG, method, **run, **FIELDS.get(method, {}))
    states = (
        5056 * CONFIG.num_hidden_layers if "gradient_checkpointing" in run else 0
    )  # of the generator, at each layer
    assert predicted(found) + states == pytest.approx(allocated(real(method, **run), **run), rel=2e-3)


def test_other_kinds_of_models() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    for config in (
        transformers.BertConfig(**sizes, vocab_size=96, architectures=["BertForSequenceClassification"]),
        transformers.ViTConfig(**sizes, image_size=32, patch_size=8, architectures=["ViTForImageClassification"]),
        transformers.T5Config(
            d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=96, decoder_start_token_id=0
        ),
        transformers.Qwen3MoeConfig(
            **sizes, **{"num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2},
            **{"moe_intermediate_size": 16, "vocab_size": 96},
        ),
    ):  # fmt: skip
        found = peftcore.estimate(config, "lora", **RUN)
        kind = type(stand_in(config, None))
        model = peftcore.apply(kind._from_config(config, dtype=torch.float32).train(), "lora")
        assert predicted(found) == pytest.approx(allocated(model, **RUN), rel=0.02), kind


def test_says_where_the_peak_falls_and_what_there_is() -> None:
    text = str(peftcore.estimate(CONFIG, "lora", quantize="nf4", optimizer="paged_adamw_8bit", **RUN))
    for part in ("in 4 bits: 61,440", "peak", "backward: ", "with state paged", "Not in it: "):
        assert part in text


def test_what_lies_there_before_a_step_stays_when_the_stand_in_is_gone() -> None:
    """The heap is simulated later, and must not free weights and state between steps."""
    found = peftcore.estimate(CONFIG, "lora", **RUN)
    gc.collect()
    stay = sum(storage.bytes for storage in found.storages if storage.born == 0 and storage.died is None)
    assert stay == sum(found.parts[kind] for kind in ("base", "adapters", "optimizer state", "inputs"))
    assert found.resident >= stay


def test_from_a_folder_without_weights(tmp_path: Path) -> None:
    CONFIG.save_pretrained(tmp_path)
    assert peftcore.estimate(tmp_path, "lora", **RUN).parts == peftcore.estimate(CONFIG, "lora", **RUN).parts


def test_draws_nothing() -> None:
    before = torch.get_rng_state()
    peftcore.estimate(CONFIG, "vera", **RUN)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number from 1, found 0"),
        ({"optimizer": "adamw_8bits"}, "nearest: 'adamw_8bit'"),
        ({"gradient_checkpointing": "some"}, "'non-reentrant', found 'some'. Selective checkpointing is not followed"),
        ({"ranks": 2}, "ranks: a step is not followed of one process among several. With DDP each takes"),
        ({"shard": True}, "shard: a step is not followed of a base that is sharded"),
        ({"per_sample": True}, "per_sample: a step is not followed with adapters of each sample's own"),
        ({"quantize": "int3"}, "no 4-bit type 'int3'"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(PeftcoreError, match=message):
        peftcore.estimate(CONFIG, "lora", **arguments)


def test_wrong_models(tmp_path: Path) -> None:
    broken = LlamaConfig(**{**SIZES, "num_attention_heads": 4}, vocab_size=-3)
    for model, message in [
        (tmp_path, "the configuration of '.*' cannot be read"),
        (tmp_path / "nowhere", "there is no folder '.*nowhere': give one with a config.json"),
        (3, "takes a model, a config of transformers, a folder or a hub id, found int"),
        (nn.Linear(2, 2), "takes no labels"),
        (broken, "no model can be built on the meta device of this LlamaConfig"),
    ]:
        with pytest.raises(PeftcoreError, match=message):
            peftcore.estimate(model, None)


def test_of_a_model_is_that_of_its_config() -> None:
    model = real(None)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    of_model, of_config = peftcore.estimate(model, "dora", **RUN), peftcore.estimate(CONFIG, "dora", **RUN)
    assert (of_model.parts, of_model.where, of_model.flops) == (of_config.parts, of_config.where, of_config.flops)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_plan_of_a_model_is_that_of_its_config() -> None:
    """Loaded, with values and on the CPU, or built on meta from the config."""
    for method in ("lora", "qlora"):
        loaded, empty = peftcore.plan(real(None), method), peftcore.plan(stand_in(CONFIG, None), method)
        assert str(loaded) == str(empty) and loaded.rows == empty.rows


def test_weights_that_are_packed_in_another_way() -> None:
    config = deepcopy(CONFIG)
    config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(PeftcoreError, match=r"the weights are quantized \(fp8\), which is not followed"):
        peftcore.estimate(config, "lora")


def test_of_a_model_in_4_bits_is_that_of_its_config() -> None:
    model = peftcore.quantize(transformers.LlamaForCausalLM(deepcopy(CONFIG)))  # whose config says so then
    of_config = peftcore.estimate(CONFIG, "lora", quantize="nf4", **RUN)
    assert peftcore.estimate(model, "lora", **RUN).parts == of_config.parts
    assert of_config.parts["base"] == peftcore.summary(model).base_bytes + 64  # the rotary embedding's frequencies
