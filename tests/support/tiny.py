"""Tiny models of each kind with random weights, and toy methods: one for every placement."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peftcore
from peftcore.model import observe, share_cache
from peftcore.plugin import (
    Adapter,
    After,
    Architecture,
    Around,
    Method,
    OnWeight,
    PrefixKV,
    SoftPrompt,
    StateRules,
    Train,
    hookimpl,
)
from peftcore.plugin.registry import registry
from peftcore.testing import tiny_llama

TOKENS = torch.tensor([[5, 17, 3, 60, 41, 22, 9], [8, 4, 77, 31, 2, 50, 63]])


def without_hash(folder: Path) -> None:
    """Make an adapter folder one of another library: nothing says which config belongs to the tensors."""
    for file in folder.rglob("adapter_model.safetensors"):
        content = file.read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        header.get("__metadata__", {}).pop("peftcore_config_hash", None)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


def observed(make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Observe the first model that `make` returns for its arguments, and let the others know its trace.

    A trace takes three times as long as making a tiny model and applying an adapter to it. Each model has a copy of the
    facts, and uses them only while its structure is that of the first.
    """

    @functools.cache
    def first(*args: Any, **kwargs: Any) -> nn.Module:
        model = make(*args, **kwargs)
        observe(model)
        return model

    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> nn.Module:
        other = first(*args, **kwargs)
        model = make(*args, **kwargs)  # sets the seed again
        share_cache(model, other, shared=False)
        return model

    return made


@observed
def llama(seed: int = 0) -> nn.Module:
    return tiny_llama(seed, intermediate_size=48)  # rows that are not whole blocks, where formats have blocks of 32


@observed
def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, **special)).eval()


@observed
def bert_classifier() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return BertForSequenceClassification(BertConfig(vocab_size=96, num_labels=3, **sizes)).eval()


def roberta_classifier() -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    special = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    return RobertaForSequenceClassification(RobertaConfig(vocab_size=96, num_labels=3, **special, **sizes)).eval()


def llama_classifier() -> nn.Module:
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(1)
    config = llama().config
    config.num_labels = 3
    return LlamaForSequenceClassification(config).eval()


@observed
def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=96, decoder_start_token_id=0, **sizes)).eval()


def convnet() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, padding="same", dilation=2), nn.Flatten()
    ).eval()


def batchnorm_net(seed: int = 0) -> nn.Module:
    """A convolution, a BatchNorm with statistics of its own, and a classifier `head`; for images `[batch, 3, 8, 8]`."""
    torch.manual_seed(seed)
    layers = {"conv": nn.Conv2d(3, 6, 3), "norm": nn.BatchNorm2d(6), "flat": nn.Flatten(), "head": nn.Linear(216, 4)}
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    nn.init.normal_(model.norm.running_mean)
    nn.init.uniform_(model.norm.running_var, 0.5, 2)
    return model.eval()


IMAGES = torch.linspace(-1, 3, 4 * 3 * 8 * 8).sin().view(4, 3, 8, 8)

MODELS: dict[str, Callable[[], nn.Module]] = {"llama": llama, "gpt2": gpt2, "bert": bert_classifier, "t5": t5}


def inputs(model: nn.Module) -> dict[str, Tensor]:
    """Tokens for any of `MODELS`."""
    call = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
    if model.config.is_encoder_decoder:
        call["decoder_input_ids"] = TOKENS[:, :4]
    return call


def logits(model: nn.Module, **changes: Any) -> Tensor:
    with torch.no_grad():
        return model(**{**inputs(model), **changes}).logits


# Toy methods


@dataclass(frozen=True)
class ToyConfig:
    target_modules: tuple[str, ...] = ("q_proj",)
    value: float = 2.0
    names: tuple[str, ...] = ()


class Scaled(Adapter):
    """y = gain · base(x)."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(value))

    def forward(self, base: Any, x: Tensor) -> Tensor:
        return self.gain.to(x.dtype) * base(x)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.gain * weight, None if bias is None else self.gain * bias


class LowRank(nn.Module):
    """W -> W + B A of a parameter `[..., out, in]`; all that is before, a dimension of experts say, has its own."""

    def __init__(self, *shape: int, rank: int = 2) -> None:
        super().__init__()
        *before, rows, columns = shape
        self.a = nn.Parameter(0.1 * torch.randn(*before, rank, columns))
        self.b = nn.Parameter(torch.zeros(*before, rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.b @ self.a).to(weight.dtype)


class Shifted(nn.Module):
    """y -> y + shift."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(value))

    def forward(self, y: Tensor) -> Tensor:
        return y + self.shift.to(y.dtype)


class Bank(nn.Module):
    """What all adapters share: a trained `[2, out]`, and a drawn `[2, in]` that stays."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.register_buffer("drawn", torch.randn(2, features))
        self.trained = nn.Parameter(0.1 * torch.randn(2, outputs))


class Banked(nn.Module):
    """y = base(x) + gate · x drawnᵀ trained."""

    def __init__(self, bank: Bank) -> None:
        super().__init__()
        self.bank = bank
        self.gate = nn.Parameter(torch.ones(2))

    def forward(self, base: Any, x: Tensor) -> Tensor:
        drawn, trained = self.bank.drawn.to(x.dtype), self.bank.trained.to(x.dtype)
        return base(x) + (x @ drawn.T * self.gate.to(x.dtype)) @ trained


class Vectors(nn.Module):
    """Vectors of a given shape."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(0.1 * torch.randn(*shape))

    def forward(self) -> Tensor:
        return self.vectors


def _paths(model: nn.Module, config: ToyConfig, architecture: Architecture) -> list[str]:
    return list(peftcore.model.targets.select(model, architecture, target_modules=config.target_modules))


def _around(model: nn.Module, config: ToyConfig, architecture: Architecture) -> list[Any]:
    return [Around(path, Scaled(config.value)) for path in _paths(model, config, architecture)]


def _on_weight(model: nn.Module, config: ToyConfig, architecture: Architecture) -> list[Any]:
    """Of the parameters `names`, `path:name`."""
    placements = []
    for each in config.names:
        path, _, name = each.partition(":")
        module = model.get_submodule(path)
        shape = module.get_parameter(name).shape if not hasattr(module, "packed") else module.packed.shape
        placements.append(OnWeight(path, name, LowRank(*shape)))
    return placements


def _after(model: nn.Module, config: ToyConfig, architecture: Architecture) -> list[Any]:
    return [After("model.layers.0.self_attn", Shifted(config.value))]


def _soft_prompt(model: nn.Module, config: ToyConfig, architecture: Architecture) -> list[Any]:
    return [SoftPrompt(Vectors(3, architecture.hidden_size))]


def _prefix(model: nn.Module, config: ToyConfig, architecture: Architecture) -> list[Any]:
    a = architecture
    return [PrefixKV(Vectors(a.num_layers, 2, a.num_kv_heads, 3, a.head_dim))]


def _train(model: nn.Module, config: ToyConfig, architecture: Architecture) -> list[Any]:
    return [Train(config.names)]


def _shared(model: nn.Module, config: ToyConfig, architecture: Architecture) -> list[Any]:
    paths = _paths(model, config, architecture)
    inputs, outputs = peftcore.model.targets.sizes(model.get_submodule(paths[0]))
    bank = Bank(inputs, outputs)
    return [Around(path, Banked(bank)) for path in paths]


PLACES = {
    "shared": _shared,
    "around": _around,
    "after": _after,
    "on-weight": _on_weight,
    "soft": _soft_prompt,
    "prefix": _prefix,
    "train": _train,
}


class Plugin:
    """A plugin object that offers `methods`."""

    peftcore_api = ">=3.0,<4"

    def __init__(self, *methods: Method) -> None:
        self._methods = list(methods)

    @hookimpl
    def peftcore_methods(self) -> list[Method]:
        return self._methods


def method(name: str, place: Any = _around, **changes: Any) -> Method:
    config = dataclass(frozen=True)(type(f"Toy{name.title().replace('-', '')}Config", (ToyConfig,), {}))
    rules = StateRules(peft_type=f"TOY_{name.upper()}")
    return Method(name, config, place, changes.pop("state", rules), **changes)


@contextmanager
def installed(*methods: Method) -> Iterator[None]:
    """Within the block each method is registered as a plugin of its own."""
    for each in methods:
        registry.register(each.name, Plugin(each), distribution=f"peftcore-{each.name}", version="1.0")
    try:
        yield
    finally:
        for each in methods:
            registry.unregister(each.name)
