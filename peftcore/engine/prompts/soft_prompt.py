"""A soft prompt: vectors before the embedded input of a decoder, an encoder, or the encoder of an encoder-decoder.

Placeholder tokens precede the input, and the token embedding replaces them with the prompt's vectors:

    input_ids   s …  s   x_1 …        s is an ordinary token
    embedded    p_1 … p_n  E(x_1) …

Everything else that a model computes from its tokens then includes the prompt: masks and positions of images, per-layer
embeddings, routing, the detection of padding. A compiled graph cannot express this; it puts the prompt before the
embedded input if that is equivalent.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.engine.prompts.backbone import (
    IN_MASK,
    SOFT,
    Backbone,
    cache_argument,
    decoder_path,
    forward_arguments,
    input_embedding,
    is_causal,
    language_config,
    prepend,
    stacks,
)
from peftcore.errors import PeftcoreError
from peftcore.model.base_modules import base_modules
from peftcore.plugin.adapter import Adapter, Base
from peftcore.plugin.architecture import Architecture, config_fields
from peftcore.plugin.call import current_frame

_ADDS_SOUND = ("voxtral_realtime", "voxtral_realtime_text")  # families that pair each token with an audio frame


def place_soft_prompt(
    model: nn.Module, architecture: Architecture, adapter: nn.Module, tokens: int, hidden: int
) -> list[tuple[str, nn.Module]]:
    """Return (path, adapter) for the backbone, or for encoder and decoder, for a prompt `[tokens, hidden]`."""
    embedding = model.get_submodule(architecture.embedding or "")
    width = getattr(embedding, "embedding_dim", hidden)
    if hidden != width:
        raise PeftcoreError(
            f"the prompt's vectors have width {hidden}, but the token embedding has width {width}. Make the prompt "
            "of the embedding's width"
        )
    decoder_adapters: list[tuple[str, nn.Module]] = []
    keeps = causal = senses = False
    if architecture.is_encoder_decoder:
        path, decoder = stacks(model, architecture)
        keeps = True
        decoder_adapters = [(decoder, CrossMask(model.get_submodule(decoder)))]
    else:
        path, senses = _entry(model, architecture)
        causal = is_causal(model.get_submodule(path), architecture)
        if architecture.task_type == "SEQ_CLS" and not causal:
            # A head pools the output of a bidirectional encoder at position 0 or by the mask, so it needs the prompt's
            # outputs.
            path, keeps = "", True
    backbone = model.get_submodule(path)
    names = forward_arguments(backbone)
    _refuse_unreadable(model, path, names)
    # The decoder's argument name for the cache: some backbones pass it in **kwargs.
    cache_name = None if keeps else cache_argument(model.get_submodule(decoder_path(model, architecture)))
    input_table = input_embedding(backbone) or embedding
    needs_tokens = senses or "inputs_embeds" not in names or _reads_tokens(backbone, input_table)
    around = SoftPromptAround(
        adapter,
        backbone,
        tokens,
        hidden=hidden,
        cache_argument=None if keeps else cache_name or cache_argument(backbone),
        causal=causal and not keeps,
        keeps=keeps,
        stand_in=ordinary_token(model.config),
        needs_tokens=needs_tokens,
        embedding=input_table,
        counts=not senses,  # the model itself computes positions of images
    )
    embedding_path = next(name for name, module in base_modules(model) if module is input_table)
    return [(path, around), *decoder_adapters, (embedding_path, StandIns(backbone))]


def _refuse_unreadable(model: nn.Module, path: str, names: Sequence[str]) -> None:
    """Raise a PeftcoreError if the backbone at `path`, with arguments `names`, does not support embedded inputs."""
    backbone = model.get_submodule(path)
    if "input_ids" not in names and "inputs_embeds" not in names:
        raise PeftcoreError(
            f"a soft prompt needs tokens, but '{path}' ({type(backbone).__name__}) takes {', '.join(names[:3])}. Use "
            "a prefix or a method for linear layers"
        )
    if getattr(language_config(backbone), "model_type", None) in _ADDS_SOUND:
        raise PeftcoreError(
            f"{type(model).__name__} adds an audio frame to each token, but a soft prompt has none. Use a prefix or "
            "a method for linear layers"
        )


def _entry(model: nn.Module, architecture: Architecture) -> tuple[str, bool]:
    """Return the path of the module that is called with tokens, and whether it also takes images or audio."""
    path = decoder_path(model, architecture)
    backbone = model.get_submodule(architecture.backbone)
    other_arguments = set(forward_arguments(backbone)) - set(forward_arguments(model.get_submodule(path)))
    senses = any(part in name for name in other_arguments for part in ("pixel", "image", "video", "audio", "feature"))
    has_head = architecture.backbone == "" and architecture.output_head is not None
    if senses and "input_ids" in forward_arguments(backbone) and not has_head:
        return architecture.backbone, True
    return path, False


def _reads_tokens(backbone: nn.Module, embedding: nn.Module) -> bool:
    """Return whether the backbone reads token ids for more than the embedding: further tables, or padding.

    Gemma 4 and DeepSeek-V4 have further tables; RoBERTa detects padding by its token and skips it in positions.
    """
    config = language_config(backbone)
    sizes = {value for name, value in config_fields(config).items() if name.startswith("vocab_size")}
    embeddings = (m for m in backbone.modules() if isinstance(m, nn.Embedding) and m is not embedding)
    routes = (t for t in (*backbone.parameters(), *backbone.buffers()) if t.dim() > 1 and not t.is_floating_point())
    tables = any(m.num_embeddings in sizes or m.padding_idx is not None for m in embeddings)
    return tables or any(t.shape[0] in sizes for t in routes)


class SoftPromptAround(Backbone):
    """Adapter that inserts vectors, `adapter() -> [tokens, hidden]` or `[batch or 1, tokens, hidden]`.

    Args:
        hidden: width of the vectors.
        keeps: keep the vectors in the output, as for an encoder.
        stand_in: placeholder token for the vectors until the embedding, if the call has tokens.
        embedding: the token embedding.
        needs_tokens: use placeholders also in a compiled graph, which otherwise puts vectors before the embedded input.
        counts: compute positions for padded batches if causal.
    """

    def __init__(
        self,
        adapter: nn.Module,
        backbone: nn.Module,
        *args: Any,
        hidden: int,
        stand_in: int,
        embedding: nn.Module,
        needs_tokens: bool = False,
        keeps: bool = False,
        counts: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(adapter, backbone, *args, **kwargs)
        self._hidden = hidden
        self._keeps = keeps
        self._stand_in = stand_in
        self._embedding = (embedding,)  # in a tuple, so that it is not registered as a submodule
        self._needs_tokens = needs_tokens
        self.counts = self.counts and counts
        rope = getattr(language_config(backbone), "rope_parameters", None) or {}
        self._has_coordinates = len(rope.get("mrope_section", ())) > 3  # coordinates beside the text position

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        call = self._call(args, kwargs)
        cache, past = self._cached(call)
        self._refuse_other_state(base.module, call)
        if (frame := current_frame()) is not None:
            vars(frame.call)[SOFT] = True
        mask = call.get("attention_mask")
        length = self._make_room(call, past)
        order = back = None
        if mask is not None:
            order, back = self._move_behind_padding(call, mask, prefixes=getattr(cache, IN_MASK, 0))
        if past > 0:
            return base(**call)
        self._grow(call, order)
        in_graph = torch.compiler.is_compiling() and not self._needs_tokens
        if call.get("input_ids") is not None and not in_graph:
            output = self._by_tokens(base, call, order)
        else:
            output = base(**self._embedded(call, order))
        if self._keeps:
            return output
        if not (isinstance(self.adapter, Adapter) and self.adapter.in_output()):
            return _without_prompt(output, self.tokens, self.tokens + length, back)
        if back is not None:
            back = torch.cat([places(order, self.tokens, len(back), back.device), back], dim=1)
        return _without_prompt(output, 0, self.tokens + length, back)

    def _refuse_other_state(self, module: nn.Module, call: dict[str, Any]) -> None:
        """Raise a PeftcoreError if earlier calls left state outside the cache."""
        for name, value in call.items():
            if value is not None and name.startswith("past_") and name != self._cache_argument:
                raise PeftcoreError(
                    f"{type(module).__name__} stores earlier tokens in '{name}', so it is unknown whether they "
                    "include the soft prompt. Generate with use_cache=False"
                )

    def _make_room(self, call: dict[str, Any], past: int) -> int:
        positions = call.get("position_ids")
        length = super()._make_room(call, past)
        if self._has_coordinates and isinstance(positions, Tensor) and positions.dim() == 3:
            # Only the first axis of image positions grows with the text.
            coordinates = (positions != positions[:1]).any(0)
            call["position_ids"][1:] = torch.where(coordinates, positions[1:], call["position_ids"][1:])
        return length

    def _move_behind_padding(self, call: dict[str, Any], mask: Tensor, *, prefixes: int) -> tuple[Tensor, Tensor]:
        """Move the prompt's columns of the extended mask behind each row's left padding, and return `orders`.

        Padding must not separate prompt and input, because attention windows, ALiBi and recurrences include it.

        Args:
            mask: the mask of the call, without the prompt.
            prefixes: number of leading columns that belong to prefixes.
        """
        order, back = orders(mask[:, prefixes:], self.tokens)
        extended_mask = call["attention_mask"]
        call["attention_mask"] = torch.cat(
            [extended_mask[:, :prefixes], extended_mask[:, prefixes:].gather(-1, order)], dim=-1
        )
        return order, back

    def _embedded(self, call: dict[str, Any], order: Tensor | None) -> dict[str, Any]:
        embeddings = call.get("inputs_embeds")
        if embeddings is None:
            embeddings = self._embedding[0](call["input_ids"])  # [batch, length, hidden]
        prompt = self._vectors(embeddings.shape[0]).to(embeddings.dtype).expand(embeddings.shape[0], -1, -1)
        rows = torch.cat([prompt, embeddings], dim=1)  # [batch, tokens + length, hidden]
        return {**call, "input_ids": None, "inputs_embeds": rows if order is None else _taken(rows, order)}

    def _vectors(self, batch: int) -> Tensor:
        """Return the vectors, `[tokens, hidden]` or `[batch or 1, tokens, hidden]`."""
        vectors: Tensor = self.adapter()
        fits = vectors.shape[-2:] == (self.tokens, self._hidden)
        if not fits or vectors.dim() > 3 or (vectors.dim() == 3 and vectors.shape[0] not in (1, batch)):
            raise PeftcoreError(
                f"a soft prompt must be [{self.tokens}, {self._hidden}], or [{batch} or 1, {self.tokens}, "
                f"{self._hidden}] in a batch of {batch}; {type(self.adapter).__name__} returned "
                f"{list(vectors.shape)}. If it reads the call, check that it uses all rows"
            )
        return vectors

    def _by_tokens(self, base: Base, call: dict[str, Any], order: Tensor | None) -> Any:
        tokens = call["input_ids"]
        extended_tokens = prepend(tokens, torch.ones, self.tokens)
        extended_tokens[:, : self.tokens] = self._stand_in
        call["input_ids"] = _reordered(extended_tokens, order)
        with entering(base.module) as waiting:
            # The vectors of an outer prompt move, since this prompt's placeholders precede them.
            batch, columns = extended_tokens.shape
            token_places = places(order, columns, batch, extended_tokens.device)
            moved_prompts: list[tuple[Tensor, Tensor]] = []
            for prompt_places, vectors in waiting.prompts:
                moved_prompts.append((token_places[:, self.tokens :].gather(1, prompt_places), vectors))
            waiting.prompts[:] = [*moved_prompts, (token_places[:, : self.tokens], self._vectors(batch))]
            waiting.columns = columns
            return base(**call)

    def _grow(self, call: dict[str, Any], order: Tensor | None) -> None:
        """Extend positions and all other per-token arguments by entries for the prompt."""
        positions = call.get("position_ids")
        if positions is not None:
            prompt_entries = torch.arange(-self.tokens, 0, device=positions.device, dtype=positions.dtype)
            text_positions = positions[:1] if self._has_coordinates and positions.dim() == 3 else positions
            prompt_entries = text_positions.amin(-1, keepdim=True) + prompt_entries  # directly before the first token
            prompt_entries = prompt_entries.expand(*positions.shape[:-1], -1)
            call["position_ids"] = _reordered(torch.cat([prompt_entries, positions], dim=-1), order)
        inputs = call.get("inputs_embeds")
        shape = (call["input_ids"] if inputs is None else inputs).shape[:2]
        for name, value in call.items():
            if isinstance(value, Tensor) and value.shape[:2] == shape and _is_per_token(name, value):
                prompt_entries = value.new_zeros(len(value), self.tokens, *value.shape[2:])
                extended = torch.cat([prompt_entries, value], dim=1)
                call[name] = extended if order is None else _taken(extended, order)


class CrossMask(Backbone):
    """Adapter around a decoder that extends the cross-attention mask by the prompt in the encoder's output."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(None, module)

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        call = self._call(args, kwargs)
        states, mask = call.get("encoder_hidden_states"), call.get("encoder_attention_mask")
        if states is not None and mask is not None and mask.shape[-1] < states.shape[1]:
            tokens = states.shape[1] - mask.shape[-1]
            order, _ = orders(mask, tokens)
            call["encoder_attention_mask"] = prepend(mask, torch.ones, tokens).gather(-1, order)
        return base(**call)


_NOT_GROWN = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels")
# Arguments for images, video and audio, which may happen to have as many entries as tokens.
_OF_IMAGES = re.compile("pixel|image_(sizes|attention)|grid|aspect_ratio|shapes|video|audio|feature")


def _is_per_token(name: str, value: Tensor) -> bool:
    """Return whether an argument has one entry per token by its meaning, not only by its size: types, boxes, masks."""
    if value.dim() > 2:
        return name.endswith(("bbox", "attention_mask", "token_type_ids"))
    return name.removeprefix("encoder_").removeprefix("decoder_") not in _NOT_GROWN and not _OF_IMAGES.search(name)


def orders(mask: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Return indices that move a prompt behind each row's left padding, and the new positions of the input tokens."""
    padding = (mask.cumsum(-1) == 0).sum(-1, keepdim=True)  # [batch, 1]
    place = torch.arange(tokens + mask.shape[-1], device=mask.device)
    order = torch.where(place < padding, place + tokens, torch.where(place < padding + tokens, place - padding, place))
    place = place[: mask.shape[-1]]
    return order, torch.where(place < padding, place, place + tokens)


def _reordered(values: Tensor, order: Tensor | None) -> Tensor:
    """Return `values [..., batch, tokens]` in the order of each row."""
    if order is None:
        return values
    shape = (*values.shape[:-2], *order.shape)
    return values.expand(shape).gather(-1, order.expand(shape))


def _taken(states: Tensor, order: Tensor) -> Tensor:
    """Return `states [batch, tokens, ...]` in the order of each row."""
    index = order.view(*order.shape, *[1] * (states.dim() - 2))
    return states.gather(1, index.expand(*order.shape, *states.shape[2:]))


def _without_prompt(output: Any, tokens: int, columns: int, back: Tensor | None = None) -> Any:
    """Return the output at the input's tokens: after the prompt, or at the indices `back`.

    Args:
        tokens: number of vectors in the prompt.
        columns: number of tokens including the prompt.
    """

    def cut(states: Tensor) -> Tensor:
        if states.shape[1] != columns:
            raise PeftcoreError(
                f"the model returned {states.shape[1]} hidden states for {columns} tokens, {tokens} of them a soft "
                "prompt's, so the prompt's hidden states cannot be removed. Use a method for linear layers"
            )
        return states[:, tokens:] if back is None else _taken(states, back)

    if isinstance(output, tuple):
        return (cut(output[0]), *output[1:])
    if getattr(output, "last_hidden_state", None) is None:
        raise PeftcoreError(
            f"a soft prompt cannot be removed from a {type(output).__name__}, which has no last_hidden_state. Apply "
            "the adapter to the submodule that reads text, or use another method"
        )
    output.last_hidden_state = cut(output.last_hidden_state)
    if getattr(output, "hidden_states", None) is not None:
        output.hidden_states = tuple(cut(states) for states in output.hidden_states)
    if getattr(output, "last_hidden_state_ngram", None) is not None:  # one stream of states per entry
        streams = output.last_hidden_state_ngram
        streams = [cut(states) for states in streams.split(columns, dim=1)]
        output.last_hidden_state_ngram = torch.cat(streams, dim=1)
    return output


_ENTERED = threading.local()  # {id of a backbone: prompts waiting for its token embedding}, in each thread


@dataclass
class Waiting:
    """Prompts that wait between the backbone's call and the token embedding, and the number of columns with them."""

    prompts: list[tuple[Tensor, Tensor]]  # indices [batch, tokens], vectors [tokens, hidden] or [batch or 1, ...]
    columns: int = 0


@contextmanager
def entering(backbone: nn.Module) -> Iterator[Waiting]:
    """Make the token embedding of `backbone` insert the prompts added within the block; blocks may be nested.

    Raises:
        PeftcoreError: the token embedding was not called with the expected number of columns.
    """
    waiting_prompts: dict[Any, Waiting] = _ENTERED.__dict__
    if id(backbone) in waiting_prompts:
        yield waiting_prompts[id(backbone)]
        return
    waiting = waiting_prompts[id(backbone)] = Waiting([])
    try:
        yield waiting
    finally:
        del waiting_prompts[id(backbone)]
    if waiting.prompts:
        raise PeftcoreError(
            f"{type(backbone).__name__} did not call its token embedding with all tokens, so the soft prompt had no "
            "effect. Pass inputs_embeds to the model, or use another method"
        )


class StandIns(Adapter):
    """Adapter around the token embedding that replaces placeholders with the vectors of waiting prompts."""

    whole_batch = True

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self._backbone = (backbone,)  # in a tuple, so that it is not registered as a submodule

    def forward(self, base: Base, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        embeddings = base(tokens, *args, **kwargs)
        waiting_prompts: dict[Any, Waiting] = _ENTERED.__dict__
        waiting = waiting_prompts.get(id(self._backbone[0]))
        if waiting is None or not waiting.prompts or embeddings.shape[1:2] != (waiting.columns,):
            return embeddings
        for places, vectors in waiting.prompts:
            rows = vectors.to(embeddings.dtype).expand(embeddings.shape[0], -1, -1)
            embeddings = embeddings.scatter(1, places[..., None].expand(rows.shape), rows)
        waiting.prompts.clear()
        return embeddings


def ordinary_token(config: Any) -> int:
    """Return the first token id that `config` and its nested configs do not name as special (padding, image, ...)."""
    special: set[int] = set()
    queue = [config]
    while queue:
        for name, value in vars(queue.pop()).items():
            if hasattr(value, "to_dict"):
                queue.append(value)
            elif name.endswith(("token_id", "token_index", "token_ids")):
                special.update(v for v in (value if isinstance(value, (list, tuple)) else [value]) if v is not None)
    return next(token for token in range(len(special) + 1) if token not in special)


def places(order: Tensor | None, tokens: int, batch: int, device: torch.device) -> Tensor:
    """Return the indices `[batch, tokens]` of the first `tokens` columns after reordering each row by `order`."""
    columns = torch.arange(tokens, device=device).expand(batch, -1)
    return columns if order is None else order.argsort(-1)[:, :tokens]
