"""Configs of torchtune's recipes with LoRA."""

from __future__ import annotations

from typing import Any

from peftcore_convert_config.reading import Reading, asks, dataset, keyed, optimizer, single

_IMAGES = (
    "for Llama 3.2 Vision, a loop of your own with peftcore.apply; peftcore train --task image-text trains SmolVLM, "
    "Qwen2.5-VL and LLaVA"
)
_DISTILLING = "a loop of your own with peftcore.disabled for the teacher, or TRL's GKD"
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
REFUSED = keyed(
    {
        "none: QAT with LoRA": "quantizer",
        _DISTILLING: "teacher_model teacher_checkpointer kd_loss kd_ratio",
    }
)
_SETS = {
    "alpaca_dataset": "tatsu-lab/alpaca",
    "alpaca_cleaned_dataset": "yahma/alpaca-cleaned",
    "stack_exchange_paired_dataset": "lvwerra/stack-exchange-paired",
    "grammar_dataset": "liweili/c4_200m",
    "samsum_dataset": "Samsung/samsum",
    "slimorca_dataset": "Open-Orca/SlimOrca-Dedup",
    "wikitext_dataset": "EleutherAI/wikitext_document_level",
    "cnn_dailymail_articles_dataset": "ccdv/cnn_dailymail",
    "hh_rlhf_helpful_dataset": "RLHFlow/HH-RLHF-Helpful-standard",
}
_STACK = "prompt=question,chosen=response_j,rejected=response_k"
_NAMES = {"output_proj": ["o_proj"]}
_FUSED = {"q_proj": ["qkv_proj"], "k_proj": ["qkv_proj"], "v_proj": ["qkv_proj"]}  # in transformers' Phi-3


def convert(config: Reading) -> None:
    """Take from a config all that has a counterpart."""
    for key, instead in REFUSED.items():
        if asks(config.take(key)):
            config.refuse(key, instead)
    _model(config)
    _data(config)
    _steps(config)


def _model(config: Reading) -> None:
    model, files = config.part("model"), config.part("checkpointer")
    component = str(model.take("_component_", ""))
    if "vision" in component or asks(model.take("image_size")):
        config.refuse("model", _IMAGES)
    for key in ("decoder_trainable", "encoder_trainable", "fusion_trainable"):
        if asks(model.take(key)):
            model.refuse(key, _IMAGES)
    config.options["model"] = str(files.take("checkpoint_dir", "")).rstrip("/")
    four_bits = component.rpartition(".")[2].startswith("qlora") or model.take("quantize_base", False)
    dora = model.take("use_dora", False)
    config.options["method"] = "dora" if dora else "qlora" if four_bits else "lora"
    if dora and four_bits:
        config.options["quantize"] = "nf4"
    model.field("lora_rank", "r")
    model.field("lora_alpha", "lora_alpha")
    model.field("lora_dropout", "lora_dropout")
    fused = "phi3" in component or "phi4" in component
    names = {**_NAMES, **(_FUSED if fused else {})}
    targets = [name for each in model.take("lora_attn_modules", []) for name in names.get(each, [each])]
    if model.take("apply_lora_to_mlp"):
        targets += ["gate_up_proj", "down_proj"] if fused else ["gate_proj", "up_proj", "down_proj"]
    if model.take("apply_lora_to_output"):
        targets += ["lm_head"]
    config.fields["target_modules"] = list(dict.fromkeys(targets))
    if asks(files.take("adapter_checkpoint")) and config.take("resume_from_checkpoint"):
        config.leave_out("adapter_checkpoint", "--adapter FOLDER starts from an adapter")
    if config.take("resume_from_checkpoint"):
        config.leave_out("resume_from_checkpoint", "--resume continues a run of peftcore")
    tokenizer = config.part("tokenizer")
    if "transform" in str(tokenizer.take("_component_")) and asks(tokenizer.take("max_num_tiles")):
        tokenizer.refuse("max_num_tiles", _IMAGES)
    tokenizer.option("max_seq_len", "max_length", int)


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
    if "multimodal" in str(given.get("_component_")) or asks(part.take("transform")):
        config.refuse("dataset" if "_component_" in given else "datasets", _IMAGES)
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
        config.options["task"] = "dpo"
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
