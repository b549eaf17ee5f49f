"""Prompts and prefixes: a prompt of a token's vectors is that token, padding and steps of generation change nothing."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import peftcore
from census import special
from census.case import Case, Wrong, distance, run, same, tensors
from census.instances import VOCABULARY
from peftcore.engine import adapter_parameters, applied
from peftcore.engine.prompts.soft_prompt import ordinary_token

VIRTUAL = 4  # tokens of a prompt or prefix
SHORT, LONG, NEW = 5, 21, 3  # tokens of a row alone, of the batch it is padded to, and that are generated


def mixes(case: Case) -> bool:
    """Does a row's first token change the backbone's states of its last one?"""
    if "input_ids" not in case.inputs:
        return True
    backbone = case.base.get_submodule(peftcore.model.detect(case.base).backbone)
    states: list[Tensor] = []
    handle = backbone.register_forward_hook(lambda module, args, output: states.append(next(tensors(output))))
    tokens = case.inputs["input_ids"].clone()
    run(case.base, case.inputs)
    tokens[..., 0] = tokens[..., -1]
    run(case.base, {**case.inputs, "input_ids": tokens})
    handle.remove()
    wanted, changed = states
    return wanted.dim() < 3 or not same([changed[:, -1]], [wanted[:, -1]])


def _takes_text(case: Case) -> bool:
    """Text alone, or images beside it of which the text has tokens."""
    text = set(case.inputs) <= {"input_ids", "attention_mask", "decoder_input_ids"} and "input_ids" in case.inputs
    return text or case.with_images


def _with_tokens(
    case: Case, before: Tensor, after: Tensor | None = None, attended: int | Tensor = 1
) -> dict[str, Tensor]:
    """The inputs with tokens before and after each row's; those before are `attended`, and are of no image."""
    tokens = case.inputs["input_ids"]
    rows = [before, tokens] if after is None else [before, tokens, after]
    grown: dict[str, Tensor] = {"input_ids": torch.cat(rows, dim=-1)}
    if tokens.dim() == 2:
        mask = torch.ones_like(grown["input_ids"])
        mask[:, : before.shape[-1]] = attended
        grown["attention_mask"] = mask
    for name, value in case.inputs.items():
        if name.endswith("token_type_ids"):
            ends = [row.new_zeros(row.shape) for row in rows]
            grown[name] = torch.cat([ends[0], value, *ends[2:]], dim=-1)
    return {**case.inputs, **grown}


def _rows(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """(a short row, a batch whose second row is it with padding before, the batch's mask)."""
    tokens = case.inputs["input_ids"]
    long = tokens.flatten().repeat(LONG)[:LONG].view(1, LONG)
    short = tokens.flatten().flip(0).repeat(SHORT)[:SHORT].view(1, SHORT)
    pad = torch.full((1, LONG - SHORT), getattr(case.base.config, "pad_token_id", None) or 0)
    mask = torch.ones(2, LONG, dtype=torch.long)
    mask[1, : LONG - SHORT] = 0
    return short, torch.cat([long, torch.cat([pad, short], dim=1)]), mask


def definition(case: Case, notes: list[str]) -> None:
    """A prompt of the vectors that a token is embedded as is that token, some times."""
    if not _takes_text(case) or special.reads_input_in_head(type(case.base).__name__):
        return notes.append("definition: not a model of text alone, or its head reads the input")
    tokens = case.inputs["input_ids"]
    count = VIRTUAL
    own = torch.full((*tokens.shape[:-1], count), ordinary_token(case.base.config))
    whole = _with_tokens(case, own)
    try:
        wanted = run(case.base, whole)
    except Exception as error:
        return notes.append(f"definition: the base itself fails ({type(error).__name__})")
    model = case.model()
    peftcore.apply(model, "prompt-tuning", num_virtual_tokens=VIRTUAL)
    embedding = model.get_submodule(peftcore.model.detect(model).embedding)
    with torch.no_grad():
        vectors = torch.nn.functional.embedding(own.flatten()[:count], embedding.weight)
        if type(embedding).forward is not nn.Embedding.forward:
            vectors = embedding(own.flatten()[None, :count])[0]
        rows = next(iter(dict(adapter_parameters(model, "default")).values()))
        rows[:count] = vectors
    found = run(model, case.inputs)

    def farthest(wanted: list[Tensor]) -> float:
        worst = 0.0
        for ours, theirs in zip(found, wanted, strict=False):
            cut = theirs[:, count:] if theirs.shape != ours.shape and theirs.dim() == ours.dim() else theirs
            off = distance([ours], [cut])
            worst = max(worst, off if off > 1e-3 * max(1.0, cut.abs().max().item()) else 0.0)
        return worst

    if far := farthest(wanted):
        # A head that pools may be given the whole, or the states of the caller's tokens.
        with _cut(case, count):
            if farthest(run(case.base, whole)):
                raise Wrong(f"a prompt of a token's vectors differs from the token by {far:.3g}")
    return None


@contextmanager
def _cut(case: Case, count: int) -> Iterator[None]:
    """Within the block the base's head sees no states of the first `count` tokens."""

    def without(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0][:, count:], *output[1:])
        output.last_hidden_state = output.last_hidden_state[:, count:]
        return output

    found = peftcore.model.detect(case.base)
    backbone, embedding = case.base.get_submodule(found.backbone), case.base.get_submodule(found.embedding)
    whole = (m for m in backbone.modules() if hasattr(m, "encoder") and hasattr(m, "embeddings"))
    text = (m for m in whole if embedding in m.embeddings.modules())  # a tower of images has embeddings, too
    handle = next(text, backbone).register_forward_hook(without)
    try:
        yield
    finally:
        handle.remove()


def padding(case: Case, model: nn.Module, notes: list[str]) -> None:
    """A row with padding before it gives the answer of the row alone, where the base's does."""
    if not _takes_text(case) or case.base.config.is_encoder_decoder:
        return notes.append("padding: not a model of text alone")
    short, batch, mask = _rows(case)
    if case.with_images:  # of the same length: all rows are padded
        pad = torch.full((len(case.inputs["input_ids"]), SHORT), getattr(case.base.config, "pad_token_id", None) or 0)
        alone, padded = case.inputs, _with_tokens(case, pad, attended=0)
    else:
        alone = {"input_ids": short, "attention_mask": torch.ones_like(short)}
        padded = {"input_ids": batch, "attention_mask": mask}

    def difference(model: nn.Module) -> float:
        compute = _logits if generates(model) else lambda *args: run(*args)[0]
        wanted = compute(model, alone)
        found = compute(model, padded)[-len(wanted) :]
        cut = found.shape != wanted.shape and found.dim() == 3
        return distance([found[:, -wanted.shape[1] :] if cut else found], [wanted])

    try:
        of_base = difference(case.base)
    except Exception as error:
        return notes.append(f"padding: the base itself fails ({type(error).__name__})")
    if of_base > 1e-4:
        return notes.append("padding: the base's rows depend on it")
    try:
        found = difference(model)
    except peftcore.PeftcoreError as error:
        return notes.append(f"padding: refused, {error}")
    if found > 1e-3:
        if _is_soft(model) and _padding_by_hand(case, model, short, batch) > 1e-4:  # sparse attention: equal scores
            return notes.append("padding: the base's rows depend on it, given the prompt's vectors")
        raise Wrong(f"a row with padding before it differs from the row alone by {found:.3g}")
    return None


def cache(case: Case, model: nn.Module, notes: list[str]) -> None:
    """Each step of generation gives the logits of one forward of all tokens so far, where the base's does."""
    if not _takes_text(case) or not generates(case.base):
        return notes.append("cache: does not generate from text alone")
    prompt = {"input_ids": case.inputs["input_ids"], "attention_mask": torch.ones_like(case.inputs["input_ids"])}
    if case.with_images:
        prompt = case.inputs

    def difference(model: nn.Module) -> float:
        out = generated(model, prompt)
        worst = 0.0
        for i, step in enumerate(out.logits):
            tokens = out.sequences[:, : out.sequences.shape[1] - NEW + i]
            whole = {**prompt, "decoder_input_ids": tokens}
            if not model.config.is_encoder_decoder:
                whole = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
                if case.with_images:
                    whole = _with_tokens(case, tokens[:, :0], tokens[:, prompt["input_ids"].shape[1] :])
            worst = max(worst, distance([step], [run(model, whole)[0][:, -1]]))
        return worst

    try:
        of_base = difference(case.base)
    except Exception as error:
        return notes.append(f"cache: the base itself fails ({type(error).__name__})")
    if of_base > 1e-3:
        return notes.append("cache: the base's steps differ from one forward")
    found = difference(model)
    if found > 1e-3:
        if (
            _is_soft(model)
            and not case.base.config.is_encoder_decoder
            and _steps_by_hand(case, model, prompt["input_ids"]) > 1e-3
        ):
            return notes.append("cache: the base's steps differ from one forward, given the prompt's vectors")
        raise Wrong(f"steps with the cache differ from one forward by {found:.3g}")
    return None


def _is_soft(model: nn.Module) -> bool:
    return applied(model, "default").method == "prompt-tuning"


def _by_hand(model: nn.Module, tokens: Tensor, padding: int = 0) -> dict[str, Tensor]:
    """The base's inputs in place of a soft prompt: its vectors, behind the padding of each row, and the tokens'."""
    vectors = next(iter(dict(adapter_parameters(model, "default")).values())).detach()
    with peftcore.disabled(model), torch.no_grad():
        embedded = model.get_submodule(peftcore.model.detect(model).embedding)(tokens)
    rows = [embedded[:, :padding], vectors.expand(len(tokens), -1, -1), embedded[:, padding:]]
    mask = torch.ones(len(tokens), len(vectors) + tokens.shape[1]).long()
    mask[:, :padding] = 0
    return {"inputs_embeds": torch.cat(rows, dim=1), "attention_mask": mask}


def _padding_by_hand(case: Case, model: nn.Module, short: Tensor, batch: Tensor) -> float:
    """How far the base's answer for a padded row is from that for the row alone, given a soft prompt's vectors."""
    if case.with_images:
        pairs = [(_with_stand_ins(case, padding), padding) for padding in (SHORT, 0)]
    else:
        pairs = [(_by_hand(model, batch[1:], LONG - SHORT), 0), (_by_hand(model, short), 0)]
    compute = _logits if generates(model) else lambda *args: run(*args)[0]
    found = []
    for inputs, padding in pairs:
        with _vectors_in_place(case, model, padding):
            found.append(compute(case.base, inputs))
    padded, alone = found
    return distance([padded[:, -alone.shape[1] :]], [alone])


def _steps_by_hand(case: Case, model: nn.Module, tokens: Tensor) -> float:
    """How far the base's steps of generation are from one forward, given a soft prompt's vectors."""
    with _vectors_in_place(case, model):
        out = generated(case.base, _with_stand_ins(case) if case.with_images else _by_hand(model, tokens))
        new = [out.sequences[:, -NEW:][:, :i] for i in range(NEW)]
        if case.with_images:
            given = [_with_stand_ins(case, after=each) for each in new]
        else:
            given = [_by_hand(model, torch.cat([tokens, each], dim=1)) for each in new]
        whole = [run(case.base, each)[0][:, -1] for each in given]
    return max(distance([step], [one]) for step, one in zip(out.logits, whole, strict=True))


def _with_stand_ins(case: Case, padding: int = 0, after: Tensor | None = None) -> dict[str, Tensor]:
    """The inputs with padding and then tokens in a prompt's place before each row."""
    before = torch.full((len(case.inputs["input_ids"]), padding + VIRTUAL), ordinary_token(case.base.config))
    attended = torch.ones(padding + VIRTUAL, dtype=torch.long)
    attended[:padding] = 0
    return _with_tokens(case, before, after, attended)


@contextmanager
def _vectors_in_place(case: Case, model: nn.Module, padding: int = 0) -> Iterator[None]:
    """Within the block the base embeds the tokens of `_with_stand_ins` as the soft prompt's vectors."""
    vectors = next(iter(dict(adapter_parameters(model, "default")).values())).detach()

    def put(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if case.with_images and output.dim() == 3 and output.shape[1] > padding + VIRTUAL:  # not in a later step
            output = output.clone()
            output[:, padding : padding + VIRTUAL] = vectors
        return output

    embedding = case.base.get_submodule(peftcore.model.detect(case.base).embedding)
    handle = embedding.register_forward_hook(put)
    try:
        yield
    finally:
        handle.remove()


def generates(model: nn.Module) -> bool:
    return hasattr(model, "can_generate") and model.can_generate()


def generated(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    """New tokens; beside images none that the config names, since it may stand for another."""
    without = _named_tokens(model.config) if "pixel_values" in inputs else None
    torch.manual_seed(11)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(
            **inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, output_logits=True,
            return_dict_in_generate=True, suppress_tokens=without,
        )  # fmt: skip


def _named_tokens(config: Any) -> list[int]:
    """Tokens that a config or one inside it has a name for."""
    found: set[int] = set()
    for name, value in vars(config).items():
        if hasattr(value, "to_dict"):
            found |= set(_named_tokens(value))
        elif name.endswith(("token_id", "token_index", "token_ids")):
            found |= {each for each in (value if isinstance(value, (list, tuple)) else [value]) if each is not None}
    return sorted(token for token in found if 0 <= token < VOCABULARY)


def _logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return torch.stack(generated(model, inputs).logits, dim=1)
