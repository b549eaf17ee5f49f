"""Write an adapter folder for vLLM and SGLang.

Both read a subset of PEFT's format (vLLM's vllm/lora/peft_helper.py and lora_model.py, SGLang's srt/lora/lora_config.py
and lora.py), without DoRA, biases and `modules_to_save`. Older versions silently ignore `rank_pattern`, `alpha_pattern`
and, in SGLang, `use_rslora`. The file does not use these fields: factors are padded with zeros to one rank, and B is
multiplied so that all modules have one scale.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peftcore import engine
from peftcore.engine.composing import low_rank
from peftcore.errors import PeftcoreError
from peftcore.exporting.one_product import adapter_products, padded
from peftcore.files.folder import Content, Folder, read_tensors
from peftcore.files.reading import fields_of_folder
from peftcore.files.saving import save
from peftcore.plugin.adapter import LowRank
from peftcore.plugin.exporter import Exporter, NoOptions
from peftcore.plugin.peft_keys import PREFIX
from peftcore.plugin.registry import registry

WHAT = "be written for vLLM and SGLang"
RANKS = (8, 16, 32, 64, 128, 256, 512)  # values of vLLM's --max-lora-rank, 16 by default
PER_EXPERT = "per_expert"  # file format for experts that both read


def write(model: nn.Module, folder: Path, adapter: str, _options: NoOptions) -> None:
    """Write the folder.

    Raises:
        PeftcoreError: vLLM and SGLang do not support this kind of adapter.
    """
    if _has_experts(model, adapter):
        low_rank.refuse_trained(model, adapter, WHAT)
        save(model, folder, adapter=adapter, format=PER_EXPERT, resumable=False)
        return
    products = adapter_products(model, adapter, WHAT)
    rank, scale = max(len(each.a) for each in products.values()), next(iter(products.values())).scale or 1.0
    tensors: dict[str, Tensor] = {}
    for path, product in products.items():
        tensors.update(_tensors(model, adapter, path, padded(product, rank, scale)))
    Folder(folder).write({"": Content(_fields(model, products, rank, scale), tensors, {})})


def commands(folder: Path, base: str, _part: str = "adapter") -> list[str]:
    """Return commands that serve the folder with vLLM and SGLang."""
    lora_module, rank = f"mine={folder}", fields_of_folder(folder)[0]["r"]
    rank_option: list[str] = []
    if rank > RANKS[1]:  # above the default of vLLM
        rank_option = ["--max-lora-rank", str(next((value for value in RANKS if value >= rank), rank))]
    return [
        shlex.join(["vllm", "serve", base, "--enable-lora", *rank_option, "--lora-modules", lora_module]),
        shlex.join(["python", "-m", "sglang.launch_server", "--model-path", base, "--lora-paths", lora_module]),
    ]


def remarks(folder: Path, base: str, _part: str = "adapter") -> list[str]:
    """Return notes on possible limitations of vLLM and SGLang with a folder that `write` wrote."""
    fields, tensors = fields_of_folder(folder)[0], read_tensors(folder)[0]
    rank, sentences = fields["r"], []
    if base.endswith(".gguf"):
        sentences.append(
            f"vLLM and SGLang load the base from a folder or hub id, but the base of this adapter is '{base}'."
        )
    if rank > RANKS[-1]:
        sentences.append(f"vLLM supports ranks up to {RANKS[-1]}, but the adapter has rank {rank}.")
    paths = {name.rpartition(".lora_")[0].removeprefix(PREFIX) for name in tensors}
    outside = sorted(path for path in paths if not any(part.isdigit() for part in path.split(".")))
    if outside:
        sentences.append(
            f"The adapter changes {', '.join(outside)} outside the layers, which vLLM and SGLang support only for "
            "some architectures."
        )
    if any(".experts." in path for path in paths):
        sentences.append(
            "The adapter loads only in versions of vLLM and SGLang that support experts of this architecture."
        )
        if fields.get("rank_pattern") or fields.get("alpha_pattern"):
            sentences.append(
                "The adapter has different ranks or scales for some modules, which older versions of "
                "vLLM and SGLang ignore."
            )
    return sentences


VLLM = Exporter("vllm", "vLLM, SGLang", write_adapter=write, usage=commands, remarks=remarks)


def _has_experts(model: nn.Module, adapter: str) -> bool:
    method = registry.method(engine.applied(model, adapter).method)
    changed = [site.name for _, site, _ in low_rank.sites(model, adapter)]
    return any(name is not None for name in changed) and PER_EXPERT in method.state.layouts


def _tensors(model: nn.Module, adapter: str, path: str, product: LowRank) -> dict[str, Tensor]:
    module: Any = model.get_submodule(path)
    stem = PREFIX + path
    if isinstance(module, nn.Embedding):
        return {
            f"{stem}.lora_embedding_A": product.b.T.contiguous(),
            f"{stem}.lora_embedding_B": product.a.T.contiguous(),
        }
    sizes = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if sizes != (len(product.b), product.a.shape[1]):
        raise PeftcoreError(
            f"'{adapter}' cannot {WHAT}: it changes '{path}', which is neither a linear layer nor an embedding. Use "
            "an adapter that was trained without it"
        )
    return {f"{stem}.lora_A.weight": product.a.contiguous(), f"{stem}.lora_B.weight": product.b.contiguous()}


def _fields(model: nn.Module, products: dict[str, LowRank], rank: int, scale: float) -> dict[str, Any]:
    ends = {path.rpartition(".")[2] for path in products}
    all_of_them = {path for path, _ in model.named_modules() if path.rpartition(".")[2] in ends}
    config = getattr(model, "config", None)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(config, "_name_or_path", None) or None,
        "r": rank,
        "lora_alpha": scale * rank,
        "target_modules": sorted(ends if all_of_them == products.keys() else products),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
