"""Predicted tensors of a step, compared with what PyTorch's CPU allocator reports of it."""

import gc
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from support.step_memory import allocated, predicted, real
from support.whole_run import nightly_but
from torch import nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import LlamaConfig

import peftcore
from peftcore.errors import PeftcoreError
from peftcore.estimating import Step
from peftcore.estimating.devices import process_memory
from peftcore.estimating.stand_in import stand_in

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIG = LlamaConfig(**SIZES, num_hidden_layers=2, vocab_size=320)
RUN = {"batch_size": 3, "length": 40}


def selective() -> Any:
    """Keeps what products with weights give."""
    products = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.peftcore.lora_linear.default]
    return create_selective_checkpoint_contexts(products)


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
    "every second layer": ("lora", {"gradient_checkpointing": {"every_n_layers": 2}}),
    "selective checkpointing": ("lora", {"gradient_checkpointing": {"context_fn": selective}}),
    "an adapter for each sample": ("lora", {"per_sample": 2}),
    "two batches": (None, {"gradient_accumulation": 2}),
    "in 4 bits": ("lora", {"quantize": "nf4"}),
    "in 4 bits, with checkpointing": ("dora", {"quantize": "nf4", "gradient_checkpointing": True}),
    "in 16 bits": ("lora", {"dtype": torch.bfloat16}),
    "long": ("lora", {"length": 400, "batch_size": 1}),
    "fused": ("lora", {"fused": True}),
    "fused, in 16 bits": ("dora", {"fused": True, "dtype": torch.bfloat16}),
    "fused, all kept": ("lora", {"fused": True, "recompute": "none"}),
    "fused, with checkpointing": ("lora", {"fused": True, "gradient_checkpointing": "reentrant"}),
}


def of(method: Any, **run: Any) -> nn.Module:
    """A model with values, of `CONFIG`."""
    options = {name: run[name] for name in ("quantize", "dtype") if name in run}
    return real(CONFIG, method, step_of(run), **options, **FIELDS.get(method, {}))


def step_of(run: dict[str, Any]) -> Step:
    return Step(**{name: value for name, value in run.items() if name not in ("quantize", "dtype")})


DAILY = {"lora", "prompt-tuning", "vera", *(name for name in CASES if name not in peftcore.methods())}


@pytest.mark.parametrize("case", nightly_but(CASES, DAILY))
def test_is_what_the_allocator_reports(case: str) -> None:
    method, more = CASES[case]
    run = {**RUN, **more}
    found = peftcore.estimate(CONFIG, method, **run, **FIELDS.get(method, {}))
    again = run.get("gradient_checkpointing", False)
    kept = 0 if not again else CONFIG.num_hidden_layers  # layers that keep the generator's state
    if isinstance(again, dict):
        kept //= again.get("every_n_layers", 1)
    assert predicted(found) + 5056 * kept == pytest.approx(allocated(of(method, **run), step_of(run)), rel=2e-3)


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
FAMILIES: dict[str, Any] = {
    "bert": transformers.BertConfig(**SMALL, vocab_size=96, architectures=["BertForSequenceClassification"]),
    "vit": transformers.ViTConfig(**SMALL, image_size=32, patch_size=8, architectures=["ViTForImageClassification"]),
    "t5": transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=96, decoder_start_token_id=0
    ),
    "experts": transformers.Qwen3MoeConfig(
        **SMALL, **{"num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2},
        **{"moe_intermediate_size": 16, "vocab_size": 96},
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", nightly_but(FAMILIES, ("bert", "experts")))
def test_other_kinds_of_models(family: str) -> None:
    config = FAMILIES[family]
    found = peftcore.estimate(config, "lora", **RUN)
    kind = type(stand_in(config, None))
    model = peftcore.apply(kind._from_config(config, dtype=torch.float32).train(), "lora")
    assert predicted(found) == pytest.approx(allocated(model, Step(**RUN)), rel=0.02)


WIDE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96, "vocab_size": 96}
SPEECH = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in
          (("layers", 1), ("attention_heads", 2), ("ffn_dim", 96))}  # fmt: skip
OF_TASKS = {  # with heads that the kernel of attention takes
    "classes": ("BertForSequenceClassification", transformers.BertConfig(**WIDE)),
    "tags": ("BertForTokenClassification", transformers.BertConfig(**WIDE, num_labels=5)),
    "tags of a decoder": ("LlamaForTokenClassification", LlamaConfig(**WIDE, num_labels=5)),
    "images": ("ViTForImageClassification", transformers.ViTConfig(**WIDE, image_size=64, patch_size=8)),
    "recordings": (
        "WhisperForConditionalGeneration",
        transformers.WhisperConfig(**SPEECH, d_model=64, num_mel_bins=8, max_source_positions=64, vocab_size=96,
            decoder_start_token_id=1, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("case", OF_TASKS)
def test_models_of_other_tasks(case: str, fused: bool) -> None:
    name, config = OF_TASKS[case]
    config = deepcopy(config)
    config.architectures = [name]
    found = peftcore.estimate(config, "lora", target_modules="all-linear", fused=fused, **RUN)
    assert ("fused operators" in found.title) == fused
    model = getattr(transformers, name)(config).train()
    peftcore.apply(model, "lora", target_modules="all-linear")
    if fused:
        peftcore.fuse(model)
    assert predicted(found) == pytest.approx(allocated(model, Step(**RUN)), rel=0.01)
    assert peftcore.estimate(model, **RUN).parts == found.parts  # which is fused itself


def test_a_loss_without_logits_and_fused_operators_of_a_model_are_seen() -> None:
    model = peftcore.loss_without_logits(peftcore.fuse(of("lora")))
    wanted = peftcore.estimate(CONFIG, "lora", without_logits=True, fused=True, **RUN)
    assert peftcore.estimate(model, **RUN).parts == wanted.parts
    peftcore.loss_without_logits(peftcore.fuse(model, enabled=False), enabled=False)
    assert peftcore.estimate(model, **RUN).parts == peftcore.estimate(CONFIG, "lora", **RUN).parts


def test_a_card_has_no_fused_operators() -> None:
    found, without = (peftcore.estimate(CONFIG, "lora", device="h100", fused=fused, **RUN) for fused in (True, False))
    assert found.parts == without.parts and found.title == without.title


def test_says_where_the_peak_falls_and_what_there_is() -> None:
    found = peftcore.estimate(CONFIG, "lora", quantize="nf4", optimizer="paged_adamw_8bit", **RUN)
    text = str(found)
    for part in (
        "in 4 bits: 61,440",
        "tensors at peak",
        "backward: ",
        "with state paged",
        "Python and its libraries",
        "Not included: ",
    ):
        assert part in text


def test_weights_and_state_stay_in_the_record_when_the_stand_in_is_deleted() -> None:
    found = peftcore.estimate(CONFIG, "lora", **RUN)
    gc.collect()
    stay = sum(storage.bytes for storage in found.storages if storage.born == 0 and storage.died is None)
    assert stay == sum(found.parts[kind] for kind in ("base", "adapters", "optimizer state", "inputs"))
    assert found.beyond_libraries.high >= stay
    assert found.process == found.beyond_libraries.plus(found.libraries)


def test_weights_of_a_loaded_model_are_counted_once() -> None:
    model = transformers.LlamaForCausalLM(
        LlamaConfig(**{**SIZES, "hidden_size": 1024}, num_hidden_layers=1, vocab_size=32000)
    )
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    held = process_memory()
    found = peftcore.estimate(model, "lora", **RUN)
    assert held - weights <= found.libraries < held - weights + 50e6
    assert found.parts["base"] == weights


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
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, found 0"),
        ({"optimizer": "adamw_8bits"}, "nearest: 'adamw_8bit'"),
        ({"gradient_checkpointing": "some"}, "'non-reentrant' or a dict as in Trainer's .* found 'some'"),
        (
            {"gradient_checkpointing": {"context": 1}},
            "has no option context. Its options are use_reentrant",
        ),
        ({"gradient_checkpointing": {"offload": True}}, "offload=True cannot be estimated"),
        ({"ranks": 0}, "ranks must be a whole number of at least 1, found 0"),
        ({"ranks": True}, "ranks must be a whole number of at least 1, found True"),
        ({"per_sample": -1}, "per_sample must be a whole number of at least 0, found -1"),
        ({"per_sample": 2, "method": "prompt-tuning"}, "acts on the batch as a whole"),
        (
            {"per_sample": 2, "method": None},
            "per_sample needs a method, because all parameters are trained without one",
        ),
        ({"shard": "full"}, "shard must be True .FSDP2., False .DDP. or a dict, found 'full'"),
        ({"shard": 3}, "shard must be True .FSDP2., False .DDP. or a dict, found 3"),
        (
            {"shard": "zero3"},
            "does not estimate DeepSpeed's ZeRO.*estimate_zero3_model_states_mem_needs_all_live",
        ),
        ({"shard": {"stage": 2}}, "does not estimate DeepSpeed's ZeRO"),
        ({"shard": {"adapter": "shard"}}, "shard: 'adapter' is not supported .nearest: 'adapter_placement'"),
        ({"shard": {"adapter_placement": "both"}}, "shard: adapter_placement must be one of .* found 'both'"),
        ({"mixed_precision": "fp8"}, "mixed_precision must be None or one of bf16, fp16, found 'fp8'"),
        ({"loss": "dpp"}, "loss must be None or one of sft, dpo, kto, pairs, triplets, found 'dpp' .nearest: 'dpo'"),
        ({"example": {"input_ids": torch.ones(2, 3)}}, r"input_ids \[1, length\], found \[2, 3\]"),
        ({"example": {"pixel_values": torch.ones(1, 3)}}, r"input_ids \[1, length\], found None"),
        ({"example": {"input_ids": torch.ones(1, 3)}, "loss": "pairs"}, "loss='pairs' only works with texts"),
        ({"quantize": "int3"}, "unknown quant_type 'int3'"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(PeftcoreError, match=message):
        peftcore.estimate(CONFIG, arguments.pop("method", "lora"), **arguments)


def test_losses_without_adapters_on_shards_are_refused() -> None:
    pytest.importorskip("trl", minversion="1.16")  # whose releases need Python 3.11
    with pytest.raises(PeftcoreError, match=r"loss=.dpo. without adapters on a sharded model"):
        peftcore.estimate(CONFIG, None, shard=True, loss="dpo", **RUN)


def test_wrong_models(tmp_path: Path) -> None:
    broken = LlamaConfig(**{**SIZES, "num_attention_heads": 4}, vocab_size=-3)
    for model, message in [
        (tmp_path, "the configuration of '.*' cannot be read"),
        (tmp_path / "nowhere", "the folder '.*nowhere' does not exist. Pass a folder with a config.json"),
        (3, "needs a model, a transformers config, a folder or a hub id, found int"),
        (nn.Linear(2, 2), "does not accept labels, so its loss is unknown"),
        (broken, "cannot build a model on the meta device from this LlamaConfig"),
    ]:
        with pytest.raises(PeftcoreError, match=message):
            peftcore.estimate(model, None)


@pytest.mark.parametrize("config", [{"width": 8}, SimpleNamespace(width=8), "a name"])
def test_of_a_model_with_a_config_of_its_own(config: Any) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = config
            self.embedding, self.head = nn.Embedding(16, 8), nn.Linear(8, 16)

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
            logits = self.head(self.embedding(input_ids))
            return SimpleNamespace(logits=logits, loss=logits.mean() + 0 * labels.sum())

    found = peftcore.estimate(Own(), "lora", target_modules=["head"], r=2, **RUN)
    assert found.parts["base"] == 4 * (16 * 8 + 8 * 16 + 16) and found.parts["adapters"] == 4 * 2 * (8 + 16)


def test_of_a_model_is_that_of_its_config() -> None:
    model = of(None)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    of_model, of_config = peftcore.estimate(model, "dora", **RUN), peftcore.estimate(CONFIG, "dora", **RUN)
    assert (of_model.parts, of_model.where, of_model.flops) == (of_config.parts, of_config.where, of_config.flops)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_plan_of_a_model_is_that_of_its_config() -> None:
    """Loaded, with values and on the CPU, or built on meta from the config."""
    for method in ("lora", "qlora"):
        loaded, empty = peftcore.plan(of(None), method), peftcore.plan(stand_in(CONFIG, None), method)
        assert str(loaded) == str(empty) and loaded.rows == empty.rows


def test_weights_that_are_packed_in_another_way() -> None:
    config = deepcopy(CONFIG)
    config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(PeftcoreError, match=r"the weights are quantized \(fp8\), which cannot be estimated"):
        peftcore.estimate(config, "lora")


def test_of_a_model_in_4_bits_is_that_of_its_config() -> None:
    model = peftcore.quantize(transformers.LlamaForCausalLM(deepcopy(CONFIG)))  # whose config says so then
    of_config = peftcore.estimate(CONFIG, "lora", quantize="nf4", **RUN)
    assert peftcore.estimate(model, "lora", **RUN).parts == of_config.parts
    assert of_config.parts["base"] == peftcore.summary(model).base_bytes + 64  # the rotary embedding's frequencies
