"""Configs of axolotl."""

from __future__ import annotations

from typing import Any

from peftcore.cli.fields import text_of
from peftcore_convert_config.reading import (
    AUDIO,
    IMAGES,
    OWN_CODE,
    Reading,
    asks,
    dataset,
    held_out,
    judged,
    keyed,
    only_first,
    optimizer,
    single,
    training,
)

_OWN_SCRIPT = "a script with peftcore.apply and TRL's or transformers' trainer"
_SAVED = "load the model in Python, save it, and pass its folder"
REFUSED: dict[str, str] = {}
_NOTHING = """
lora_target_linear lora_fan_in_fan_out quantize_moe_experts train_on_inputs roles_to_train train_on_eos eot_tokens
special_tokens group_by_length attn_implementation flash_attention flash_attn_rms_norm flash_attn_cross_entropy
fused_attn_kernel gemma4_hybrid_attn_impl xformers_attention sdp_attention lora_mlp_kernel lora_qkv_kernel
lora_o_kernel liger_rms_norm liger_glu_activation liger_layer_norm liger_rope liger_rms_norm_gated use_kernels
use_scattermoe use_sonicmoe experts_implementation llama4_linearized_experts plugins dataset_prepared_path
skip_prepare_dataset remove_unused_columns strict debug low_cpu_mem_usage device_map experimental_skip_move_to_device
tokenizer_use_fast tokenizer_legacy hf_use_auth_token test_value model_type tokenizer_type
is_llama_derived_model base_model_config bnb_config_kwargs tf32 gradient_checkpointing_kwargs cut_cross_entropy
liger_fused_linear_cross_entropy pad_to_sequence_len eval_sample_packing sample_packing_sequentially evals_per_epoch
saves_per_epoch logging_steps wandb_entity wandb_name wandb_watch wandb_log_model wandb_run_id eval_batch_size
torch_dtype bfloat16 eval_table_size eval_causal_lm_metrics swanlab_project swanlab_workspace swanlab_mode
swanlab_description swanlab_experiment_name trackio_project_name trackio_run_name trackio_space_id local_rank
auto_resume_from_checkpoints ddp_find_unused_parameters dp_shard_size fsdp_config fsdp_version ray_num_workers
hub_strategy push_dataset_to_hub axolotl load_best_model_at_end batch_size
gptq gptq_groupsize gptq_model_v1 gptq_disable_exllama dsv4_fp4_grouped_mode relora_cpu_offload
"""
NOTHING = frozenset(_NOTHING.split())
NOT_HERE = keyed(
    {
        "the base is trained over as it is; peftcore merge writes dense weights": "nvfp4_merge_aware",
        "--dtype bf16 if the base fits, else --quantize nf4": "load_in_8bit",
        "none; losses that are not finite are shown": "loss_watchdog_threshold loss_watchdog_patience",
        _OWN_SCRIPT: "lr_quadratic_warmup curriculum_sampling dataset_exact_deduplication model_config",
        "peftcore.quantization.load in a script reads MXFP4": (
            "model_quantization_config model_quantization_config_kwargs"
        ),
        "--set target_modules=, a pattern of the language model's layers": "freeze_mm_modules",
        "answers are sampled by transformers; for vLLM take TRL's trainer": "vllm",
        "--method relora, whose restarts raise the learning rate again": (
            "jagged_restart_steps jagged_restart_warmup_steps jagged_restart_anneal_steps"
        ),
        "none": "peft",
        "--gradient-checkpointing; peftcore suggest says what fits": "activation_offloading",
        "torch.compile after peftcore.apply in a script": "torch_compile torch_compile_mode flex_attn_compile_kwargs",
        "a script (docs/distributed.md)": (
            "expert_parallel_size expert_parallel_token_capacity expert_parallel_num_nvl_bytes context_parallel_size "
            "tensor_parallel_size use_ray"
        ),
        _SAVED: "revision_of_model tokenizer_use_mistral_common resize_token_embeddings_to_32x",
        "--report-to": "use_otel_metrics otel_metrics_host otel_metrics_port",
        "--sample, --eval-answers": (
            "swanlab_log_completions swanlab_completion_log_interval swanlab_completion_max_buffer"
        ),
        "none; the model's own kernels are used": "use_dsv4_kernels use_glm_dsa_kernels",
        "DeepSpeed's ZeRO with Trainer or your own loop (docs/distributed.md)": "deepspeed",
        "peftcore push after training": "hub_model_id",
        "--set modules_to_save=, with modules instead of regular expressions for parameters": "unfrozen_parameters",
    }
)
_TASKS = {"dpo": "dpo", "kto": "kto", "orpo": "orpo", "grpo": "grpo"}
_FIELDS = """
feature_layers embed_method use_whitening alignment_coef diversity_coef rl_coef ce_coef stride context_length
min_completion_prefix advantage_estimator
"""
_MATCHING = tuple(_FIELDS.split())  # of --ebft, next to its mode
_SAMPLED = {
    "use_vllm": NOT_HERE["vllm"],
    "async_prefetch": "nothing is sampled ahead: answers are the current model's",
    "chat_template_kwargs": "--chat-template, a file in which they are set",
}
_TYPES = {  # of EBFT's rows
    "ebft_strided_structured": {"prompt": "input", "completion": "output"},
    "ebft_pretrain": {"text": "question"},
}
# The language model in models of several kinds of input, in older releases of transformers and in all
_RENAMED = ("language_model.model.layers", "(language_model.model|model.language_model).layers")
_READ = ("alpaca", "chat_template", "completion", "input_output", "sharegpt")  # types whose rows are read as they are
_COLUMNS = {
    "field_messages": "messages",
    "field_chosen": "chosen",
    "field_rejected": "rejected",
    "field_instruction": "instruction",
    "field_output": "output",
    "field": "text",
}


def convert(config: Reading) -> None:
    """Take from a config all that has a counterpart."""
    config.option("base_model", "model")
    if config.take("trust_remote_code"):
        config.to_do.append(OWN_CODE)
    _images(config)
    _method(config)
    _task(config)
    _data(config)
    _length(config)
    _steps(config)
    _matching(config)
    _dtype(config)
    _shown(config)


def _images(config: Reading) -> None:
    """Take what makes a training one on conversations with images or audio."""
    kind = config.take("processor_type")
    if not asks(kind):
        return
    paths = [str(each.get("path", "")) for each in config.take("datasets", [])]
    hears = any("audio" in path.lower() for path in paths)
    config.options["task"] = "audio-text" if hears else "image-text"
    config.to_do.append(AUDIO if hears else IMAGES)
    if kind == "VoxtralProcessor":
        config.take("tokenizer_use_mistral_common")  # as this processor does
    if "language_model" in str(config.take("lora_target_modules")):
        config.take("freeze_mm_modules")  # nothing else is adapted


def _method(config: Reading) -> None:
    adapter, four_bits = config.take("adapter", "lora"), config.take("load_in_4bit", False)
    method = "dora" if config.take("peft_use_dora") else "qlora" if adapter == "qlora" else "lora"
    if config.take("relora"):
        if method == "dora":
            config.refuse("peft_use_dora", "--method relora without it, or --method dora without restarts")
        method = _relora(config)
    config.options["method"] = method
    if (four_bits or adapter == "qlora") and method != "qlora":
        config.options["quantize"] = "nf4"
    config.option("lora_model_dir", "adapter")
    config.field("lora_r", "r")
    config.field("lora_alpha", "lora_alpha")
    config.field("lora_dropout", "lora_dropout")
    config.field("peft_use_rslora", "use_rslora")
    config.field("peft_init_lora_weights", "init_lora_weights")
    config.field("loraplus_lr_ratio", "lora_plus_ratio")
    config.field("lora_modules_to_save", "modules_to_save")
    targets = config.take("lora_target_modules")
    if asks(targets) and not config.take("lora_target_linear"):
        config.fields["target_modules"] = targets.replace(*_RENAMED) if isinstance(targets, str) else targets
    config.field("lora_target_parameters", "target_parameters")


def _relora(config: Reading) -> str:
    """Take the restarts, under their names of today or of older releases, and return the method."""
    config.field("relora_steps", "restart_every")
    config.field("jagged_restart_steps", "restart_every")
    config.field("relora_warmup_steps", "restart_warmup")
    config.field("jagged_restart_warmup_steps", "restart_warmup")
    config.field("jagged_restart_anneal_steps", "restart_anneal")
    config.fields["prune_ratio"] = config.take("relora_prune_ratio", 0.9)
    return "relora"


def _data(config: Reading) -> None:
    columns: dict[str, str] = {}
    config.options["data"] = single(
        [file for each in config.take("datasets", []) for file in _files(config, each, columns)]
    )
    held = config.take("test_datasets")
    if asks(held):
        found = [file for each in held for file in _files(config, each, columns)]
        config.options["eval_data"] = only_first(config, "test_datasets", found)
        config.take("val_set_size")
    else:
        held_out(config, config.take("val_set_size", 0.1))
    if columns:
        config.options["columns"] = ",".join(f"{ours}={theirs}" for ours, theirs in columns.items())


def _files(config: Reading, given: dict[str, Any], columns: dict[str, str]) -> list[str]:
    """Return the files or the hub id of a data set, as `--data` names them; its names of fields go into `columns`."""
    part = Reading(given)
    part.take("ds_type")
    for theirs, ours in _COLUMNS.items():
        column = part.take(theirs)
        if asks(column) and column not in (ours, "conversations"):
            columns[ours] = column
    mapping = part.take("message_property_mappings", {})
    role = part.take("message_field_role", mapping.get("role", "role"))
    content = part.take("message_field_content", mapping.get("content", "content"))
    if (role, content) not in (("role", "content"), ("from", "value")):
        config.to_do.append(f"data: rewrite the turns' keys '{role}' and '{content}' as 'role' and 'content'")
    kind = part.take("type", "")
    if isinstance(kind, str) and (named := _TYPES.get(kind.partition(".")[0])):
        columns |= named
    elif isinstance(kind, str) and kind.startswith("ebft_opencode"):
        config.to_do.append("data: rewrite each row as messages, 'input' as the user's and 'output' as the assistant's")
    elif not isinstance(kind, str) or kind.partition(".")[0].partition(":")[0] not in _READ:
        config.to_do.append(
            f"data: axolotl rewrites rows of the type {kind!r}; rename their columns (--columns) or rewrite the file"
        )
    part.take("roles")
    files, path = part.take("data_files"), part.take("path", "")
    files = [files] if isinstance(files, str) else files or [path]
    split, name = part.take("split"), part.take("name")
    found = [dataset(file, split, name) for file in files]
    for key in part.left():
        if key not in NOTHING:
            config.leave_out(key, NOT_HERE.get(key, "rewrite the file, or the tokenizer's chat template"))
    return found


def _task(config: Reading) -> None:
    kind = config.take("rl")
    if kind not in (None, "ebft"):
        if kind not in _TASKS:
            config.refuse("rl", "TRL's trainers with peft_config=peftcore.config('lora')")
        judged(config, "rl", _TASKS[kind])
    if config.take("reward_model"):
        judged(config, "reward_model", "reward")
    config.option("rl_beta", "beta", float)
    config.option("orpo_alpha", "beta", float)
    config.option("kto_desirable_weight", "desirable_weight", float)
    config.option("kto_undesirable_weight", "undesirable_weight", float)
    trl = config.part("trl")
    if kind == "grpo":
        trl.option("num_generations", "generations", int)
        trl.option("max_completion_length", "answer_tokens", int)
        trl.option("temperature", "temperature", float)
        trl.option("beta", "beta", float)
        functions = trl.take("reward_funcs")
        if functions:
            module, _, name = str(functions[0]).rpartition(".")
            config.options["reward"] = f"{module.replace('.', '/')}.py:{name}"
        if functions and len(functions) > 1:
            config.leave_out("reward_funcs", "one function that adds the rewards: --reward FILE.py:FUNCTION")
    if config.take("do_causal_lm_eval"):
        config.options["eval_answers"] = 100
        config.option("eval_max_new_tokens", "answer_tokens", int)


def _matching(config: Reading) -> None:
    """Take what makes a training one by matched features (EBFT), whose batches of answers become batches of prompts."""
    if config.take("rl") != "ebft":
        return
    ebft, trl = config.part("ebft"), config.part("trl")
    mode = ebft.take("mode", "structured")
    found = {"mode": mode} | {name: ebft.take(name) for name in _MATCHING}
    if mode == "strided":
        if ebft.take("top_p", 1.0) != 1:
            ebft.refuse("top_p", "1.0: tokens are drawn from all")
        counts = {"generations": ("n_samples_per_prompt", 4), "answer_tokens": ("generate_max_len", 8)}
        chosen = {option: int(ebft.take(key, default)) for option, (key, default) in counts.items()}
        config.options |= {**chosen, "temperature": float(ebft.take("temperature", 0.6))}
        if chosen["generations"] < 2:
            ebft.refuse("n_samples_per_prompt", "2 or more samples")
    else:
        for key in ("adaptive_max_tokens", "gt_length_multiplier"):
            if ebft.take(key):
                config.leave_out(key, "none: --answer-tokens is the limit")
        for key, known in (("loss_type", ("grpo",)), ("beta", (0,)), ("scale_rewards", (True, "group"))):
            if trl.take(key, known[0]) not in known:
                trl.refuse(key, f"{key}: {str(known[0]).lower()}, or TRL's GRPOTrainer with a reward of your own")
        for key, instead in _SAMPLED.items():
            if asks(trl.take(key)):
                config.leave_out(key, instead)
        counts = {"generations": ("num_generations", 8), "answer_tokens": ("max_completion_length", 256)}
        config.options |= {option: int(trl.take(key, default)) for option, (key, default) in counts.items()}
        config.options["temperature"] = float(trl.take("temperature", 1.0))
        answers = config.options.get("batch_size", 1) * config.options.get("grad_accum", 1)
        prompts, over = divmod(answers, config.options["generations"])
        if over or not prompts:
            config.refuse("micro_batch_size", "batches times accumulation in whole prompts, trl.num_generations each")
        config.options |= {"batch_size": 1, "grad_accum": prompts}
    config.options["ebft"] = " ".join(f"{name}={_field(value)}" for name, value in found.items() if value is not None)


def _field(value: Any) -> str:
    """Return the value of a field of `--ebft` as text."""
    return ",".join(map(_field, value)) if isinstance(value, list) else text_of(value)


def _length(config: Reading) -> None:
    config.option("sequence_len", "max_length", int)
    if config.take("sample_packing"):
        config.options["pack"] = True
    template = config.take("chat_template")
    if template == "chatml":
        config.options["chat_template"] = template
    elif template == "jinja" or config.take("chat_template_jinja"):
        config.to_do.append("chat_template: write the template into a file, and give its path")
    config.take("chat_template_jinja")


def _steps(config: Reading) -> None:
    config.option("micro_batch_size", "batch_size", int)
    training(config, epochs="num_epochs", scheduler="lr_scheduler", patience="early_stopping_patience")
    optimizer(config, "optimizer", config.take("optimizer", ""))
    second = config.take("adam_beta2")
    first, small = config.take("adam_beta1", 0.9), config.take("adam_epsilon", config.take("adam_eps"))
    arguments = [f"betas=({first},{second or 0.999})"] if second or first != 0.9 else []
    arguments += [f"eps={float(small)}"] if small else []
    if arguments:
        config.options["optim_args"] = ",".join(arguments)


def _dtype(config: Reading) -> None:
    sixteen, half = config.take("bf16"), config.take("fp16") or config.take("float16")
    config.take("float16")
    if half:
        config.options["precision"] = "fp16"
    elif sixteen is True:
        config.options["dtype"] = "bf16"
    checkpointing = config.take("gradient_checkpointing")
    if checkpointing:
        config.options["gradient_checkpointing"] = True
    if checkpointing == "offload":
        config.leave_out("gradient_checkpointing", "true: activations stay on the device")
    if asks(config.take("fsdp")):
        config.options["parallel"] = "fsdp2"
    elif config.take("ddp"):
        config.options["parallel"] = "ddp"
    config.take("ddp")


def _shown(config: Reading) -> None:
    services = {"wandb": ("use_wandb", "wandb_project"), "tensorboard": ("use_tensorboard",)}
    services["swanlab"] = ("use_swanlab",)
    found = [name for name, keys in services.items() if any([asks(config.take(key)) for key in keys])]
    if found:
        config.options["report_to"] = ",".join(found)
    config.option("output_dir", "output")
