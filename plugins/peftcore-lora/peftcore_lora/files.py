"""LoRA's files: PEFT's names, files that PEFT cannot read, and files that peftcore cannot read.

PEFT's variants of LoRA that only change training are read as plain LoRA; other variants are refused:

    monteclora_config   training samples A around its mean; inference uses the mean
    velora_config       training computes the gradient of A from compressed inputs, to save memory
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from peftcore import plugin
from peftcore.plugin import Around, Fields, FileLayout, PeftcoreError, PeftRules, StateRules, Tensors, targets, warn
from peftcore_lora import per_expert, starts
from peftcore_lora.config import scale_config
from peftcore_lora.layers import LoraEmbedding
from peftcore_lora.parameters import LoraParameter, name_on_disk, read_experts, write_experts
from peftcore_lora.pipelines import FILES
from peftcore_lora.placing import Convolution, adds_to_product, is_undilated
from peftcore_lora.tokens import misread_heads, refused_tokens

KNOWN_PEFT = (0, 21, 2)  # last release whose files of attention modules are known


def tensor_name(placement: Any, name: str) -> str:
    """Return PEFT's name of a tensor: A and B of a linear layer are modules, those of an embedding are parameters."""
    adapter = getattr(placement, "adapter", None)
    if isinstance(adapter, LoraParameter):
        return name_on_disk(placement, name)
    if name == "trainable_tokens_delta":
        name = f"token_adapter.{name}"
    elif isinstance(adapter, LoraEmbedding):
        name = name.replace("lora_", "lora_embedding_")
    elif name == "lora_bias":
        name = "lora_B.bias"
    elif isinstance(placement, Around):
        name = f"base_layer.{name}.weight" if name.startswith("out_proj.") else f"{name}.weight"
    return placement.tensor_name(name)


def name_inside(placement: Any, name: str) -> str:
    """Return PEFT's name of a tensor, for adapters that hold a LoRA as `lora` and are saved as a LoRA."""
    if not name.startswith("lora."):
        return plugin.tensor_name(placement, name)
    lora_placement = replace(placement, adapter=placement.adapter.lora)
    return tensor_name(lora_placement, name.removeprefix("lora."))


def read_tensors(model: nn.Module, tensors: dict[str, Tensor], fields: Mapping[str, Any]) -> dict[str, Tensor]:
    """Convert a file's tensors from PEFT's names and shapes."""
    # With bias="all" PEFT also writes the biases of modules_to_save under these names, unless the model has such names.
    copy_names = {"modules_to_save", "original_module"} & {part for name in tensors for part in name.split(".")}
    if copy_names:
        copy_names -= {part for path, _ in model.named_modules() for part in path.split(".")}
        tensors = {name: tensor for name, tensor in tensors.items() if copy_names.isdisjoint(name.split("."))}
    return starts.read_start(model, read_experts(model, drop_training_tensors(tensors), fields), fields)


# Layers of dense and shared blocks that PEFT mistakes for the experts of old files, by the model types that
# transformers converts.
MISTAKEN_FOR_EXPERTS = {
    "mixtral": {"gate", "w1", "w2", "w3"},
    "qwen2_moe": {"gate", "gate_proj", "up_proj", "down_proj"},
}
# PEFT refuses these layers of Mamba models, whose kernels read the weights without calling the layer.
MAMBA = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
READ_BY_KERNELS = {"out_proj", "conv1d"}


def unreadable(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """Return the adapted modules whose file PEFT misreads, refuses or cannot run.

    It misreads mixtures of experts, dilated convolutions and heads with a bias and trained rows, refuses Mamba's
    layers, and cannot run routers.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    names = set(READ_BY_KERNELS) if model_type in MAMBA else set()
    conversions = sys.modules.get("transformers.conversion_mapping")  # imported whenever a model is built
    if conversions is not None:
        families = {"mixtral": "mixtral", **getattr(conversions, "_MODEL_TO_CONVERSION_PATTERN", {})}
        names |= MISTAKEN_FOR_EXPERTS.get(families.get(str(model_type), ""), set())
    misread_paths: list[str] = []
    for path in paths:
        module = model.get_submodule(path)
        is_misread = path.rpartition(".")[2] in names or differs_in_peft(module)
        if is_misread and not any(isinstance(m, LoraParameter) for m in module.modules()):
            misread_paths.append(path)
    return [*misread_paths, *misread_heads(model, [path for path in paths if path not in misread_paths])]


def differs_in_peft(module: nn.Module) -> bool:
    """Return whether PEFT computes another output from the same A and B at this layer, or cannot run it."""
    if isinstance(module, Convolution):
        return module.groups == 1 and not is_undilated(module)
    return not adds_to_product(module)


def refusal_reason(model: nn.Module, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> str | None:
    """Return the reason why a file of PEFT cannot be read, or None.

    PEFT's A of a convolution is not dilated, so no change of the weight gives the same output. PEFT releases after
    `KNOWN_PEFT` may add the change of an attention's `out_proj` once or twice; it is not known.
    """
    for path, module in targets.base_modules(model):
        a_name = f"base_model.model.{path}.lora_A.weight"
        if a_name in tensors and isinstance(module, Convolution) and differs_in_peft(module):
            return (
                f"'{a_name}' is for a convolution that is dilated, or pads with other values than zero. PEFT's A does "
                "neither, so no change of the weight gives the same output. Train without that layer: "
                f"exclude_modules=['{path}']"
            )
    reason = starts.refusal_reason(fields) or refused_tokens(model, tensors, fields)
    if reason is not None:
        return reason
    out_proj_name = next((name for name in tensors if ".base_layer.out_proj.lora_B" in name), None)
    version = re.match(r"(\d+)\.(\d+)\.(\d+)", str(fields.get("peft_version") or "0.0.0"))
    if out_proj_name is None or version is None or tuple(map(int, version.groups())) <= KNOWN_PEFT:
        return None
    return (
        f"it was written by PEFT {fields['peft_version']}, and '{out_proj_name}' belongs to an "
        f"nn.MultiheadAttention. PEFT up to {'.'.join(map(str, KNOWN_PEFT))} adds scale · B A to out_proj twice; the "
        "behavior of later releases is unknown. If your release adds it twice, remove peft_version from "
        "adapter_config.json; if once, also halve this tensor"
    )


def read_config(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of plain LoRA for a file. `target_modules` and `target_parameters` are [] where PEFT has None.

    Raises:
        PeftcoreError: the file has a field of an unsupported variant.
    """
    if reason := unsupported_reason(fields):
        raise PeftcoreError(reason)
    selected = {name: fields.get(name) or [] for name in ("target_modules", "target_parameters")}
    return {**plain_fields(fields), **selected}


def write_config(fields: dict[str, Any]) -> dict[str, Any]:
    """Return PEFT's fields. PEFT refuses dropout with target_parameters, so dropout is saved as `kept_dropout`."""
    fields = starts.write_config(fields)
    fields["target_parameters"] = fields["target_parameters"] or None
    if fields["target_parameters"] and fields["lora_dropout"]:
        fields |= {"lora_dropout": 0.0, "kept_dropout": fields["lora_dropout"]}
    return fields


def read(model: nn.Module | None, tensors: dict[str, Tensor], fields: dict[str, Any]) -> tuple[Tensors, Fields]:
    config = starts.read_config(read_config(fields))
    if model is None:
        return tensors, config
    return read_tensors(model, tensors, fields), restore_config(config, tensors)


def write(model: nn.Module | None, tensors: dict[str, Tensor], fields: dict[str, Any]) -> tuple[Tensors, Fields]:
    return write_experts(starts.write_start(tensors, fields["frozen_start"])), write_config(fields)


def restore_config(fields: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Restore dropout, and a head that ensure_weight_tying ties to an adapted embedding; PEFT's config has neither."""
    if fields.get("kept_dropout") is not None:
        fields = {**fields, "lora_dropout": fields["kept_dropout"], "kept_dropout": None}
    embedding = next((t for name, t in tensors.items() if name.endswith(".lora_embedding_A")), None)
    if embedding is None or not fields.get("ensure_weight_tying") or isinstance(fields["target_modules"], str):
        return fields
    heads: list[str] = []
    for name, tensor in tensors.items():
        if not name.endswith(".lora_B.weight") or tensor.shape != embedding.mT.shape:
            continue
        path = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
        if not any(targets.matches(pattern, path) for pattern in fields["target_modules"]):
            heads.append(path)
    return {**fields, "target_modules": [*fields["target_modules"], *heads]}


RULES = StateRules(
    peft_type="LORA",
    tensor_name=tensor_name,
    read=read,
    write=write,
    formats=(FileLayout("per_expert", per_expert.read, per_expert.write), *FILES),
    peft=PeftRules(
        own_fields=frozenset({"frozen_start", "lora_plus_ratio", "lora_fa", "expert_r", "kept_dropout"}),
        unreadable=unreadable,
        refused=refusal_reason,
        scaled=scale_config,
    ),
)

# Variants that are a plain LoRA at inference, and how further training differs here.
PLAIN_VARIANTS = {
    "monteclora_config": "further training does not sample A",
    "velora_config": "further training computes exact gradients",
}

TRAINING_TENSORS = re.compile(r"\.lora_monteclora_sampler\.|\.lora_velora_")

NOT_INSTALLED = "is another method, whose plugin is not installed. Install it, or train a plain LoRA"

UNSUPPORTED_FIELDS = {
    "use_dora": f"DoRA {NOT_INSTALLED}",
    "alora_invocation_tokens": f"activated LoRA {NOT_INSTALLED}",
    "arrow_config": "Arrow chooses adapters for each token. Load each adapter by name, and apply the method arrow",
    "kasa_config": "KaSA changes the base weights. Merge it in PEFT (merge_and_unload), and use the merged model",
    "use_qalora": "QA-LoRA is for GPTQ layers, which LoRA cannot adapt here. Train on an NF4 base: method qlora",
    "megatron_config": "its layers are Megatron's, sharded over ranks. Train transformers' model with FSDP2: `shard`",
}


def unsupported_reason(fields: Mapping[str, Any]) -> str | None:
    """Return the reason why a file with these fields cannot be read, or None."""
    field_name = next((name for name in UNSUPPORTED_FIELDS if fields.get(name)), None)
    return None if field_name is None else f"it has {field_name}: {UNSUPPORTED_FIELDS[field_name]}"


def drop_training_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop the tensors that variants of LoRA need in training only."""
    return {name: t for name, t in tensors.items() if not TRAINING_TENSORS.search(name)}


def plain_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the fields of variants that are a plain LoRA at inference; warn if further training differs."""
    for name, effect in PLAIN_VARIANTS.items():
        if fields.get(name):
            warn(f"{name}: loaded as plain LoRA, which computes the same; {effect}")
    # loftq_config concerns the initialisation alone.
    return {name: value for name, value in fields.items() if name not in PLAIN_VARIANTS and name != "loftq_config"}
