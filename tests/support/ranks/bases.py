"""Adapters on bases that are divided over the ranks already: what the ranks do, and in which folders the bases lie."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

import peftcore
from peftcore.engine import adapter_modules
from peftcore.plugin import Around, StateRules, ranks, targets, weight_format
from peftcore.testing import disturb
from support import tiny
from support.ranks import work
from support.ranks.cases import CASES

# Sizes that fit these bases better than those of `cases`, which no number of ranks divides.
FIELDS: dict[str, dict[str, Any]] = {
    "qlora": {"blocksize": 32},
    "c3a": {"block_size": 12},
    "vblora": {"vector_length": 12},
    "trainable-tokens": {"token_indices": [29, 5]},
}
DENSE = [case for case, (_, _, quantized) in CASES.items() if not quantized]
# Those that read weights when they are applied, look for the parts of a layer, or train the base's own parameters.
READING = ["lora", "qlora", "dora", "delora", "psoft", "tinylora", "deft", "cpt", "supertuning", "trainable-tokens"]
READING += ["adapter", "reft", "ia3", "bitfit", "ln-tuning"]


def write(folder: Path) -> None:
    """Folders with a tiny model: `llama` and `gpt2`, of which two ranks can have halves, `odd`, two of Qwen3, `blocks`,
    whose halves are whole blocks of 32, and `tied`, a Gemma 3 with a scaled embedding and a head tied to it."""
    from transformers import (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    torch.manual_seed(0)
    sizes = {"hidden_size": 36, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 96, "head_dim": 18}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder / "llama")
    Qwen3ForCausalLM(Qwen3Config(**sizes)).save_pretrained(folder / "qwen3")
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "attention_bias": True}
    experts |= {"hidden_size": 64, "head_dim": 16}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes | experts)).save_pretrained(folder / "qwen3_moe")
    biases = {"attention_bias": True, "mlp_bias": True, "intermediate_size": 49}
    LlamaForCausalLM(LlamaConfig(**sizes | biases)).save_pretrained(folder / "odd")
    blocks = {"hidden_size": 64, "intermediate_size": 256, "head_dim": 16, "attention_bias": True}
    LlamaForCausalLM(LlamaConfig(**sizes | blocks)).save_pretrained(folder / "blocks")
    Gemma3ForCausalLM(Gemma3TextConfig(**sizes | {"tie_word_embeddings": True})).save_pretrained(folder / "tied")
    work.model("gpt2").save_pretrained(folder / "gpt2")


def base(folder: str, kind: str, **divided: int) -> nn.Module:
    from transformers import AutoModelForCausalLM

    number, count = str(ranks.rank()), str(ranks.count())
    if divided:
        os.environ |= {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    found: nn.Module = AutoModelForCausalLM.from_pretrained(
        f"{folder}/{kind}", **{"distributed_config": divided} if divided else {}
    )
    return found


def adapted(found: nn.Module, case: str) -> nn.Module:
    torch.manual_seed(7)
    work.combined(found, case)
    peftcore.apply(found, case.partition(",")[0], **CASES[case][1] | FIELDS.get(case, {}))
    disturb(found, "default", seed=1, std=0.05)
    return found.train()


def table(measure: Callable[[str, str], float], cases: list[str], folder: str) -> dict[str, float | str]:
    """(largest difference from one process, or the error) by case."""
    warnings.simplefilter("ignore")
    found: dict[str, float | str] = {}
    for case in cases:
        try:
            found[case] = measure(case, folder)
        except peftcore.PeftcoreError as error:
            found[case] = str(error)
    return found


def on_shards(case: str, folder: str) -> float:
    """Gradients of an adapter that is applied to a base which `load_sharded` has read."""
    kind = "tied" if case == "trainable-tokens" else CASES[case][0]  # the head is trained with the embedding
    spread = adapted(peftcore.load_sharded(f"{folder}/{kind}"), case)
    peftcore.shard(spread)
    alone = adapted(base(folder, kind), case)
    work.backward_alone(alone)
    work.backward_here(spread, spread)
    return work.farthest(work.values(spread, "grad"), work.values(alone, "grad"))


def table_on_shards(folder: str) -> dict[str, float | str]:
    return table(on_shards, READING, folder)


def shard_by(version: str, model: nn.Module) -> nn.Module:
    with mock.patch.object(torch, "__version__", version):
        return peftcore.shard(model)


def refused(folder: str) -> dict[str, str]:
    """What raises, and how it is said."""
    stage = base(folder, "llama", pp_size=2)
    shards = peftcore.load_sharded(f"{folder}/llama")
    calls: dict[str, Callable[[], Any]] = {
        "stage": lambda: peftcore.apply(stage, "lora"),
        "quantize": lambda: peftcore.quantize(shards),
        "merge": lambda: peftcore.merge(peftcore.apply(shards, "lora"), undo=True),
        "old PyTorch": lambda: shard_by("2.11.0", peftcore.quantize(base(folder, "llama"))),
    }
    told = {}
    for name, call in calls.items():
        try:
            call()
        except peftcore.PeftcoreError as error:
            told[name] = str(error)
        else:
            told[name] = "nothing was raised"
    return told


def drifted(folder: str, shared: bool) -> str:
    """Train on a base that transformers has sharded, by a loop of one's own, and save."""
    found = peftcore.apply(base(folder, "llama", fsdp_size=2).train(), "lora", r=3)
    if shared:
        peftcore.shard(found)
    work.step(found, work.mine(), work.optimizer_of(found))
    try:
        peftcore.save(found, f"{folder}/adapter")
    except peftcore.PeftcoreError as error:
        return str(error)
    return "saved"


class Counting(tiny.Scaled):
    """A gain with a state that training changes."""

    def __init__(self, value: float) -> None:
        super().__init__(value)
        self.register_buffer("seen", torch.zeros(2))


def drifted_state(folder: str, averaged: bool) -> str:
    """Save an adapter whose buffers each rank has changed."""

    def place(model: nn.Module, config: Any, architecture: Any) -> list[Any]:
        return [Around(path, Counting(config.value)) for path, _ in model.named_modules() if path.endswith("q_proj")]

    with tiny.installed(tiny.method("counting", place)):
        found = peftcore.shard(peftcore.apply(base(folder, "llama"), "counting"))
        for _, adapter in adapter_modules(found, "default"):
            adapter.seen += 1 if averaged else ranks.rank() + 1
        try:
            peftcore.save(found, f"{folder}/state")
        except peftcore.PeftcoreError as error:
            return str(error)
    return "saved"


def computed_from_weights(folder: str) -> list[float]:
    """Largest error of tensors that `read` computes from weights, as an adapter is saved and loaded on shards."""

    def means(model: nn.Module, tensors: dict[str, Any], fields: dict[str, Any]) -> tuple[Any, Any]:
        found = {}
        for name in tensors:
            layer = targets.layer_at(model, name.removeprefix("base_model.model.").removesuffix(".gain"))
            found[name] = weight_format(layer).read(layer).mean()
        return found, fields

    other = lambda model, tensors, fields: ({n: t + 1 for n, t in tensors.items()}, fields)  # noqa: E731
    rules = StateRules(peft_type="TOY_MEANS", read=means, write=other)
    where = f"{folder}/means"
    with tiny.installed(tiny.method("means", state=rules)):
        shards = peftcore.apply(peftcore.load_sharded(f"{folder}/llama"), "means")
        peftcore.save(shards, where)
        loaded = peftcore.load(peftcore.load_sharded(f"{folder}/llama"), where)
        whole = base(folder, "llama")
        return [
            (parameter - whole.get_submodule(path).weight.mean()).abs().max().item()
            for path, adapter in adapter_modules(loaded, "default")
            for parameter in adapter.parameters()
        ]
