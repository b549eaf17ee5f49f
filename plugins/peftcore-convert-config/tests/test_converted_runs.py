"""The example configs of axolotl, LLaMA-Factory and torchtune, as `convert-config` converts them, train for two steps.

converted_configs.json has a line for each conversion that differs from the others in more than numbers, and the number
of configs that become it (`benchmarks/coming_from.py --write`).
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aqlm_checkpoints
import audio_models
import image_models
import int4_checkpoints
import nvfp4_checkpoints
import own_code_models
import pytest
import torch
from commands import SPECIAL, WORDS, printed, save_tokenizer, write_jsonl
from PIL import Image
from safetensors import safe_open

from peftcore.cli import config_file
from peftcore.cli.bases import models
from peftcore.cli.tasks import image_chats

CASES: list[dict[str, Any]] = json.loads(Path(__file__).with_name("converted_configs.json").read_text())
SHAPE = {"vocab_size": len(SPECIAL + WORDS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES = {**SHAPE, **WIDTHS, "num_key_value_heads": 2, "max_position_embeddings": 64}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
KINDS: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "gpt2": {**SHAPE, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {**SHAPE, **WIDTHS},
    "phi3": SIZES,
    "falcon_h1": {**SIZES, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    "jamba": {**SIZES, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "qwen3_moe": {**SIZES, **EXPERTS, "head_dim": 8},
    "qwen3_next": {**SIZES, **EXPERTS, "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2}
    | {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "shared_expert_intermediate_size": 16}
    | {"layer_types": ["linear_attention", "full_attention"]},
    "llama4_text": {**SIZES, "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48},
}
GEMMA4: dict[str, Any] = {  # 26B-A4B: experts next to a dense MLP, and layers with one projection for keys and values
    "text_config": {
        **{**SIZES, "head_dim": 8, "global_head_dim": 16, "num_global_key_value_heads": 1, "attention_k_eq_v": True},
        **{"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
        **{"hidden_size_per_layer_input": 0, "layer_types": ["sliding_attention", "full_attention"]},
    },
    "vision_config": {
        **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "position_embedding_size": 16},
    },
    "audio_config": None,
}

SEEING = ("image-text", "image-dpo", "audio-text")
UNPACKED = (
    "falcon_h1",
    "jamba",
    "qwen3_next",
)  # layers with a state: `--pack` says that examples would not be separate


def kind_of(case: dict[str, Any]) -> str:
    """Return the kind of model whose modules a case names."""
    if case["options"].get("task") == "audio-text":
        return "qwen2_audio"
    if case["options"].get("task") in SEEING:
        if "cross_attn|mlp" in str(case["set"]):
            return "mllama"
        if "shared_expert" in str(case["set"]):
            return "llama4"
        return "smolvlm" if "text_model" in str(case["set"]) else "llava"
    named = f"{case['set'].get('target_modules', '')} {case['set'].get('target_parameters', '')}"
    if "language_model" in named and "experts" in named:
        return "gemma4"
    for part, kind in (
        ("'layer'", "dbrx"),  # rewritten with layers
        ("mlp_up", "replit"),
        ("language_model", "gemma3"),
        ("c_attn", "gpt2"),
        ("query_key_value", "gpt_neox"),
        ("qkv_proj", "phi3"),
        ("x_proj", "jamba"),
        ("linear_attn", "qwen3_next"),
        ("shared_expert", "llama4_text"),
        ("in_proj", "falcon_h1"),
        ("'gate_proj', 'up_proj', 'down_proj'] ['experts", "llama4_text"),
        ("experts", "qwen3_moe"),
    ):
        if part in named:
            return kind
    return "llama"


def rows(task: str | None, ebft: str = "") -> list[dict[str, Any]]:
    """Return examples of a task; for EBFT with completions that are long enough to continue their prefixes."""
    if ebft:
        return [{"prompt": f"the film is {word}", "completion": "it was fun and good " * 5} for word in WORDS]
    compared = [(f"the film is {word}", "it was fun and good", "it was dull and bad") for word in WORDS]
    if task in ("dpo", "orpo", "reward"):
        return [{"prompt": prompt, "chosen": good, "rejected": bad} for prompt, good, bad in compared]
    if task == "kto":
        return [
            {"prompt": prompt, "completion": answer, "label": i == 0}
            for prompt, *answers in compared
            for i, answer in enumerate(answers)
        ]
    parts = [{"type": "image", "path": "a.png"}, {"type": "text", "text": "is it good"}]
    asked: dict[str, Any] = {"role": "user", "content": parts}
    if task == "audio-text":
        asked["content"][0] = {"type": "audio", "path": "a.wav"}
    if task == "image-dpo":
        return [{"prompt": [asked], "chosen": good, "rejected": bad} for _, good, bad in compared]
    if task in ("image-text", "audio-text"):
        return [{"messages": [asked, {"role": "assistant", "content": good}]} for _, good, _ in compared]
    return [{"prompt": prompt, "completion": good} for prompt, good, _ in compared]


def make(kind: str, folder: Path, name: str = "", *, wide: bool = False) -> None:
    """Write a tiny model with random weights and its tokenizer, in 4 bits if its name says so.

    A `wide` one has layers with multiples of 32 inputs.
    """
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma4Config,
        Gemma4ForConditionalGeneration,
    )

    torch.manual_seed(0)
    if kind in own_code_models.KINDS:
        own_code_models.KINDS[kind](folder)
        return
    if kind == "qwen2_audio":
        audio_models.qwen(folder)
        return
    if kind in image_models.KINDS:
        image_models.KINDS[kind](folder)
        return
    if kind == "gemma3":
        seeing = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        seeing |= {"image_size": 16, "patch_size": 8}
        config = Gemma3Config(
            text_config={**SIZES, "head_dim": 8}, vision_config=seeing, mm_tokens_per_image=1, **SHAPE
        )
        Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    elif kind == "gemma4":
        model = Gemma4ForConditionalGeneration(Gemma4Config(**GEMMA4))
        if "NVFP4" in name:
            how = nvfp4_checkpoints.config("modelopt")
            nvfp4_checkpoints.write_folder(model, folder, "modelopt", how, keep="vision", one_scale=True)
        else:
            model.save_pretrained(folder)
    else:
        packed = next((how for how in ("gptq", "awq", "nvfp4", "aqlm") if how in name.lower()), None)
        sizes = {**KINDS[kind], **({"intermediate_size": 64} if packed or wide else {})}  # whole groups of 32
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
        if packed is None:
            model.save_pretrained(folder)
        elif packed == "aqlm":
            aqlm_checkpoints.write_folder(model, folder, "1x16")
        elif packed == "nvfp4":
            nvfp4_checkpoints.write_folder(
                model, folder, "modelopt", nvfp4_checkpoints.config("modelopt"), one_scale=True
            )
        else:
            how = int4_checkpoints.gptq if packed == "gptq" else int4_checkpoints.awq
            int4_checkpoints.write_folder(model, folder, int4_checkpoints.config(packed, 32), how, 32, smallest=1)
    save_tokenizer(folder)


@pytest.fixture(autouse=True)
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let transformers copy the code of models to a temporary folder."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        del sys.modules[name]


def named(model: Path, task: str, fields: dict[str, Any]) -> set[str]:
    """Return the linear layers and parameters of experts of a base that a config's fields name, by PEFT's rules."""

    def matches(name: str, wanted: list[str] | str) -> bool:
        if isinstance(wanted, str):
            return re.fullmatch(wanted, name) is not None
        return any(name == each or name.endswith(f".{each}") for each in wanted)

    base = models.empty_model(str(model), task)
    layers = [name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)]
    found = {name for name in layers if matches(name, fields.get("target_modules", []))}
    for path, module in base.named_modules():
        parameters = [name for name, _ in module.named_parameters(path, recurse=False)]
        count = sum(matches(name, fields.get("target_parameters", [])) for name in parameters)
        found |= {path + i * ".base_layer" for i in range(count)}  # as PEFT wraps a module for each
    return found


def adapted(folder: Path) -> set[str]:
    """Return the layers and modules of experts that an adapter's file has tensors for."""
    with safe_open(folder / "adapter_model.safetensors", "pt") as opened:
        keys = [key.removeprefix("base_model.model.") for key in opened.keys()]  # noqa: SIM118
    return {key.partition(".lora_")[0] for key in keys if ".lora_" in key}


@pytest.mark.filterwarnings("ignore")  # of models and trainers; what they compute is tested elsewhere
@pytest.mark.nightly
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["example"])
def test_a_converted_config_trains(case: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = kind_of(case)
    is_rounded = case["options"].get("quantize", "").startswith("8da4w")
    make(kind, tmp_path / "base", case["model"], wide=is_rounded)
    if "teacher_weight" in case["options"]:
        make("llama", tmp_path / "teacher")
    options = dict(case["options"])
    options.pop("parallel", None)  # for torchrun, which tests/parallel starts
    if options.get("precision") == "fp16":  # for CUDA
        options["precision"] = "bf16"
    if is_rounded:
        options["quantize"] = "8da4w"  # with groups that fit into tiny layers
    if kind in UNPACKED:
        options.pop("pack", None)
    if kind in own_code_models.KINDS:
        options["trust_remote_code"] = True  # as a comment of the conversion says
    if kind == "llama4":  # its processor of images needs torchvision
        processor = image_chats.checked(image_models.llama4(tmp_path / "base"), kind)
        monkeypatch.setattr(models, "load_processor", lambda *_: processor)
    options.pop("chat_template", None)  # the rows are not conversations
    Image.new("RGB", (8, 8), (200, 20, 20)).save(tmp_path / "a.png")  # of conversations with images
    audio_models.save_tone(tmp_path / "a.wav", 0.2)
    data = write_jsonl(tmp_path / "rows.jsonl", rows(options.get("task"), options.get("ebft", "")))
    room = 64 if options.get("task") in SEEING else 32
    small = {
        "max_length": min(room, options.get("max_length", room)),
        "batch_size": min(4, options.get("batch_size", 4)),
    }
    small |= {"grad_accum": 1, "holdout": max(2, options.get("holdout", 2))}
    if "ebft" in options:
        small |= {"answer_tokens": 8}
    options |= {"model": str(tmp_path / "base"), "data": str(data), **small}
    if "teacher_weight" in options:
        options["teacher"] = str(tmp_path / "teacher")
    fields = dict(case["set"])
    if "exclude_modules" in fields:  # Qwen-VL's name for the part that LLaVA, which stands for it, has by others
        fields["exclude_modules"] = fields["exclude_modules"].replace("visual", "(vision_tower|multi_modal_projector)")
    config_file.write(tmp_path / "run.toml", {**options, "set": fields})
    status, output = printed(
        "train", "--config", tmp_path / "run.toml", "--steps", "2", "--eval-every", "1", "-o", tmp_path / "run"
    )
    assert status == 0, output
    assert (tmp_path / "run/adapter/adapter_config.json").exists()
    assert math.isfinite(json.loads((tmp_path / "run/result.json").read_text())["after"]["loss"])
    if kind in ("dbrx", "gemma4", "llama4", "replit"):
        assert adapted(tmp_path / "run/adapter") == named(tmp_path / "base", options.get("task", "causal-lm"), fields)
        trusted = ["--trust-remote-code"] if kind in own_code_models.KINDS else []
        status, output = printed("eval", "-a", tmp_path / "run", "-d", data, *trusted)
        assert status == 0, output
