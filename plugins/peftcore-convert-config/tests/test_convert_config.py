"""Configs of axolotl, LLaMA-Factory and torchtune become options of `peftcore train`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import printed
from peftcore_convert_config import programs, reading
from peftcore_convert_config.reading import dataset

from peftcore import PeftcoreError

ADAM = {"_component_": "torch.optim.AdamW"}
TUNED = {"_component_": "torchtune.models.llama3_2_vision.lora_llama3_2_vision_11b"}
TUNED_TEXT = {"_component_": "torchtune.models.qwen2.lora_qwen2_0_5b", "lora_attn_modules": ["q_proj"]}
INT8 = "torchtune.training.quantization.Int8DynActInt4WeightQATQuantizer"
SEEING = {"model_name_or_path": "Qwen/Qwen2.5-VL-7B-Instruct", "finetuning_type": "lora", "image_max_pixels": 4096}


def test_options_of_axolotl() -> None:
    config = {
        "base_model": "org/model",
        "adapter": "lora",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "lora_r": 16,
        "lora_target_modules": "model.layers.*.q_proj",
        "lora_target_parameters": ["experts.down_proj"],
        "datasets": [
            {"path": "org/rows", "name": "small", "split": "train[:1%]", "type": "alpaca"},
            {"path": "json", "data_files": "more.jsonl", "type": "chat_template", "field_messages": "turns"},
        ],
        "optimizer": "adamw_torch_4bit",
        "learning_rate": "1e-4",
        "adam_beta2": 0.95,
        "kto_desirable_weight": 0.5,
        "warmup_steps": 10,
        "max_steps": 20,
        "num_epochs": 3,
        "fp16": True,
        "gradient_checkpointing": "offload",
        "early_stopping_patience": 3,
        "torch_compile": True,
        "an_option": 1,
    }
    found = programs.convert(config)
    assert found.options == {
        "model": "org/model",
        "method": "lora",
        "quantize": "nf4",
        "data": ["org/rows@small/train[:1%]", "more.jsonl"],
        "columns": "messages=turns",
        "holdout": 0.1,
        "optim": "paged_adamw_8bit",
        "optim_args": "betas=(0.9,0.95)",
        "desirable_weight": 0.5,
        "lr": 1e-4,
        "warmup": 10.0,
        "steps": 20,
        "precision": "fp16",
        "gradient_checkpointing": True,
        "patience": 3,
    }
    assert found.fields == {
        "r": 16,
        "target_modules": "model.layers.*.q_proj",
        "target_parameters": ["experts.down_proj"],
    }
    assert found.left_out.keys() == {"optimizer", "gradient_checkpointing", "torch_compile", "an_option"}
    assert "not known" in found.left_out["an_option"]


def test_defaults_of_the_programs_that_are_not_ours() -> None:
    factory = programs.convert(
        {"model_name_or_path": "m", "finetuning_type": "lora", "lora_rank": 8, "dataset": "a, b"}
    )
    assert factory.fields == {"r": 8, "lora_alpha": 16}
    assert factory.options["gradient_checkpointing"] is True and factory.options["data"] == ["a.json", "b.json"]
    component = "torchtune.models.phi3.lora_phi3_mini"
    tune = programs.convert(
        {
            "model": {"_component_": component, "lora_attn_modules": ["q_proj", "v_proj", "output_proj"]},
            "checkpointer": {"checkpoint_dir": "/tmp/phi/"},
            "dataset": {"_component_": "torchtune.datasets.alpaca_dataset", "packed": True},
            "optimizer": {"_component_": "torch.optim.AdamW", "fused": True, "lr": "3e-4"},
            "lr_scheduler": {"_component_": "cosine", "num_warmup_steps": 100},
            "epochs": 2,
            "max_steps_per_epoch": 5,
        }
    )
    assert tune.options == {
        "model": "/tmp/phi",
        "method": "lora",
        "pack": True,
        "data": "tatsu-lab/alpaca",
        "holdout": 1,
        "steps": 10,
        "optim": "adamw_torch_fused",
        "weight_decay": 0.01,
        "lr": 3e-4,
        "scheduler": "cosine",
        "warmup": 100.0,
        "max_grad_norm": 0.0,
    }
    assert tune.fields == {"target_modules": ["qkv_proj", "o_proj"]}


def test_parts_of_models_that_read_images() -> None:
    """torchtune's parts of Llama 3.2 Vision are layers of transformers' model, whose names tell them apart."""
    names = {
        "encoder": "model.vision_model.transformer.layers.1",
        "global": "model.vision_model.global_transformer.layers.3",
        "cross": "model.language_model.layers.13",
        "decoder": "model.language_model.layers.12",
    }
    layers = [f"{names[part]}.self_attn.{name}_proj" for part in ("encoder", "global", "decoder") for name in "qkvo"]
    layers += [f"{names['cross']}.cross_attn.{name}_proj" for name in "qkvo"]
    layers += [f"{names[part]}.mlp.fc{i}" for part in ("encoder", "global") for i in (1, 2)]
    layers += [f"{names[part]}.mlp.{name}_proj" for part in ("cross", "decoder") for name in ("gate", "up", "down")]
    layers += ["lm_head", "model.multi_modal_projector"]
    text = {"lora_attn_modules": ["q_proj", "output_proj"], "apply_lora_to_mlp": True}

    def adapted(**parts: Any) -> set[str]:
        found = programs.convert({"model": {**TUNED, **text, **parts}, "optimizer": ADAM})
        assert found.options["task"] == "image-text" and len(found.to_do) == 1
        pattern = re.compile(found.fields["target_modules"])
        matched = {layer for layer in layers if pattern.fullmatch(layer)}
        assert all("k_proj" not in layer and "v_proj" not in layer for layer in matched)
        return {layer.rsplit(".", 2)[0] if "layers" in layer else layer for layer in matched}

    seeing = {names["encoder"], names["global"], names["cross"]}
    assert adapted() == seeing  # torchtune's default
    assert adapted(encoder_trainable="frozen") == {names["global"], names["cross"]}
    assert adapted(fusion_trainable="frozen") == {names["encoder"]}
    assert adapted(decoder_trainable="lora", apply_lora_to_output=True) == {*names.values(), *layers[-2:]}


def test_data_sets_are_named_as_data_names_them() -> None:
    assert [dataset("x"), dataset("x", "train"), dataset("x", "test")] == ["x", "x", "x@test"]
    assert [dataset("x", None, "en"), dataset("x", "test", "en")] == ["x@en/train", "x@en/test"]
    name = "torchtune.datasets.chat_dataset"
    rows = [{"_component_": name, "source": source, "weight": weight} for source, weight in (("a", 1), ("b", 2.5))]
    found = programs.convert({"model": TUNED_TEXT, "dataset": rows, "optimizer": ADAM})
    assert found.options["data"] == ["a", "b:2.5"]


def test_distillation_and_bases_in_int4() -> None:
    given = {"_component_": "torchtune.models.qwen2.lora_qwen2_0_5b", "lora_attn_modules": ["q_proj"]}
    files = {"checkpointer": {"checkpoint_dir": "small"}, "teacher_checkpointer": {"checkpoint_dir": "large/"}}
    loss = {"kd_loss": {"_component_": "torchtune.modules.loss.ForwardKLWithChunkedOutputLoss"}, "kd_ratio": 0.25}
    found = programs.convert(
        {"model": given, "teacher_model": {"_component_": "qwen2_1_5b"}, **files, **loss, "optimizer": ADAM}
    )
    assert found.options["model"] == "small"
    assert (found.options["teacher"], found.options["teacher_weight"]) == ("large", 0.25)
    assert found.left_out == {}
    packed = programs.convert({"base_model": "m-GPTQ", "adapter": "lora", "gptq": True, "gptq_groupsize": 128})
    assert packed.options["model"] == "m-GPTQ" and "quantize" not in packed.options and packed.left_out == {}
    packed = programs.convert({"model_name_or_path": "m-AWQ", "finetuning_type": "oft", "oft_block_size": 8})
    assert packed.options["method"] == "oft" and "quantize" not in packed.options


def test_quantization_aware_training() -> None:
    given = {"model": {"_component_": "torchtune.models.qwen2.lora_qwen2_0_5b"}, "optimizer": ADAM}
    for quantizer, ours in (
        ({"_component_": INT8, "groupsize": 256}, "8da4w-g256"),
        ({"_component_": INT8}, "8da4w-g256"),  # torchao's default
        ({"_component_": INT8, "groupsize": 32}, "8da4w"),
        ({"_component_": "torchtune.training.quantization.Int4WeightOnlyQATQuantizer"}, "affine4"),
    ):
        found = programs.convert({**given, "quantizer": quantizer})
        assert (found.options["method"], found.options["quantize"], found.left_out) == ("lora", ours, {})
        assert [line for line in found.to_do if "peftcore-8da4w" in line] == found.to_do
        assert bool(found.to_do) == ours.startswith("8da4w")


def test_conversations_with_images() -> None:
    pattern = r"model.language_model.layers.[\d]+.self_attn.(q|v)_proj"
    config = {"base_model": "m", "adapter": "lora", "processor_type": "AutoProcessor", "freeze_mm_modules": True}
    found = programs.convert(
        {**config, "lora_target_modules": pattern, "datasets": [{"path": "a", "type": "chat_template"}]}
    )
    assert found.options["task"] == "image-text" and found.fields == {"target_modules": pattern}
    assert found.left_out == {} and len(found.to_do) == 1 and "save images" in found.to_do[0]
    assert programs.convert({**config, "lora_target_linear": True}).left_out.keys() == {"freeze_mm_modules"}
    heard = programs.convert({**config, "datasets": [{"path": "org/vision-audio", "type": "chat_template"}]})
    assert heard.options["task"] == "audio-text" and "audio" in heard.to_do[0]
    voxtral = {"processor_type": "VoxtralProcessor", "tokenizer_use_mistral_common": True}
    voxtral["lora_target_modules"] = r"language_model.model.layers.[\d]+.self_attn.(q|v)_proj"
    spoken = programs.convert({**config, **voxtral, "datasets": [{"path": "org/text-audio", "type": "chat_template"}]})
    assert spoken.options["task"] == "audio-text" and spoken.left_out == {}
    for path in ("language_model.model.layers.0.self_attn.q_proj", "model.language_model.layers.0.self_attn.q_proj"):
        assert re.fullmatch(spoken.fields["target_modules"], path)
    factory = programs.convert({**SEEING, "lora_target": "all", "freeze_vision_tower": True})
    assert factory.options["task"] == "image-text" and factory.left_out.keys() == {"image_max_pixels"}
    compared = programs.convert({**SEEING, "stage": "dpo", "pref_beta": 0.2})
    assert (compared.options["task"], compared.options["beta"]) == ("image-dpo", 0.2) and len(compared.to_do) == 2
    assert programs.convert({**config, "rl": "dpo"}).options["task"] == "image-dpo"
    tuned = programs.convert({"model": TUNED, "loss": {"_component_": "DPOLoss"}, "optimizer": ADAM})
    assert tuned.options["task"] == "image-dpo"
    assert factory.fields["exclude_modules"] == r".*visual\..*"  # as there, the part that reads images stays frozen


def test_configs_that_answer_or_merge_become_lines_of_the_shell(tmp_path: Path) -> None:
    trained = {"model_name_or_path": "m", "adapter_name_or_path": "saves/a b", "finetuning_type": "lora"}
    found = programs.convert({**trained, "do_predict": True, "eval_dataset": "one, two", "max_samples": 5})
    data = "--data one.json --data two.json --eval-answers 5 --answer-tokens 1024"
    assert found.line() == f"peftcore eval --model m --adapter 'saves/a b' {data}" and found.left_out == {}
    both = programs.convert({**trained, "do_predict": True, "do_train": True, "dataset": "one"})
    assert both.command == "train" and both.left_out.keys() == {"do_predict"}
    file, written = tmp_path / "a.yaml", tmp_path / "a.sh"
    for config in (
        {**trained, "export_dir": "out", "export_size": 5, "infer_dtype": "bfloat16", "export_device": "cpu"},
        {"model": "m", "peft_config": {"name": "lora", "adapter_name_or_path": "saves/a b", "export_dir": "out"}}
        | {"export_size": 5, "infer_dtype": "bfloat16"},
    ):
        file.write_text(yaml.safe_dump(config))
        assert printed("convert-config", file, "-o", written)[1].split() == f"written. Run: sh {written}".split()
        line = "peftcore merge --model m --adapter 'saves/a b' --output out --shard-size 5GB --dtype bf16\n"
        assert written.read_text() == line
        written.unlink()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**SEEING, "stage": "rm"}, "'stage: rm' .* --task image-dpo"),
        ({**SEEING, "stage": "dpo", "pref_loss": "orpo"}, "'pref_loss: orpo' .* --task image-dpo"),
        ({"base_model": "m", "processor_type": "AutoProcessor", "rl": "kto"}, "'rl: kto' .* --task image-dpo"),
        ({**SEEING, "freeze_language_model": True}, "'freeze_language_model: True' .* --set target_modules="),
        ({**SEEING, "model_name_or_path": "org/other"}, "'model_name_or_path: org/other' .* target_modules="),
        ({"base_model": "m", "adapter": "lora", "rl": "ipo"}, "'rl: ipo' has no counterpart .* TRL's trainers"),
        (
            {"base_model": "m", "adapter": "lora", "learning_rate": "fast"},
            "'learning_rate' must be a number, found",
        ),
        ({"model_name_or_path": "m", "export_dir": "a"}, "'export_dir: a' has .* peftcore merge. .* found 0"),
        ({"model_name_or_path": "m", "adapter_name_or_path": "a,b", "do_predict": True}, "'do_predict: .* found 2"),
        (
            {"model_name_or_path": "m", "adapter_name_or_path": "a", "do_predict": True, "stage": "rm"},
            "'stage: rm' has no counterpart in peftcore eval",
        ),
        ({"model_name_or_path": "m", "export_quantization_bit": 4}, "peftcore merge, then peftcore.quantize"),
        ({"model_name_or_path": "m", "tensor_model_parallel_size": 2}, "'tensor_model_parallel_size: 2' .* Megatron"),
        ({"model_name_or_path": "m", "finetuning_type": "full"}, "'finetuning_type: full' has no counterpart"),
        ({"model": {**TUNED, "decoder_trainable": "full"}}, "'decoder_trainable: full' .* modules_to_save="),
        ({"model": {**TUNED, "_component_": "a.llama4.b", "encoder_trainable": "lora"}}, "for Llama 4 with images"),
        (
            {"model": {}, "teacher_checkpointer": {"checkpoint_dir": "t"}, "kd_loss": {"_component_": "ReverseKLLoss"}},
            "'kd_loss: .* ForwardKLLoss, by --teacher",
        ),
        ({"model": {}, "quantizer": {"_component_": "a"}}, "'quantizer: .* with groups of 32"),
        ({"model": {}, "quantizer": {"_component_": INT8, "groupsize": 48}}, "'quantizer: .* with groups of 32"),
        ({"model": {"quantize_base": True}, "quantizer": {"_component_": INT8}}, "'quantizer: .* that is not qlora"),
        ({"learning_rate": 1}, "of no program that is known"),
    ],
)
def test_what_is_not_here_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(PeftcoreError, match=message):
        programs.convert(config)


def test_megatron_on_one_device_is_a_plain_training() -> None:
    plain = {"model_name_or_path": "m", "finetuning_type": "lora", "dataset": "d"}
    engine = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "sequence_parallel": False}
    engine |= {"use_distributed_optimizer": True, "mixed_precision": "bf16_mixed"}
    found = programs.convert({**plain, **engine})
    assert found.options == programs.convert(plain).options and not found.left_out


def test_a_model_with_own_code_asks_for_it() -> None:
    config = {**SEEING, "model_name_or_path": "OpenMOSS-Team/MOSS-VL-Instruct-0708", "trust_remote_code": True}
    found = programs.convert(config)
    assert found.options["trust_remote_code"] is True and found.options["task"] == "image-text"
    assert found.fields["exclude_modules"] == r".*visual\..*"
    assert any("read the code" in line for line in found.to_do)
    assert "trust_remote_code" not in programs.convert({**SEEING, "trust_remote_code": True}).options


def test_code_of_an_axolotl_model_is_for_the_reader() -> None:
    config = {"base_model": "replit/replit-code-v1-3b", "adapter": "lora", "datasets": [{"path": "d"}]}
    found = programs.convert({**config, "trust_remote_code": True})
    assert reading.OWN_CODE in found.to_do and "trust_remote_code" not in found.options
    assert reading.OWN_CODE not in programs.convert(config).to_do


EBFT = {"base_model": "m", "adapter": "lora", "rl": "ebft", "micro_batch_size": 2, "gradient_accumulation_steps": 4}


def test_ebft_of_answers_has_batches_of_prompts() -> None:
    trl = {"num_generations": 4, "max_completion_length": 128, "use_vllm": True, "vllm_server_port": 8000}
    trl |= {"chat_template_kwargs": {"enable_thinking": False}, "scale_rewards": True, "loss_type": "grpo"}
    ebft = {"feature_layers": [0.25, 0.5], "use_whitening": False, "diversity_coef": 0.5, "adaptive_max_tokens": True}
    rows = [{"path": "a", "type": "ebft_opencode.transform"}]
    found = programs.convert({**EBFT, "ebft": ebft, "trl": trl, "datasets": rows})
    wanted = {"batch_size": 1, "grad_accum": 2, "generations": 4, "answer_tokens": 128, "temperature": 1.0}
    assert {name: found.options[name] for name in wanted} == wanted
    fields = "feature_layers=0.25,0.5 use_whitening=false diversity_coef=0.5"
    assert found.options["ebft"] == f"mode=structured {fields}" and "task" not in found.options
    assert found.left_out.keys() == {"adaptive_max_tokens", "use_vllm", "chat_template_kwargs"}
    assert found.to_do == ["data: rewrite each row as messages, 'input' as the user's and 'output' as the assistant's"]


def test_ebft_of_strides_has_batches_of_texts() -> None:
    rows = [{"path": "a", "type": "ebft_pretrain.transform"}]
    found = programs.convert({**EBFT, "ebft": {"mode": "strided", "stride": 4, "top_p": 1.0}, "datasets": rows})
    wanted = {"batch_size": 2, "grad_accum": 4, "generations": 4, "answer_tokens": 8, "temperature": 0.6}
    assert {name: found.options[name] for name in wanted} == wanted
    assert found.options["ebft"] == "mode=strided stride=4" and found.options["columns"] == "text=question"
    assert found.left_out == {} and found.to_do == []


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"ebft": {"mode": "strided", "top_p": 0.9}}, "'top_p: 0.9' .* tokens are drawn from all"),
        ({"ebft": {"mode": "strided", "n_samples_per_prompt": 1}}, "'n_samples_per_prompt: 1' .* 2 or more samples"),
        ({"trl": {"num_generations": 3}}, "'micro_batch_size: 2' .* in whole prompts"),
        ({"trl": {"loss_type": "dapo"}}, "'loss_type: dapo' .* loss_type: grpo"),
        ({"trl": {"beta": 0.1}}, "'beta: 0.1' .* beta: 0"),
        ({"trl": {"scale_rewards": False}}, "'scale_rewards: False' .* scale_rewards: true"),
    ],
)
def test_what_ebft_does_not_have_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(PeftcoreError, match=message):
        programs.convert({**EBFT, "datasets": [], **keys})


def test_the_command_writes_a_file_with_comments(tmp_path: Path) -> None:
    config = {"base_model": "m", "adapter": "lora", "load_in_8bit": True, "datasets": [{"path": "a", "type": "alpaca"}]}
    file, written = tmp_path / "a.yaml", tmp_path / "a.toml"
    file.write_text(yaml.safe_dump(config))
    status, shown = printed("convert-config", file)
    assert status == 0 and shown.startswith("# not here: load_in_8bit. Instead: --dtype bf16 if the base fits")
    status, output = printed("convert-config", file, "-o", written)
    assert status == 0 and "peftcore train --config" in output
    assert written.read_text() == shown
    assert printed("convert-config", file, "-o", written)[0] == 1
    file.write_text("- 1")
    assert "must have keys with values, found list" in printed("convert-config", file)[1]
    file.write_text("a: [")
    refused = printed("convert-config", file)[1]
    assert "cannot be read as YAML" in refused and "Pass a config of axolotl, LLaMA-Factory or torchtune" in refused
    file.unlink()
    assert "a.yaml' does not exist. Pass a config of axolotl" in printed("convert-config", file)[1]


def test_nothing_of_several_is_dropped_without_a_word() -> None:
    sets = [{"path": "json", "data_files": ["a.jsonl", "b.jsonl"], "type": "alpaca"}, {"path": "c", "type": "alpaca"}]
    grpo = {"rl": "grpo", "trl": {"reward_funcs": ["rewards.one", "rewards.two"]}}
    found = programs.convert({"base_model": "m", "datasets": sets, "test_datasets": sets, **grpo})
    assert found.options["data"] == ["a.jsonl", "b.jsonl", "c"]
    assert (found.options["eval_data"], found.options["reward"]) == ("a.jsonl", "rewards.py:one")
    assert {"test_datasets", "reward_funcs"} <= found.left_out.keys()
    theirs = {"model_name_or_path": "m", "dataset": "a", "eval_dataset": "b.json, c.json"}
    found = programs.convert(theirs)
    assert found.options["eval_data"] == "b.json" and "eval_dataset" in found.left_out


@pytest.mark.parametrize("steps", [0.25, 5, "5"])
def test_steps_that_are_a_share_are_no_number_of_steps(steps: float | str) -> None:
    config = {"base_model": "m", "datasets": [], "eval_steps": steps, "save_steps": steps}
    found = programs.convert(config)
    counted = {"eval_every": 5, "save_every": 5} if steps != 0.25 else {}
    assert {key: value for key, value in found.options.items() if key.endswith("_every")} == counted
    assert ("eval_steps" in found.left_out) is ("save_steps" in found.left_out) is (steps == 0.25)


def test_lists_and_texts_with_commas_of_llama_factory() -> None:
    theirs = {"model_name_or_path": "m", "dataset": "a", "lora_target": "q_proj, v_proj"}
    found = programs.convert({**theirs, "additional_target": "embed_tokens,lm_head"})
    assert found.fields == {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    predicts = {"model_name_or_path": "m", "adapter_name_or_path": ["f"], "do_predict": True}
    found = programs.convert({**predicts, "eval_dataset": ["one", "two"]})
    assert found.options["data"] == ["one.json", "two.json"] and found.options["adapter"] == "f"


@pytest.mark.parametrize(
    ("given", "warmup"),
    [
        ({"warmup_ratio": 0.1, "warmup_steps": 0}, 0.1),
        ({"warmup_ratio": 0.1, "warmup_steps": 20}, 20.0),
        ({"warmup_ratio": 0.0, "warmup_steps": 0}, 0.0),
        ({"warmup_steps": 0}, 0.0),
    ],
)
def test_steps_of_warmup_that_are_0_leave_the_ratio(given: dict[str, Any], warmup: float) -> None:
    found = programs.convert({"model_name_or_path": "m", "dataset": "a", **given})
    assert found.options["warmup"] == warmup and not found.left_out


@pytest.mark.parametrize("key", ["max_steps", "save_total_limit", "early_stopping_steps"])
def test_a_number_that_is_a_word(key: str) -> None:
    with pytest.raises(PeftcoreError, match=f"'{key}' must be a number, found 'many'"):
        programs.convert({"model_name_or_path": "m", "dataset": "a", key: "many"})
