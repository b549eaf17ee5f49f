"""CPT, context-aware prompt tuning (Blau et al. 2024, arXiv 2410.17222): train few-shot examples within small balls.

    P_i = E(token i) + d_i,  |d_i| <= ε_i        E: embeddings of examples that are formatted like the text; d: trained
    ε_i = (ε of formats or of inputs) · sqrt(hidden / 2048); each step projects d_i back to its ball (section 3.4)

    token type mod 4:  1 format of an input   2 input   3 format of an output   0 output (type 0 itself: none of these)
    loss = mean over labels of type 4, 8, ...:  g^k · cross-entropy       k: number of later examples in the row

The outputs of the prompt's examples are labels as well (section 3.3). Their embeddings stay fixed, as do tokens of
type 0. Token types of the input continue from the prompt's: 4 everywhere, or the call's `input_type_mask`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore import ops
from peftcore.plugin import (
    Adapter,
    Architecture,
    Around,
    Base,
    Fields,
    Method,
    Placement,
    SoftPrompt,
    StateRules,
    Tensors,
    current_call,
    hookimpl,
    override,
    prompt_tensor_name,
    ranks,
    validation,
)

peftcore_api = ">=3.0,<4"


@dataclass(frozen=True)
class CptConfig:
    """Config with the field names of Hugging Face PEFT's `CPTConfig`.

    Args:
        cpt_token_ids: token ids of the prompt.
        cpt_tokens_type_mask: types of the tokens: 1 to 4 in the first example, 5 to 8 in the second, ... None: all 1.
        cpt_mask: one number per token, unused, as in PEFT: every token of the prompt is attended to.
        opt_weighted_loss_type: "decay": weight each example by g to the power of its distance from the last.
        opt_loss_decay_factor: g.
        opt_projection_epsilon, opt_projection_format_epsilon: ε of inputs, and of formats, at hidden size 2048.
        tokenizer_name_or_path: only recorded in the file.
        modules_to_save: modules to train in full as well.
        num_virtual_tokens, token_dim, num_layers, num_attention_heads, num_transformer_submodules: taken from the
            tokens and the model, and written for PEFT.
    """

    cpt_token_ids: Sequence[int] | None = None
    cpt_mask: Sequence[int] | None = None
    cpt_tokens_type_mask: Sequence[int] | None = None
    opt_weighted_loss_type: Literal["none", "decay"] | None = "none"
    opt_loss_decay_factor: float = 1.0
    opt_projection_epsilon: float = 0.1
    opt_projection_format_epsilon: float = 0.1
    tokenizer_name_or_path: str | None = None
    modules_to_save: Sequence[str] | None = None
    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_layers: int | None = None
    num_attention_heads: int | None = None
    num_transformer_submodules: int | None = None

    def __post_init__(self) -> None:
        validation.check_types(self)
        tokens = [0] if self.cpt_token_ids is None else list(self.cpt_token_ids)
        lengths = {"num_virtual_tokens": self.num_virtual_tokens}
        for name in ("cpt_mask", "cpt_tokens_type_mask"):
            mask = getattr(self, name)
            lengths[name] = None if mask is None else len(mask)
        actual = f"found {len(tokens)} tokens and {lengths}"
        fits = set(lengths.values()) <= {None, len(tokens)} and len(tokens) > 0
        validation.require(
            fits, f"cpt_token_ids, cpt_mask and cpt_tokens_type_mask must have the same length, {actual}"
        )
        negative = min([*tokens, *(self.cpt_tokens_type_mask or ())]) < 0
        validation.require(not negative, "cpt_token_ids and cpt_tokens_type_mask must not contain negative numbers")
        for name in ("opt_projection_epsilon", "opt_projection_format_epsilon", "opt_loss_decay_factor"):
            value = getattr(self, name)
            validation.require(value >= 0, f"{name} must not be negative, found {value}")

    def resolved(self, model: nn.Module, architecture: Architecture) -> CptConfig:
        """Return the config with the masks and the model's sizes filled in."""
        tokens = [0] if self.cpt_token_ids is None else list(self.cpt_token_ids)
        embedding: Any = None if architecture.embedding is None else model.get_submodule(architecture.embedding)
        defaults: dict[str, Any] = {"cpt_token_ids": tokens, "num_virtual_tokens": len(tokens)}
        defaults |= {"cpt_mask": [1] * len(tokens), "cpt_tokens_type_mask": [1] * len(tokens)}
        defaults |= {"token_dim": getattr(embedding, "embedding_dim", None), "num_layers": architecture.num_layers}
        defaults |= {"num_attention_heads": architecture.num_heads, "num_transformer_submodules": 1}
        missing = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return replace(self, **missing)


class ContextPrompt(Adapter):
    """Prompt P: token embeddings `embedding` plus d, `delta_embedding`, both `[n, hidden]`."""

    needs_call = ("input_type_mask",)
    embedding: Tensor

    def __init__(self, config: CptConfig) -> None:
        super().__init__()
        self.tokens, self.hidden = len(config.cpt_token_ids or ()), config.token_dim or 0
        self.register_buffer("embedding", torch.zeros(self.tokens, self.hidden))
        self.delta_embedding = nn.Parameter(torch.zeros(self.tokens, self.hidden))
        format_eps, input_eps = config.opt_projection_format_epsilon, config.opt_projection_epsilon
        epsilons = (0.0, format_eps, input_eps, format_eps)  # by type mod 4
        scale = (self.hidden / 2048) ** 0.5
        self.radius = [epsilons[token_type % 4] * scale for token_type in config.cpt_tokens_type_mask or ()]

    def projected(self, d: Tensor) -> Tensor:
        """Return d `[n, hidden]` with each row projected to its ball."""
        radius = d.new_tensor(self.radius)[:, None]
        return d * (radius / d.norm(dim=1, keepdim=True).clamp(min=1e-10).max(radius))

    def forward(self) -> Tensor:
        d, moves = self.delta_embedding, self.delta_embedding.new_tensor(self.radius)[:, None] > 0
        # The output uses the projected d, but its gradient passes to d unchanged.
        step = self.projected(d.detach()) - d.detach()
        return self.embedding + torch.where(moves, d, d.detach()) + step

    @override
    def in_output(self) -> bool:
        """Return whether logits of the prompt are needed: its outputs are labels if the input has labels."""
        return current_call().get("labels") is not None


class ContextLoss(Adapter):
    """Wraps the model to compute the loss over prompt and input from the logits of both."""

    needs_call = ContextPrompt.needs_call

    def __init__(self, config: CptConfig) -> None:
        super().__init__()
        self.token_ids, self.types = list(config.cpt_token_ids or ()), list(config.cpt_tokens_type_mask or ())
        self.decay = config.opt_loss_decay_factor if config.opt_weighted_loss_type == "decay" else 1.0

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        call = current_call()
        if call.get("labels") is None:
            return base(*args, **kwargs)
        validation.require("labels" in kwargs, "CPT reads labels by name: call model(..., labels=labels)")
        labels, items = kwargs["labels"], kwargs.get("num_items_in_batch")
        output = base(*args, **{**kwargs, "labels": None, "return_dict": True})
        n, expected = len(self.types), len(self.types) + labels.shape[1]
        length = None if output.get("logits") is None else output.logits.shape[1]
        message = f"CPT's loss needs logits of the {n} prompt tokens and {labels.shape[1]} labels, found {length}"
        validation.require(
            length == expected, f"{message}. Remove logits_to_keep, and use no loss that skips the logits"
        )
        loss = self.loss(output.logits, labels, call.get("input_type_mask"))
        if items is not None:
            # With gradient accumulation the step's loss is a mean over its batches, weighted by their labels.
            loss = loss * (labels[:, 1:] != -100).sum() / items
        output.logits = output.logits[:, n:].contiguous()  # FSDP2 does not accept a view
        if output.get("hidden_states") is not None:
            output.hidden_states = tuple(states[:, n:] for states in output.hidden_states)
        output["loss"] = loss
        output.move_to_end("loss", last=False)
        return output if kwargs.get("return_dict") is not False else output.to_tuple()

    def loss(self, logits: Tensor, labels: Tensor, types: Any) -> Tensor:
        """Return the loss for logits `[batch, n + tokens, vocabulary]`, labels and types `[batch, tokens]`."""
        labels, last_type = labels.to(logits.device), max(self.types)
        message = (
            f"cpt_tokens_type_mask ends with type {last_type}, so labels would have type {last_type + 4}, "
            "which is not an output's"
        )
        fits = types is not None or last_type % 4 == 0
        validation.require(fits, f"{message}. End it with a multiple of 4, or pass input_type_mask in the call")
        types = torch.full_like(labels, 4) if types is None else torch.as_tensor(types).to(labels)
        types = torch.where(types > 0, types + last_type, types)
        prompt_types = labels.new_tensor(self.types).expand(len(labels), -1)
        prompt_ids = labels.new_tensor(self.token_ids).expand(len(labels), -1)
        # Position i predicts token i + 1, hence the shift by one.
        types = torch.cat([prompt_types, types], dim=1)[:, 1:]
        labels = torch.cat([prompt_ids, labels], dim=1)[:, 1:]
        outputs = (types > 0) & (types % 4 == 0)
        counts = outputs & (labels != -100)
        losses = ops.cross_entropy(logits, F.pad(labels.where(counts, -100), (0, 1), value=-100))[:, :-1]
        # An example's distance from the last is the number of output types in the row that are larger than its own.
        order, index = types.where(outputs, -1).sort(dim=1, descending=True)
        distance = F.pad((order.diff(dim=1) != 0).cumsum(dim=1), (1, 0))
        weights = self.decay ** torch.zeros_like(distance).scatter(1, index, distance).to(losses.dtype)
        return (losses * weights).sum() / counts.sum()


def place(model: nn.Module, config: CptConfig, architecture: Architecture) -> list[Placement]:
    decoder = architecture.task_type == "CAUSAL_LM" and architecture.embedding is not None
    message = f"CPT is for text decoders with a head, as in PEFT, but {type(model).__name__} is not one"
    validation.require(decoder, f"{message}. Choose prompt-tuning")
    embedding: Any = model.get_submodule(architecture.embedding or "")
    rows, tokens = embedding.num_embeddings, config.cpt_token_ids or ()
    message = f"cpt_token_ids contains {max(tokens)}, but the model's largest token id is {rows - 1}"
    validation.require(max(tokens) < rows, f"{message}. Use ids from the model's tokenizer")
    prompt = ContextPrompt(config)
    return [SoftPrompt(prompt, (prompt.tokens, prompt.hidden)), Around("", ContextLoss(config))]


def prompts(adapters: Mapping[str, Any]) -> list[Any]:
    modules = itertools.chain.from_iterable(adapter.modules() for adapter in adapters.values())
    return [module for module in modules if isinstance(module, ContextPrompt)]


def initialize(model: Any, adapters: Mapping[str, Any], config: CptConfig, batches: Iterable[Any] | None) -> None:
    embedding = model.get_input_embeddings()
    for prompt in prompts(adapters):
        tokens = torch.tensor(config.cpt_token_ids, device=embedding.weight.device)
        prompt.embedding.copy_(embedding(tokens))


@torch.no_grad()
def after_step(adapters: Mapping[str, Any], config: CptConfig, step: int, total_steps: int) -> None:
    for prompt in prompts(adapters):
        ranks.fill(prompt.delta_embedding, prompt.projected(ranks.whole(prompt.delta_embedding)))


def export(placement: Any) -> dict[str, Tensor]:
    """Return P, the only tensor in PEFT's files. PEFT continues training from it, with new balls around it."""
    prompt: Any = placement.adapter
    return {"prompt_embeddings": prompt().detach()} if isinstance(prompt, ContextPrompt) else {}


def read(model: nn.Module | None, tensors: dict[str, Tensor], fields: dict[str, Any]) -> tuple[Tensors, Fields]:
    if "embedding" in tensors or "prompt_embeddings" not in tensors:
        return tensors, fields
    rows = tensors.pop("prompt_embeddings")
    return {**tensors, "embedding": rows, "delta_embedding": torch.zeros_like(rows)}, fields


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(peft_type="CPT", tensor_name=prompt_tensor_name, export=export, read=read)
    hooks: dict[str, Any] = {"initialize": initialize, "after_step": after_step}
    return [Method("cpt", CptConfig, place, rules, **hooks, learning_rate=1e-3)]
