"""Configs of torchtune's recipes with LoRA."""

from __future__ import annotations

from typing import Any

from peftcore_convert_config.reading import IMAGES, Reading, asks, dataset, judged, keyed, optimizer, single

_WHOLE = "--set modules_to_save= trains whole modules next to the adapter"
_READ = "for Llama 4 with images, peftcore train --task image-text with --set target_modules= for the layers"
_NOTHING = """
save_adapter_weights_only shuffle collate_fn dataloader low_cpu_ram log_every_n_steps log_peak_memory_stats log_level
device fsdp_cpu_offload custom_sharded_layers fsdp batch_size_val
"""
NOTHING = frozenset(_NOTHING.split())
NOT_HERE = keyed(
    {
        "torch.compile after peftcore.apply in a script": "compile",
        "--gradient-checkpointing; peftcore suggest says what fits": "enable_activation_offloading",
        "nothing to gain: only the adapter has gradients": "optimizer_in_bwd",
        "the reference is always the base without the adapter": "ref_checkpointer",
        "torch.profiler in a script": "profiler",
    }
)
REFUSED: dict[str, str] = {}
_ROUNDED = (
    "Int8DynActInt4WeightQATQuantizer with groups of 32, 64, 128 or 256, Int4WeightOnlyQATQuantizer, or --quantize"
)
_FORMATS = {32: "8da4w", 64: "8da4w-g64", 128: "8da4w-g128", 256: "8da4w-g256"}
_SETS = {
    "alpaca_dataset": "tatsu-lab/alpaca",
    "alpaca_cleaned_dataset": "yahma/alpaca-cleaned",
    "stack_exchange_paired_dataset": "lvwerra/stack-exchange-paired",
    "grammar_dataset": "liweili/c4_200m",
    "samsum_dataset": "Samsung/samsum",
    "slimorca_dataset": "Open-Orca/SlimOrca-Dedup",
    "wikitext_dataset": "EleutherAI/wikitext_document_level",
    "cnn_dailymail_articles_dataset": "ccdv/cnn_dailymail",
    "the_cauldron_dataset": "HuggingFaceM4/the_cauldron",
    "hh_rlhf_helpful_dataset": "RLHFlow/HH-RLHF-Helpful-standard",
}
_STACK = "prompt=question,chosen=response_j,rejected=response_k"
_NAMES = {"output_proj": ["o_proj"]}
_FUSED = {"q_proj": ["qkv_proj"], "k_proj": ["qkv_proj"], "v_proj": ["qkv_proj"]}  # in transformers' Phi-3
_PARTS = {
    "llama3_2_vision": {"decoder_trainable": "frozen", "encoder_trainable": "lora", "fusion_trainable": "lora"},
    "llama4": {"decoder_trainable": "lora", "encoder_trainable": "frozen", "fusion_trainable": "lora"},
}
_SEEING_MLP = r"|mlp\.fc[12]"
_CROSS = r"\d*[38]"  # layers with cross-attention: every fifth, from the one with index 3


def convert(config: Reading) -> None:
    """Take from a config all that has a counterpart."""
    _model(config)
    _rounding(config)
    _teacher(config)
    _data(config)
    _steps(config)


def _model(config: Reading) -> None:
    model, files = config.part("model"), config.part("checkpointer")
    component = str(model.take("_component_", ""))
    config.options["model"] = str(files.take("checkpoint_dir", "")).rstrip("/")
    four_bits = component.rpartition(".")[2].startswith("qlora") or model.take("quantize_base", False)
    dora = model.take("use_dora", False)
    config.options["method"] = "dora" if dora else "qlora" if four_bits else "lora"
    if dora and four_bits:
        config.options["quantize"] = "nf4"
    model.field("lora_rank", "r")
    model.field("lora_alpha", "lora_alpha")
    model.field("lora_dropout", "lora_dropout")
    attention, has_mlp = list(model.take("lora_attn_modules", [])), bool(model.take("apply_lora_to_mlp"))
    has_head = bool(model.take("apply_lora_to_output"))
    kind = component.split(".")[-2] if "." in component else ""
    parts = {key: str(model.take(key, default)).lower() for key, default in _PARTS.get(kind, {}).items()}
    full = next((key for key, how in parts.items() if how not in ("lora", "frozen")), None)
    if full is not None:
        model.refuse(full, _WHOLE)
    if kind == "llama3_2_vision":
        config.options["task"] = "image-text"
        config.to_do.append(IMAGES)
        config.fields["target_modules"] = _seeing(parts, attention, has_mlp=has_mlp, has_head=has_head)
    elif kind == "llama4":
        if parts["encoder_trainable"] == "lora" or parts["decoder_trainable"] == "frozen":
            config.refuse("model", _READ)
        config.fields["target_modules"] = _named(attention, {}, has_mlp=has_mlp, has_head=has_head)
        if has_mlp:
            config.fields["target_parameters"] = ["experts.gate_up_proj", "experts.down_proj"]
    else:
        fused = _FUSED if kind in ("phi3", "phi4") else {}
        config.fields["target_modules"] = _named(attention, fused, has_mlp=has_mlp, has_head=has_head)
    if asks(files.take("adapter_checkpoint")) and config.take("resume_from_checkpoint"):
        config.leave_out("adapter_checkpoint", "--adapter FOLDER starts from an adapter")
    if config.take("resume_from_checkpoint"):
        config.leave_out("resume_from_checkpoint", "--resume continues a run of peftcore")
    config.part("tokenizer").option("max_seq_len", "max_length", int)


def _named(attention: list[str], fused: dict[str, list[str]], *, has_mlp: bool, has_head: bool) -> list[str]:
    """Return the names of a language model's layers in transformers."""
    names = {**_NAMES, **fused}
    targets = [name for each in attention for name in names.get(each, [each])]
    if has_mlp:
        targets += ["gate_up_proj", "down_proj"] if fused else ["gate_proj", "up_proj", "down_proj"]
    return list(dict.fromkeys([*targets, *(["lm_head"] if has_head else [])]))


def _seeing(parts: dict[str, str], attention: list[str], *, has_mlp: bool, has_head: bool) -> str:
    """Return a pattern of layers of Llama 3.2 Vision in transformers.

    torchtune's fusion is the cross-attention with its MLPs and the global layers of the part that reads images.
    """
    names = "|".join(_named(attention, {}, has_mlp=False, has_head=False))
    mlp = "|gate_proj|up_proj|down_proj" if has_mlp else ""
    seen = rf"layers\.\d+\.(self_attn\.({names}){_SEEING_MLP if has_mlp else ''})"
    found = []
    if parts["encoder_trainable"] == "lora":
        found.append(rf"vision_model\.transformer\.{seen}")
    if parts["fusion_trainable"] == "lora":
        found += [rf"vision_model\.global_transformer\.{seen}", rf"layers\.{_CROSS}\.(cross_attn|mlp)\.({names}{mlp})"]
    if parts["decoder_trainable"] == "lora":
        found.append(rf"language_model\.layers\.\d*[0124-79]\.(self_attn|mlp)\.({names}{mlp})")
    if has_head:
        found += ["lm_head"] * (parts["decoder_trainable"] == "lora")
        found += ["multi_modal_projector"] * (parts["fusion_trainable"] == "lora")
    return rf".*({'|'.join(found)})"


def _rounding(config: Reading) -> None:
    """Take what makes a training quantization-aware: the base is rounded, and for 8da4w the inputs of its layers."""
    how = config.part("quantizer")
    kind, group = str(how.take("_component_", "")).rpartition(".")[2], how.take("groupsize", 256)
    if not config.has("quantizer"):
        return
    if config.options["method"] == "qlora" or "quantize" in config.options:
        config.refuse("quantizer", "a model that is not qlora_*: the base is rounded once")
    if kind.startswith("Int4WeightOnlyQAT"):
        config.options["quantize"] = "affine4"
    elif kind.startswith("Int8DynActInt4WeightQAT") and group in _FORMATS:
        config.options["quantize"] = _FORMATS[group]
        config.to_do.append("quantize: the format is in the package peftcore-8da4w")
    else:
        config.refuse("quantizer", _ROUNDED)


def _teacher(config: Reading) -> None:
    """Take what makes a training a distillation."""
    files, model, loss = (config.part(key) for key in ("teacher_checkpointer", "teacher_model", "kd_loss"))
    folder, kind = files.take("checkpoint_dir"), str(loss.take("_component_", ""))
    ratio = config.take("kd_ratio", 0.5)
    if not (asks(folder) or asks(model.take("_component_"))):
        return
    if "ForwardKL" not in kind:
        config.refuse("kd_loss", "ForwardKLLoss, by --teacher; or a loop of your own with peftcore.apply")
    if not asks(folder):
        config.refuse("teacher_model", "a teacher_checkpointer, whose checkpoint_dir is --teacher")
    config.options["teacher"] = str(folder).rstrip("/")
    config.options["teacher_weight"] = float(ratio)


def _data(config: Reading) -> None:
    several, one = config.take("datasets"), config.take("dataset")
    given: list[Any] = several or one or []
    given = given if isinstance(given, list) else [given]
    config.options["data"] = single([_one(config, each, weighted=len(given) > 1) for each in given])
    held = config.take("dataset_val")
    if asks(held):
        config.options["eval_data"] = _one(config, held)
        config.option("run_val_every_n_steps", "eval_every", int)
    else:
        config.options["holdout"] = 1
        config.take("run_val_every_n_steps")


def _one(config: Reading, given: dict[str, Any], *, weighted: bool = False) -> str:
    part = Reading(given)
    name = str(part.take("_component_", "")).rpartition(".")[2]
    part.take("transform")
    if part.take("packed"):
        config.options["pack"] = True
    files, source = part.take("data_files"), part.take("source", _SETS.get(name, name))
    if name == "stack_exchange_paired_dataset":
        config.options["columns"] = _STACK
    columns = part.take("column_map")
    if asks(columns):
        config.options["columns"] = ",".join(f"{ours}={theirs}" for ours, theirs in columns.items())
    for key in ("train_on_input", "conversation_style", "new_system_prompt", "streaming"):
        part.take(key)
    found = files if isinstance(files, str) else dataset(source, part.take("split"), part.take("subset"))
    weight = part.take("weight", 1)
    for key in part.left():
        if key not in ("split", "subset"):
            config.leave_out(key, "an option of the data set; see docs/command-line.md for the rows that are read")
    return f"{found}:{weight:g}" if weighted and weight != 1 else found


def _steps(config: Reading) -> None:
    config.option("batch_size", "batch_size", int)
    config.option("gradient_accumulation_steps", "grad_accum", int)
    epochs, steps = config.take("epochs", 1), config.take("max_steps_per_epoch")
    if asks(steps):
        config.options["steps"] = int(steps) * int(epochs)
    else:
        config.options["epochs"] = float(epochs)
    how = config.part("optimizer")
    kind = str(how.take("_component_", ""))
    if kind.endswith("torch.optim.AdamW"):
        config.options["optim"] = "adamw_torch_fused" if how.take("fused") else "adamw_torch"
        config.options["weight_decay"] = 0.01  # PyTorch's default
    else:
        optimizer(config, "optimizer", kind.rpartition(".")[2])
        if config.options.get("optim") != "paged_adamw_8bit":
            config.refuse("optimizer", "one of Trainer's (--optim)")
    how.option("lr", "lr", float)
    how.option("weight_decay", "weight_decay", float)
    rate = config.part("lr_scheduler")
    if asks(rate.take("_component_")):
        config.options["scheduler"] = "cosine"
    else:
        config.options["scheduler"] = "constant"
    rate.option("num_warmup_steps", "warmup", float)
    loss = config.part("loss")
    if "DPO" in str(loss.take("_component_")):
        judged(config, "loss", "dpo")
        loss.option("beta", "beta", float)
        if asks(loss.take("label_smoothing")):
            config.leave_out("label_smoothing", "TRL's DPOTrainer")
    config.options["max_grad_norm"] = float(config.take("clip_grad_norm", 0))
    if config.take("dtype") == "bf16":
        config.options["dtype"] = "bf16"
    elif config.take("dtype") == "fp32":
        config.options["dtype"] = "fp32"
    if config.take("enable_activation_checkpointing"):
        config.options["gradient_checkpointing"] = True
    logger = str(config.part("metric_logger").take("_component_", ""))
    for kind, service in (("WandB", "wandb"), ("TensorBoard", "tensorboard"), ("Comet", "comet_ml")):
        if kind in logger:
            config.options["report_to"] = service
    config.option("seed", "seed", int)
    config.option("output_dir", "output")
