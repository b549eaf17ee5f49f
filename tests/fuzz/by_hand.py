"""What an adapter folder computes, from the formulas alone: read by json and safetensors, no line of peftcore."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

PREFIX = "base_model.model."
Call = Callable[[], Tensor]


def logits(model: nn.Module, folder: Path, tokens: Tensor) -> Tensor:
    """Of a fresh model, which is changed, with what lies in the folder.

    Raises:
        Any exception: the files say nothing that can be computed.
    """
    parts = [folder]
    file = next(
        file for file in (folder / "adapter_model.safetensors", folder / "adapter.safetensors") if file.exists()
    )
    with safe_open(file, "pt") as archive:
        told = json.loads((archive.metadata() or {}).get("peftcore_together", "null"))
    if told and all((_inside(folder, name) / "adapter_model.safetensors").exists() for name in told["adapters"]):
        parts = [_inside(folder, name) for name in told["active"]]

    def call() -> Tensor:
        return model(tokens).logits

    for part in parts:
        fields = json.loads((part / "adapter_config.json").read_text())
        found = safetensors.torch.load_file(part / file.name)
        assert all(t.is_floating_point() and t.double().isfinite().all() for t in found.values()), (
            "no numbers of an adapter"
        )
        found = {name: t.float() for name, t in found.items()}
        if "peft_type" not in fields:
            _adapterhub(model, fields["config"], found)
            continue
        match fields["peft_type"]:
            case "LORA":
                _lora(model, fields, found)
            case "BITFIT":
                _parameters(model, found)
            case "BOTTLENECK_ADAPTER":
                _bottleneck(model, fields, {n.removeprefix(PREFIX): t for n, t in found.items()})
            case "PROMPT_TUNING":
                call = _prompt(model, fields, found, tokens)
            case "PREFIX_TUNING":
                call = _prefix(model, fields, found, tokens)
            case other:
                raise ValueError(other)
    with torch.no_grad():
        return call()


def _inside(folder: Path, name: str) -> Path:
    return folder if name == "default" else folder / name


def _parameters(model: nn.Module, found: dict[str, Tensor]) -> None:
    own = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, tensor in found.items():
            own[name.removeprefix(PREFIX)].copy_(tensor)


def _pattern(patterns: dict[str, Any] | None, path: str, default: Any) -> Any:
    return next((v for key, v in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", path)), default)


def _lora(model: nn.Module, fields: dict[str, Any], found: dict[str, Tensor]) -> None:
    whole = {name: tensor for name, tensor in found.items() if "lora_" not in name}
    _parameters(model, whole)
    for name, a in found.items():
        if not name.endswith(".lora_A.weight"):
            continue
        path = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        b = found[name.replace("lora_A", "lora_B")]
        r = _pattern(fields.get("rank_pattern"), path, fields.get("r", 8))
        alpha = _pattern(fields.get("alpha_pattern"), path, fields.get("lora_alpha", 8))
        assert a.shape[0] == r
        scale = alpha / (math.sqrt(r) if fields.get("use_rslora") else r)
        _behind(model, path, lambda x, y, a=a, b=b, scale=scale: y + scale * (x @ a.T @ b.T))


def _behind(model: nn.Module, path: str, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """`change(x, y)` in place of the output of the module at `path`."""

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        first = change(x, output[0] if isinstance(output, tuple) else output)
        return (first, *output[1:]) if isinstance(output, tuple) else first

    model.get_submodule(path).register_forward_hook(hook, with_kwargs=True)


_ACTS = {
    "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "swish": F.silu, "tanh": torch.tanh, "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu, "leakyrelu": F.leaky_relu, "elu": F.elu, "mish": F.mish, "linear": lambda x: x,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
}  # fmt: skip


def _bottleneck(model: nn.Module, fields: dict[str, Any], found: dict[str, Tensor]) -> None:
    act, scaling = _ACTS[fields.get("non_linearity", "relu")], fields.get("scaling", 1.0)
    assert not fields.get("original_ln_before")
    for name, d in found.items():
        if not name.endswith(".adapter_down.weight"):
            continue
        path = name.removesuffix(".adapter_down.weight")
        b, u, c = (found[f"{path}.adapter_{part}"] for part in ("down.bias", "up.weight", "up.bias"))

        def change(x: Tensor, y: Tensor, d=d, b=b, u=u, c=c) -> Tensor:
            read = x if fields.get("is_parallel") else y
            return y + scaling * F.linear(act(F.linear(read, d, b)), u, c)

        _behind(model, path, change)


def _adapterhub(model: nn.Module, fields: dict[str, Any], found: dict[str, Tensor]) -> None:
    assert not fields.get("is_parallel") and fields.get("residual_before_ln", True)
    renamed = {}
    for name, tensor in found.items():
        layer = re.search(r"layers\.(\d+)\.", name)[1]
        assert ".output_adapters." in name
        part = "" if fields.get("original_ln_before") else "mlp."
        last = name.split(".adapters.")[1].partition(".")[2].replace("adapter_down.0", "adapter_down")
        renamed[f"model.layers.{layer}.{part}{last}"] = tensor
    act = fields["non_linearity"].lower()
    _bottleneck(model, {"non_linearity": act, "scaling": fields.get("scaling", 1.0)}, renamed)


def _prompt(model: nn.Module, fields: dict[str, Any], found: dict[str, Tensor], tokens: Tensor) -> Call:
    (name,) = found
    assert name == "prompt_embeddings"
    n = fields.get("num_virtual_tokens", 20)
    rows = found[name][:n]
    assert len(rows) == n

    def call() -> Tensor:
        embedded = model.get_input_embeddings()(tokens)
        return model(inputs_embeds=torch.cat([rows.expand(len(tokens), -1, -1), embedded], 1)).logits[:, n:]

    return call


def _prefix(model: nn.Module, fields: dict[str, Any], found: dict[str, Tensor], tokens: Tensor) -> Call:
    from transformers import DynamicCache

    config = model.config
    heads, size, layers = (
        config.num_key_value_heads,
        config.hidden_size // config.num_attention_heads,
        config.num_hidden_layers,
    )
    if "embedding" in found:
        w = found
        hidden = torch.tanh(F.linear(w["embedding"], w["projection.0.weight"], w["projection.0.bias"]))
        rows = F.linear(hidden, w["projection.2.weight"], w["projection.2.bias"])
    else:
        rows = found["prompt_embeddings"]
    n = fields.get("num_virtual_tokens", 20)
    assert len(rows) == n
    parts = rows.view(n, layers, 2, heads, size).permute(1, 2, 3, 0, 4)

    def call() -> Tensor:
        cache = DynamicCache(config=config)
        for layer, (key, value) in enumerate(parts):
            cache.update(*(part.expand(len(tokens), -1, -1, -1) for part in (key, value)), layer)
        names = inspect.signature(model.forward).parameters
        return model(tokens, **{"cache" if "cache" in names else "past_key_values": cache}).logits

    return call
