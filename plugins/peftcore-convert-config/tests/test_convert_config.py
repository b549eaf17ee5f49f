"""Configs of axolotl, LLaMA-Factory and torchtune become options of `peftcore train`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import printed
from peftcore_convert_config import programs

from peftcore import PeftcoreError

DOCS = Path(__file__).parents[3] / "docs/coming-from"
PAIRS = [
    pytest.param(program, *pair, id=f"{program}-{i}")
    for program in programs.PROGRAMS
    for i, pair in enumerate(
        re.findall(r"```yaml\n(.*?)```\n+(?:[^`]*?)```toml\n(.*?)```", (DOCS / f"{program}.md").read_text(), re.DOTALL)
    )
]


SEEING = {"model_name_or_path": "Qwen/Qwen2.5-VL-7B-Instruct", "finetuning_type": "lora", "image_max_pixels": 4096}


def read_toml(text: str) -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    found: dict[str, Any] = tomllib.loads(text)
    return found


@pytest.mark.parametrize(("program", "theirs", "ours"), PAIRS)
def test_the_file_of_a_page_becomes_the_one_next_to_it(program: str, theirs: str, ours: str) -> None:
    config = yaml.safe_load(theirs)
    assert programs.program_of(config) == program
    found = programs.convert(config)
    shown = read_toml(ours)
    named = ("data", "model") if program != "axolotl" else ()  # files that the programs find by names of their own
    options = {key: value for key, value in found.options.items() if key not in ("output", *named)}
    assert {**options, "set": found.fields} == {key: value for key, value in shown.items() if key not in named}
    assert found.left_out == {}


@pytest.mark.parametrize("program", programs.PROGRAMS)
def test_keys_without_a_counterpart_are_on_the_page(program: str) -> None:
    module = programs.PROGRAMS[program]
    cells = re.findall(r"^\| (.*?) \| ", (DOCS / f"{program}.md").read_text(), re.MULTILINE)
    named = set(re.findall(r"\w+", " ".join(cells)))
    known = {*module.NOTHING, *module.NOT_HERE, *module.REFUSED}
    assert len(known) > 15
    assert known - named == set()
    assert not module.NOTHING & module.NOT_HERE.keys()


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


def test_conversations_with_images() -> None:
    pattern = r"model.language_model.layers.[\d]+.self_attn.(q|v)_proj"
    config = {"base_model": "m", "adapter": "lora", "processor_type": "AutoProcessor", "freeze_mm_modules": True}
    found = programs.convert(
        {**config, "lora_target_modules": pattern, "datasets": [{"path": "a", "type": "chat_template"}]}
    )
    assert found.options["task"] == "image-text" and found.fields == {"target_modules": pattern}
    assert found.left_out == {} and len(found.to_do) == 1 and "save images" in found.to_do[0]
    assert programs.convert({**config, "lora_target_linear": True}).left_out.keys() == {"freeze_mm_modules"}
    factory = programs.convert({**SEEING, "lora_target": "all", "freeze_vision_tower": True})
    assert factory.options["task"] == "image-text" and factory.left_out.keys() == {"image_max_pixels"}
    assert factory.fields["exclude_modules"] == r".*visual\..*"  # as there, the part that reads images stays frozen


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"base_model": "m", "processor_type": "AutoProcessor", "datasets": [{"path": "org/vision-audio"}]},
            "'processor_type: Auto.* for audio in chats",
        ),
        ({**SEEING, "stage": "dpo"}, "'image_max_pixels: 4096' .* DPOTrainer"),
        ({**SEEING, "freeze_language_model": True}, "'freeze_language_model: True' .* --set target_modules="),
        ({**SEEING, "model_name_or_path": "org/other"}, "'model_name_or_path: org/other' .* target_modules="),
        ({"base_model": "m", "adapter": "lora", "rl": "ipo"}, "'rl: ipo' has no counterpart .* TRL's trainers"),
        (
            {"base_model": "m", "adapter": "lora", "learning_rate": "fast"},
            "'learning_rate' must be a number, found",
        ),
        ({"model_name_or_path": "m-AWQ", "finetuning_type": "lora"}, "quantization.load in a script"),
        ({"model_name_or_path": "m", "finetuning_type": "full"}, "'finetuning_type: full' has no counterpart"),
        ({"model": {"image_size": 5}, "checkpointer": {}}, "for Llama 3.2 Vision"),
        ({"learning_rate": 1}, "of no program that is known"),
    ],
)
def test_what_is_not_here_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(PeftcoreError, match=message):
        programs.convert(config)


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
    assert "cannot be read as YAML" in printed("convert-config", file)[1]
    file.unlink()
    assert "a.yaml' does not exist. Pass a config of axolotl" in printed("convert-config", file)[1]
