"""LoRA's files: PEFT's names, files that PEFT cannot read, and files that peftcore cannot read.

Files of PEFT's variants of LoRA are read as plain LoRA if they are one after training, and otherwise refused:

    monteclora_config   A is drawn around its mean in training; afterwards the mean is used
    velora_config       the gradient of A is taken from compressed inputs, to save memory
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
from peftcore_lora.config import scaled
from peftcore_lora.layers import LoraEmbedding
from peftcore_lora.parameters import LoraParameter, name_on_disk, read_experts, write_experts
from peftcore_lora.pipelines import FILES
from peftcore_lora.placing import Convolution, adds_to_product, is_undilated
from peftcore_lora.tokens import misread_heads, refused_tokens

KNOWN_PEFT = (0, 21, 2)  # last release whose files of attention modules are known


def tensor_name(placement: Any, name: str) -> str:
    """Return PEFT's name: A and B are in modules at a linear layer, and plain parameters at an embedding."""
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
    """Return PEFT's name for an adapter that has a LoRA inside, `lora`, and is saved as a LoRA."""
    if not name.startswith("lora."):
        return plugin.tensor_name(placement, name)
    of_lora = replace(placement, adapter=placement.adapter.lora)
    return tensor_name(of_lora, name.removeprefix("lora."))


def read_tensors(model: nn.Module, tensors: dict[str, Tensor], fields: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the file's tensors; with bias="all" PEFT writes biases of modules_to_save twice, which are dropped."""
    copies = {"modules_to_save", "original_module"} & {part for name in tensors for part in name.split(".")}
    if copies:
        copies -= {part for path, _ in model.named_modules() for part in path.split(".")}  # which may have such a name
        tensors = {name: tensor for name, tensor in tensors.items() if copies.isdisjoint(name.split("."))}
    return starts.read_start(model, read_experts(model, as_plain(tensors), fields), fields)


# Layers of dense and shared blocks that PEFT mistakes for the experts of old files, by the model types that
# transformers converts; and layers whose weights Mamba's kernels read without a call, which PEFT refuses.
TAKEN_FOR_EXPERTS = {
    "mixtral": {"gate", "w1", "w2", "w3"},
    "qwen2_moe": {"gate", "gate_proj", "up_proj", "down_proj"},
}
MAMBA = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
READ_BY_KERNELS = {"out_proj", "conv1d"}


def unreadable(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """Return the adapted modules whose file PEFT misreads, refuses or cannot run.

    It misreads mixtures of experts, dilated convolutions and heads with a bias and trained rows, refuses Mamba's
    layers, and cannot run routers.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    names = set(READ_BY_KERNELS) if kind in MAMBA else set()
    conversions = sys.modules.get("transformers.conversion_mapping")  # imported whenever a model is built
    if conversions is not None:
        alike = {"mixtral": "mixtral", **getattr(conversions, "_MODEL_TO_CONVERSION_PATTERN", {})}
        names |= TAKEN_FOR_EXPERTS.get(alike.get(str(kind), ""), set())
    modules = {path: model.get_submodule(path) for path in paths}
    others = [
        path
        for path, module in modules.items()
        if path.rpartition(".")[2] in names or is_other_in_peft(module)
        if not any(isinstance(each, LoraParameter) for each in module.modules())
    ]
    return [*others, *misread_heads(model, [path for path in paths if path not in others])]


def is_other_in_peft(module: nn.Module) -> bool:
    """Return whether PEFT computes something else at a layer from the same factors, or nothing."""
    if isinstance(module, Convolution):
        return module.groups == 1 and not is_undilated(module)
    return not adds_to_product(module)


def refused(model: nn.Module, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> str | None:
    """Return why a file of PEFT cannot be read, or None.

    PEFT's A of a convolution is not dilated, which no change of the weight reproduces. For releases after `KNOWN_PEFT`
    it is unknown whether they add the change of an attention's `out_proj` once or twice.
    """
    for name, module in targets.base_modules(model):
        there = f"base_model.model.{name}.lora_A.weight"
        if there in tensors and isinstance(module, Convolution) and is_other_in_peft(module):
            return (
                f"'{there}' is for a convolution that is dilated, or pads with other values than zero. PEFT's A does "
                "neither, so no change of the weight reproduces it. Train it without that layer: "
                f"exclude_modules=['{name}']"
            )
    why = starts.refused(fields) or refused_tokens(model, tensors, fields)
    if why is not None:
        return why
    twice = next((name for name in tensors if ".base_layer.out_proj.lora_B" in name), None)
    version = re.match(r"(\d+)\.(\d+)\.(\d+)", str(fields.get("peft_version") or "0.0.0"))
    if twice is None or version is None or tuple(map(int, version.groups())) <= KNOWN_PEFT:
        return None
    return (
        f"it was written by PEFT {fields['peft_version']}, and '{twice}' is for an nn.MultiheadAttention. PEFT up "
        f"to {'.'.join(map(str, KNOWN_PEFT))} adds scale · B A to out_proj twice; for later releases it is unknown. "
        "If yours does so, too, drop peft_version from adapter_config.json; if it adds it once, also halve this tensor"
    )


def read_config(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of the plain LoRA that the file computes; [] for modules where PEFT has None."""
    if why := why_not(fields):
        raise PeftcoreError(why)
    chosen = {name: fields.get(name) or [] for name in ("target_modules", "target_parameters")}
    return {**plain_fields(fields), **chosen}


def write_config(fields: dict[str, Any]) -> dict[str, Any]:
    """Return PEFT's fields: it refuses dropout with target_parameters, so dropout is saved in another field."""
    fields = starts.write_config(fields)
    fields["target_parameters"] = fields["target_parameters"] or None
    if fields["target_parameters"] and fields["lora_dropout"]:
        fields |= {"lora_dropout": 0.0, "kept_dropout": fields["lora_dropout"]}
    return fields


def read(model: nn.Module | None, tensors: dict[str, Tensor], fields: dict[str, Any]) -> tuple[Tensors, Fields]:
    config = starts.read_config(read_config(fields))
    return (tensors, config) if model is None else (read_tensors(model, tensors, fields), as_trained(config, tensors))


def write(model: nn.Module | None, tensors: dict[str, Tensor], fields: dict[str, Any]) -> tuple[Tensors, Fields]:
    return write_experts(starts.write_start(tensors, fields["frozen_start"])), write_config(fields)


def as_trained(fields: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Restore what PEFT's config lacks: dropout, and a head that ensure_weight_tying ties to an adapted embedding."""
    if fields.get("kept_dropout") is not None:
        fields = {**fields, "lora_dropout": fields["kept_dropout"], "kept_dropout": None}
    embedding = next((t for name, t in tensors.items() if name.endswith(".lora_embedding_A")), None)
    if embedding is None or not fields.get("ensure_weight_tying") or isinstance(fields["target_modules"], str):
        return fields
    heads = [
        path
        for name, tensor in tensors.items()
        if name.endswith(".lora_B.weight") and tensor.shape == embedding.mT.shape
        for path in [name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")]
        if not any(targets.matches(pattern, path) for pattern in fields["target_modules"])
    ]
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
        refused=refused,
        scaled=scaled,
    ),
)

PLAIN = {
    "monteclora_config": "in further training A is not drawn around it",
    "velora_config": "gradients are exact here",
}

OF_TRAINING = re.compile(r"\.lora_monteclora_sampler\.|\.lora_velora_")

ELSEWHERE = "is another method, whose plugin is not installed. Install it, or train a plain LoRA"

REFUSED = {
    "use_dora": f"DoRA {ELSEWHERE}",
    "alora_invocation_tokens": f"activated LoRA {ELSEWHERE}",
    "arrow_config": "Arrow chooses adapters for each token. Load each of them by name, and apply the method arrow",
    "kasa_config": "KaSA changes the base's weights. Merge it in PEFT (merge_and_unload), and use the merged model",
    "use_qalora": "QA-LoRA is for GPTQ layers, which LoRA cannot adapt here. Train on an NF4 base: method qlora",
    "megatron_config": "its layers are Megatron's, sharded over ranks. Train transformers' model with FSDP2: `shard`",
}


def why_not(fields: Mapping[str, Any]) -> str | None:
    """Return why a file with these fields cannot be read, or None."""
    named = next((name for name in REFUSED if fields.get(name)), None)
    return None if named is None else f"it has {named}: {REFUSED[named]}"


def as_plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the plain LoRA that the variant computes."""
    return {name: t for name, t in tensors.items() if not OF_TRAINING.search(name)}


def plain_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of plain LoRA; warn if further training would differ."""
    for name, what in PLAIN.items():
        if fields.get(name):
            warn(f"{name}: the adapter is plain LoRA, which computes the same; {what}")
    # only for a start
    return {name: value for name, value in fields.items() if name not in PLAIN and name != "loftq_config"}
