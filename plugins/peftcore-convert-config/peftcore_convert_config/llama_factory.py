"""Configs of LLaMA-Factory."""

from __future__ import annotations

from peftcore_convert_config.reading import (
    IMAGES,
    Reading,
    asks,
    held_out,
    judged,
    keyed,
    names_of,
    only_first,
    optimizer,
    single,
    training,
)

_OWN = "--trust-remote-code and --task image-text, with --set target_modules= for layers of its language model"
_FROZEN = "peftcore train --task image-text, with --set target_modules= for the layers that are to be adapted"
_NAMES = "data: write the files or hub ids that dataset_info.json gives for these names"
_ANSWERS = "peftcore eval --adapter FOLDER --data FILE --eval-answers 50"
_DTYPES = {"bfloat16": "bf16", "float32": "fp32"}
_MEGATRON = "none: Megatron's division of a model (docs/distributed.md)"
_SIZES = "tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size expert_model_parallel_size"
_NOTHING = """
do_train flash_attn enable_liger_kernel use_v1_kernels kernel_config plot_loss preprocessing_num_workers
dataloader_num_workers overwrite_cache tokenized_path model_class sample_backend max_new_tokens infer_dtype
trust_remote_code train_on_prompt mask_history per_device_eval_batch_size logging_steps save_only_model
overwrite_output_dir ddp_timeout init_config double_quantization dataset_dir run_name eval_strategy pissa_convert
compute_accuracy predict_with_generate packing export_legacy_format use_distributed_optimizer overlap_param_gather
overlap_grad_reduce export_hf_on_finish mixed_precision
"""
NOTHING = frozenset(_NOTHING.split())
NOT_HERE = keyed(
    {
        "TRL's trainers with peft_config=peftcore.config('lora')": "pref_ftx",
        "a script (docs/distributed.md)": "deepspeed ray_num_workers",
        "save the images with at most this many pixels": "image_max_pixels",
        "videos are not read": "video_max_pixels video_fps video_maxlen",
        "none: KTransformers' engine": "use_kt kt_config kt_cpu_activation kt_weight_path kt_non_expert_weight_path",
    }
)
_STAGES = {"sft": None, "pt": None, "dpo": "dpo", "kto": "kto", "rm": "reward"}
REFUSED = keyed(
    {
        _MEGATRON: "sequence_parallel use_packed_sequences virtual_pipeline_model_parallel_size",
        "--set modules_to_save=": "freeze_trainable_layers freeze_trainable_modules use_llama_pro",
        "peftcore merge, then peftcore.quantize": "export_quantization_bit",
    }
)


def convert(config: Reading) -> None:
    """Take from a config all that has a counterpart."""
    for key, instead in REFUSED.items():
        if asks(config.take(key)):
            config.refuse(key, instead)
    for key in _SIZES.split():
        if config.take(key, 1) != 1:
            config.refuse(key, _MEGATRON)
    model = str(config.take("model_name_or_path", config.take("model", "")))
    config.take("model")
    config.options["model"] = model
    new = config.part("peft_config")  # of its new format
    for part in (config, new):
        if part.has("export_dir"):
            return _merging(config, part)
    if config.take("do_predict"):
        if not config.take("do_train"):
            return _predicting(config)
        config.leave_out("do_predict", f"after training, {_ANSWERS}")
    _method(config)
    _task(config)
    _images(config)
    _data(config)
    _steps(config)
    config.option("output_dir", "output")
    report = config.take("report_to")
    if asks(report) and report != "none":
        config.options["report_to"] = report if isinstance(report, str) else ",".join(report)


def _merging(config: Reading, part: Reading) -> None:
    """Take what makes a config one of `peftcore merge`."""
    config.command = part.command = "merge"
    _adapter(part, "export_dir")
    config.options["output"] = str(part.take("export_dir"))
    size = part.take("export_size", config.take("export_size"))
    if asks(size):
        config.options["shard_size"] = f"{size}GB"
    dtype = part.take("infer_dtype", config.take("infer_dtype", "auto"))
    if dtype in _DTYPES:
        config.options["dtype"] = _DTYPES[dtype]
    elif dtype != "auto":
        config.leave_out("infer_dtype", "bf16 or fp32 (--dtype)")
    for key in ("name", "export_device", "export_legacy_format", "template", "finetuning_type"):
        config.take(key)
    hub = part.take("export_hub_model_id")
    if asks(hub):
        config.leave_out("export_hub_model_id", "peftcore push, of the adapter")


def _predicting(config: Reading) -> None:
    """Take what makes a config one of `peftcore eval`, which answers held-out examples."""
    config.command = "eval"
    _adapter(config, "do_predict")
    stage = config.take("stage", "sft")
    if stage != "sft":
        config.refuse("stage", "peftcore eval measures what an adapter was trained for")
    names = config.take("eval_dataset", config.take("dataset", ""))
    config.options["data"] = single([_file(name) for name in names_of(names)])
    config.to_do.append(_NAMES)
    config.options["eval_answers"] = int(config.take("max_samples", 1000))
    config.options["answer_tokens"] = int(config.take("max_new_tokens", 1024))  # LLaMA-Factory's default
    config.option("cutoff_len", "max_length", int)
    config.option("per_device_eval_batch_size", "batch_size", int)
    for key in ("template", "output_dir", "report_to", "finetuning_type", "dataset"):
        config.take(key)


def _adapter(part: Reading, key: str) -> None:
    """Take the one adapter that a config without training is about."""
    found = part.take("adapter_name_or_path")
    names = names_of(found) if asks(found) else []
    if len(names) != 1:
        part.refuse(key, f"a config with one adapter_name_or_path, found {len(names)}")
    part.options["adapter"] = names[0]


def _method(config: Reading) -> None:
    new = config.part("peft_config")
    kind = config.take("finetuning_type", new.take("name", "lora"))
    if kind not in ("lora", "oft"):
        config.refuse("finetuning_type", "peftcore compare has full fine-tuning as a reference")
    config.options["method"] = "dora" if config.take("use_dora") else kind
    quantized = config.part("quant_config")
    bits = config.take("quantization_bit", quantized.take("quantization_bit"))
    if asks(bits):
        if bits != 4 or config.take("quantization_method", quantized.take("name", "bnb")) not in (
            "bnb",
            "bitsandbytes",
        ):
            config.refuse("quantization_bit", "4 bits by --quantize nf4")
        config.options["quantize"] = "nf4"
    for key in ("quantization_method", "quantization_bit"):
        config.take(key)
    for part in (config, new):
        part.option("adapter_name_or_path", "adapter")
        for theirs in ("lora_rank", "r"):
            part.field(theirs, "r")
        for name in ("lora_alpha", "lora_dropout", "use_rslora", "oft_block_size"):
            part.field(name, name)
        for theirs in ("lora_target", "oft_target", "target_modules"):
            targets = part.take(theirs)
            if asks(targets) and targets != "all":
                config.fields["target_modules"] = names_of(targets)
    if kind == "oft":
        config.fields.pop("lora_alpha", None)
    elif "r" in config.fields:
        config.fields.setdefault("lora_alpha", 2 * config.fields["r"])
    whole = config.take("additional_target")
    if asks(whole):
        config.fields["modules_to_save"] = names_of(whole)
    config.field("loraplus_lr_ratio", "lora_plus_ratio")
    niter = config.take("pissa_iter", 16)
    if config.take("pissa_init"):
        config.fields["init_lora_weights"] = f"pissa_niter_{niter}" if niter > 0 else "pissa"


def _task(config: Reading) -> None:
    stage = config.take("stage", "sft")
    if stage not in _STAGES:
        config.refuse("stage", "TRL's trainers with peft_config=peftcore.config('lora')")
    loss = config.take("pref_loss", "sigmoid")
    if loss not in ("sigmoid", "orpo"):
        config.refuse("pref_loss", "TRL's trainers with peft_config=peftcore.config('lora')")
    task = "orpo" if loss == "orpo" else _STAGES[stage]
    if task is not None:
        config.options["task"] = task
    config.option("pref_beta", "beta", float)


def _images(config: Reading) -> None:
    """Take what makes a training one on conversations with images; only the language model is then adapted."""
    parts = {"freeze_vision_tower": True, "freeze_multi_modal_projector": True, "freeze_language_model": False}
    given = {key: config.take(key) for key in parts}
    if not any(map(config.has, (*parts, "image_max_pixels", "video_max_pixels"))):
        return
    task = config.options.pop("task", None)
    other = next((key for key, frozen in parts.items() if given[key] not in (None, frozen)), None)
    if other is not None:
        config.refuse(other, _FROZEN)
    model = config.options["model"].lower()
    if "target_modules" not in config.fields:
        own = "moss-vl" in model  # its parts: LLaMA-Factory's model_utils/visual.py
        if not own and ("qwen" not in model or "vl" not in model):
            config.refuse("model_name_or_path", _OWN)
        config.fields["exclude_modules"] = r".*visual\..*"
        if own:
            config.options["trust_remote_code"] = True
            config.to_do.append("trust_remote_code: read the code of the model's repository before you run it")
    config.options["task"] = "image-text"
    if task is not None:
        judged(config, "pref_loss" if task == "orpo" else "stage", task)
    config.to_do.append(IMAGES)


def _data(config: Reading) -> None:
    named = config.take("dataset", config.take("train_dataset", ""))
    config.take("train_dataset")
    config.options["data"] = single([_file(name) for name in names_of(named)])
    config.to_do.append(_NAMES)
    most = config.take("max_samples")
    if asks(most):
        config.to_do.append(f'data: of a hub id, "ORG/NAME@train[:{most}]"; of a file, its first {most} lines')
    held = config.take("eval_dataset")
    if asks(held):
        found = [_file(name) for name in names_of(held)]
        config.options["eval_data"] = only_first(config, "eval_dataset", found)
        config.take("val_size")
    else:
        held_out(config, config.take("val_size", 0))
    template = config.take("template")
    if template == "chatml":
        config.options["chat_template"] = template
    config.option("cutoff_len", "max_length", int)
    if any([config.take("packing"), config.take("neat_packing")]):
        config.options["pack"] = True


def _file(name: str) -> str:
    return name if "." in name or "/" in name else f"{name}.json"


def _steps(config: Reading) -> None:
    config.option("micro_batch_size", "batch_size", int)
    config.option("per_device_train_batch_size", "batch_size", int)
    training(config, epochs="num_train_epochs", scheduler="lr_scheduler_type", patience="early_stopping_steps")
    optimizer(config, "optim", config.take("optim", ""))
    first, second = config.take("adam_beta1", 0.9), config.take("adam_beta2", 0.999)
    if (first, second) != (0.9, 0.999):
        config.options["optim_args"] = f"betas=({first},{second})"
    if config.take("fp16"):
        config.options["precision"] = "fp16"
    elif any([config.take("bf16"), config.take("pure_bf16")]):
        config.options["dtype"] = "bf16"
    config.take("pure_bf16")
    if not config.take("disable_gradient_checkpointing"):
        config.options["gradient_checkpointing"] = True
    distributed = config.part("dist_config")
    if distributed.take("name") == "fsdp2":
        config.options["parallel"] = "fsdp2"
