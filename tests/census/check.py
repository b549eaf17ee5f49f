"""What becomes of one model class under one method: exact, refused with a PeftcoreError, wrong, or a crash.

The base model itself is the oracle. An adapter must get a gradient where the weight beside it gets one; a padded row
must give the answer of the row alone where it does so without the adapter; a step with the cache likewise.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peftcore
from census import special
from census.inputs import inputs as example
from peftcore.adaptation.adapted import base_modules, base_parameters
from peftcore.engine import adapter_modules, adapter_parameters, applied
from peftcore.testing import disturb

PROMPTS = ("prompt-tuning", "prefix-tuning")
FIELDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 2},
    "qlora": {"r": 2, "target_modules": "all-linear"},
    "bitfit": {},
    "adapter": {},
    "prompt-tuning": {"num_virtual_tokens": 4},
    "prefix-tuning": {"num_virtual_tokens": 4},
}
START_IS_BASE = ("lora", "qlora", "bitfit", "adapter")  # before training they compute what the base computes
EXACT, ADVISED, REFUSED, WRONG, CRASH = "exact", "advised", "refused", "wrong", "crash"


@dataclass
class Outcome:
    """kind: one of the five above, ADVISED if exact once that is done which a refusal said; at: the step that ended it;
    why: the message; notes: what did not apply.
    """

    kind: str
    at: str = ""
    why: str = ""
    notes: tuple[str, ...] = ()


class Wrong(Exception):
    """A result that is not what it must be."""


@dataclass
class Case:
    """A base model that runs, what it computes, and where its gradients are."""

    base: nn.Module
    inputs: dict[str, Any]
    outputs: list[Tensor]
    gradients: dict[str, Tensor]

    @classmethod
    def of(cls, base: nn.Module) -> Case:
        """Raises whatever the base raises: such a model is no case."""
        inputs = example(type(base).__name__, base)
        outputs = run(base, inputs)
        if not outputs:
            raise ValueError("no floating output")
        if not same(outputs, run(base, inputs)):
            raise ValueError("not the same output twice")
        return cls(base, inputs, outputs, gradients(copy.deepcopy(base), inputs, everywhere=True))

    def model(self) -> nn.Module:
        return copy.deepcopy(self.base)


def check(case: Case, method: str) -> Outcome:
    """Try on a copy of the case's base all that users do with a method; what a refusal says to do is done, once."""
    found = _check(case, method, FIELDS[method])
    fields, asks_for_inputs = _advice(found)
    if not fields and not asks_for_inputs:
        return found
    if asks_for_inputs:
        case = dataclasses.replace(case, base=case.model())
        case.base.enable_input_require_grads()
    then = _check(case, method, {**FIELDS[method], **fields})
    if then.kind == EXACT:
        return Outcome(ADVISED, found.at, found.why, then.notes)
    return found if then.kind == REFUSED else then


def _advice(found: Outcome) -> tuple[dict[str, Any], bool]:
    """(fields of the config, whether inputs shall ask for gradients) by which a refusal says that the method works."""
    if found.kind != REFUSED or found.at != "apply":
        return {}, False
    modules = re.search(r"Name the modules: ('[^']+'(?:, '[^']+')*)", found.why) if "all-linear" in found.why else None
    fields = {"target_modules": re.findall("'([^']+)'", modules[1])} if modules else {}
    if "add_missing=True gives" in found.why:
        fields["add_missing"] = True
    return fields, "model.enable_input_require_grads()" in found.why


def _check(case: Case, method: str, fields: dict[str, Any]) -> Outcome:
    notes: list[str] = []
    at = "apply"
    try:
        for name, step in _steps(case, method, fields, notes):
            at = name
            step()
    except peftcore.PeftcoreError as error:
        return Outcome(REFUSED, at, str(error), tuple(notes))
    except Wrong as error:
        return Outcome(WRONG, at, str(error), tuple(notes))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)
        ours = [f for f in where if "peftcore" in f.filename] or where
        place = f"{Path(ours[-1].filename).name}:{ours[-1].name}, {Path(where[-1].filename).name}:{where[-1].lineno}"
        return Outcome(CRASH, at, f"{type(error).__name__}: {error} ({place})"[:500], tuple(notes))
    return Outcome(EXACT, notes=tuple(notes))


def _steps(
    case: Case, method: str, fields: dict[str, Any], notes: list[str]
) -> Iterator[tuple[str, Callable[[], None]]]:
    model, base = case.model(), case.base
    outputs = case.outputs
    if method == "qlora":
        base = peftcore.quantize(case.model(), skip=_quantization_skip(case.model()))
        outputs = run(base, case.inputs)
    kept = {name: value.detach().clone() for name, value in base.state_dict().items()}

    def apply() -> None:
        torch.manual_seed(7)
        peftcore.apply(model, method, **fields)

    def start() -> None:
        found = run(model, case.inputs)
        if method in START_IS_BASE and not same(found, outputs):
            raise Wrong(f"differs from the base by {distance(found, outputs):.3g} before training")

    yield "apply", apply
    yield "start", start
    reached = _reached(model, case)
    disturb(model, "default", 3)
    moved = run(model, case.inputs)

    def acts() -> None:
        if not reached:
            notes.append("this input reaches no adapter")
        elif same(moved, outputs) and same(_enlarged(model, case), outputs):
            raise Wrong("changed adapters change nothing")

    def gets_gradients() -> Any:
        found = gradients(model, case.inputs)
        silent = [name for name in reached if not any(name_of in found for name_of in reached[name])]
        if silent and method in PROMPTS and not _mixes(case):
            return notes.append("gradients: no token sees another, such as in attention whose kernel is not there")
        silent = [name for name in silent if _beside_learns(model, case, name)] if silent else []
        if silent and case.gradients:
            raise Wrong(f"no gradient for {len(silent)} of {len(reached)}, such as {silent[0]}")
        for name in applied(model, "default").trained:
            if name in case.gradients and method == "bitfit" and name not in found:
                raise Wrong(f"no gradient for {name}")
        moved[:] = run(model, case.inputs)  # a step in training moves buffers, which are then the adapter's

    def disabled() -> None:
        with peftcore.disabled(model):
            if not same(run(model, case.inputs), outputs):
                raise Wrong(f"differs from the base by {distance(run(model, case.inputs), outputs):.3g}")
        if not same(run(model, case.inputs), moved):
            raise Wrong("enabled again, differs from before")

    def saved() -> None:
        fresh = copy.deepcopy(base)
        with tempfile.TemporaryDirectory() as folder:
            peftcore.save(model, folder)
            peftcore.load(fresh, folder)
        if not same(run(fresh, case.inputs), moved):
            raise Wrong(f"loaded, differs by {distance(run(fresh, case.inputs), moved):.3g}")

    def merged() -> None:
        try:
            peftcore.merge(model, **({"dtype": torch.float32} if method == "qlora" else {}))
        except peftcore.PeftcoreError as error:
            notes.append(f"merge: {error}")
            return
        found = run(model, case.inputs)
        if distance(found, moved) > 2e-3 * max(1e-2, distance(moved, outputs)) + 1e-4:  # sums in another order
            raise Wrong(f"merged, differs by {distance(found, moved):.3g}; changed by {distance(moved, outputs):.3g}")
        peftcore.unmerge(model)
        if not same(run(model, case.inputs), moved):
            raise Wrong("unmerged, differs from before")

    def removed() -> None:
        peftcore.remove(model)
        state = model.state_dict()
        if list(state) != list(kept):
            raise Wrong(f"keys of the state_dict differ: {sorted(set(state) ^ set(kept))[:3]}")
        other = [name for name, value in kept.items() if not _equal(state[name], value)]
        if other:
            raise Wrong(f"{len(other)} tensors changed, such as {other[0]}")
        if not same(run(model, case.inputs), outputs):
            raise Wrong("removed, differs from the base")

    yield "acts", acts
    yield "gradients", gets_gradients
    yield "disabled", disabled
    yield "save and load", saved
    if method not in PROMPTS:
        yield "merge", merged
    else:
        if method == "prompt-tuning":
            yield "definition", lambda: _definition(case, notes)
        yield "padding", lambda: _padding(case, model, notes)
        yield "cache", lambda: _cache(case, model, notes)
    yield "remove", removed


def _quantization_skip(model: nn.Module) -> list[str] | None:
    from peftcore.quantization import default_skip

    return list(default_skip(model))


def _reached(model: nn.Module, case: Case) -> dict[str, list[str]]:
    """{module: full names of its adapter's parameters} where the base has a gradient, for this input."""
    found: dict[str, list[str]] = {}
    for path, adapter in adapter_modules(model, "default"):
        own = [f"{path}.{name}" if path else name for name, _ in adapter.named_parameters()]
        inside = f"{path}." if path else ""
        if own and any(name.startswith(inside) for name in case.gradients):
            found[path] = own
    for name in applied(model, "default").trained:
        if name in case.gradients:
            found[name] = [name]
    return found


def _enlarged(model: nn.Module, case: Case) -> list[Tensor]:
    """The outputs with adapters 1000 times as large: what scales a layer by 1e-6 (ConvNeXt) shows them, too."""
    adapters = [parameter for _, parameter in adapter_parameters(model, "default")]
    kept = [parameter.detach().clone() for parameter in adapters]
    with torch.no_grad():
        for parameter in adapters:
            parameter.mul_(1000)
        outputs = run(model, case.inputs)
        for parameter, value in zip(adapters, kept, strict=True):
            parameter.copy_(value)
    return outputs


def _beside_learns(model: nn.Module, case: Case, path: str) -> bool:
    """Would the weight at `path` get a gradient, now that adapters have changed the model?

    It is not the base any more: a dead ReLU, or a gradient that underflows, may stop the weight's as the adapter's.
    Where there is no such weight (a block, one in 4 bits), or another module reads it, too, what this one gives and
    reads stands for it.
    """
    modules, parameters = dict(base_modules(model)), dict(base_parameters(model))
    module = modules.get(path) or modules[path.rpartition(".")[0]]
    weight = parameters.get(path, parameters.get(f"{path}.weight"))
    floating = {p: p.requires_grad for p in parameters.values() if p.is_floating_point()}
    reads, learns = [], []

    def note(gradient: Tensor) -> None:
        learns.append(bool(gradient.any()))

    def watch(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        first = next(tensors([*args, *kwargs.values()]), None)
        reads.append(first is None or bool(first.any()))
        for value in tensors(output):
            if value.requires_grad:
                value.register_hook(note)

    for parameter in floating:
        parameter.requires_grad_(True)
    shared = sum(p is weight for m in modules.values() for p in m._parameters.values()) > 1
    whole = weight is None or weight not in floating or shared
    handle = module.register_forward_hook(watch, with_kwargs=True) if whole else weight.register_hook(note)
    gradients(model, case.inputs)
    handle.remove()
    for parameter, flag in floating.items():
        parameter.requires_grad_(flag)
        parameter.grad = None
    return any(learns) and (any(reads) or not whole)


# Running a model


def run(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """All floating outputs, without gradients."""
    torch.manual_seed(11)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(tensors(model(**copy.deepcopy(inputs))))


def tensors(output: Any) -> Iterator[Tensor]:
    """The floating tensors of an output; caches are none."""
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.numel():
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from tensors(value)


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    """Equal to rounding: where memory lies decides in which order some kernels add (ConvBERT's)."""
    finite = (torch.where(each.isfinite(), each, torch.zeros_like(each)).float() for each in wanted)
    largest = max((each.abs().max().item() for each in finite), default=0.0)
    return distance(found, wanted) <= 2e-6 * max(1.0, largest)


def distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference; infinite where shapes differ."""
    if len(found) != len(wanted) or any(a.shape != b.shape for a, b in zip(found, wanted, strict=False)):
        return float("inf")
    return max(
        (torch.nan_to_num(a.float()) - torch.nan_to_num(b.float())).abs().max().item()
        for a, b in zip(found, wanted, strict=True)
    )


def gradients(model: nn.Module, inputs: dict[str, Any], *, everywhere: bool = False) -> dict[str, Tensor]:
    """{name: gradient} of one step in training mode, those that are not zero; the model is in eval mode afterwards."""
    if everywhere:
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
    model.train()
    torch.manual_seed(11)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outputs = [o for o in tensors(model(**copy.deepcopy(inputs))) if o.requires_grad]
    generator = torch.Generator().manual_seed(5)
    loss = torch.zeros(())
    for output in outputs:
        finite = torch.where(output.isfinite(), output, torch.zeros_like(output)).float()
        loss = loss + (finite * torch.randn(output.shape, generator=generator)).sum()
    if outputs:
        loss.backward()
    model.eval()
    found = {name: p.grad for name, p in _parameters(model) if p.grad is not None and bool(p.grad.any())}
    model.zero_grad()
    return found


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    if peftcore.engine.state_of(model) is None:
        yield from model.named_parameters()
    else:
        yield from adapter_parameters(model, "default")


def _equal(found: Tensor, wanted: Tensor) -> bool:
    return found.dtype == wanted.dtype and torch.equal(torch.nan_to_num(found), torch.nan_to_num(wanted))


# Prompts and prefixes

SHORT, LONG, NEW = 5, 21, 3  # tokens of a row alone, of the batch it is padded to, and that are generated


def _mixes(case: Case) -> bool:
    """Does a row's first token change the backbone's states of its last one?"""
    if "input_ids" not in case.inputs:
        return True
    backbone = case.base.get_submodule(peftcore.observation.detect(case.base).backbone)
    states: list[Tensor] = []
    handle = backbone.register_forward_hook(lambda module, args, output: states.append(next(tensors(output))))
    tokens = case.inputs["input_ids"].clone()
    run(case.base, case.inputs)
    tokens[..., 0] = tokens[..., 1]
    run(case.base, {**case.inputs, "input_ids": tokens})
    handle.remove()
    wanted, changed = states
    return wanted.dim() < 3 or not same([changed[:, -1]], [wanted[:, -1]])


def _takes_text(case: Case) -> bool:
    return set(case.inputs) <= {"input_ids", "attention_mask", "decoder_input_ids"} and "input_ids" in case.inputs


def _rows(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """(a short row, a batch whose second row is it with padding before, the batch's mask)."""
    tokens = case.inputs["input_ids"]
    long = tokens.flatten().repeat(LONG)[:LONG].view(1, LONG)
    short = tokens.flatten().flip(0).repeat(SHORT)[:SHORT].view(1, SHORT)
    pad = torch.full((1, LONG - SHORT), getattr(case.base.config, "pad_token_id", None) or 0)
    mask = torch.ones(2, LONG, dtype=torch.long)
    mask[1, : LONG - SHORT] = 0
    return short, torch.cat([long, torch.cat([pad, short], dim=1)]), mask


def _definition(case: Case, notes: list[str]) -> None:
    """A prompt of the vectors that a token is embedded as is that token, some times."""
    if not _takes_text(case) or special.reads_input_in_head(type(case.base).__name__):
        return notes.append("definition: not a model of text alone, or its head reads the input")
    from peftcore.prompts.stand_ins import ordinary_token

    tokens = case.inputs["input_ids"]
    count = FIELDS["prompt-tuning"]["num_virtual_tokens"]
    own = torch.full((*tokens.shape[:-1], count), ordinary_token(case.base.config))
    mask = {} if tokens.dim() > 2 else {"attention_mask": torch.ones(len(tokens), count + tokens.shape[-1]).long()}
    try:
        wanted = run(case.base, {**case.inputs, "input_ids": torch.cat([own, tokens], dim=-1), **mask})
    except Exception as error:
        return notes.append(f"definition: the base itself fails ({type(error).__name__})")
    model = case.model()
    peftcore.apply(model, "prompt-tuning", **FIELDS["prompt-tuning"])
    embedding = model.get_submodule(peftcore.observation.detect(model).embedding)
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
            if farthest(run(case.base, {**case.inputs, "input_ids": torch.cat([own, tokens], dim=-1), **mask})):
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

    backbone = case.base.get_submodule(peftcore.observation.detect(case.base).backbone)
    module = next((m for m in backbone.modules() if hasattr(m, "encoder") and hasattr(m, "embeddings")), backbone)
    handle = module.register_forward_hook(without)
    try:
        yield
    finally:
        handle.remove()


def _padding(case: Case, model: nn.Module, notes: list[str]) -> None:
    """A row with padding before it gives the answer of the row alone, where the base's does."""
    if not _takes_text(case) or case.base.config.is_encoder_decoder:
        return notes.append("padding: not a model of text alone")
    short, batch, mask = _rows(case)

    def difference(model: nn.Module) -> float:
        alone = {"input_ids": short, "attention_mask": torch.ones_like(short)}
        padded = {"input_ids": batch, "attention_mask": mask}
        if _generates(model):
            pairs = [(_logits(model, padded)[1:2], _logits(model, alone))]
        else:
            pairs = [(run(model, padded)[0][1:2], run(model, alone)[0])]
        return max(distance([p[:, -a.shape[1] :] if p.shape != a.shape and p.dim() == 3 else p], [a]) for p, a in pairs)

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


def _cache(case: Case, model: nn.Module, notes: list[str]) -> None:
    """Each step of generation gives the logits of one forward of all tokens so far, where the base's does."""
    if not _takes_text(case) or not _generates(case.base):
        return notes.append("cache: does not generate from text alone")
    prompt = {"input_ids": case.inputs["input_ids"], "attention_mask": torch.ones_like(case.inputs["input_ids"])}

    def difference(model: nn.Module) -> float:
        out = _generated(model, prompt)
        worst = 0.0
        for i, step in enumerate(out.logits):
            tokens = out.sequences[:, : out.sequences.shape[1] - NEW + i]
            whole = {**prompt, "decoder_input_ids": tokens}
            if not model.config.is_encoder_decoder:
                whole = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
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
        embedded = model.get_submodule(peftcore.observation.detect(model).embedding)(tokens)
    rows = [embedded[:, :padding], vectors.expand(len(tokens), -1, -1), embedded[:, padding:]]
    mask = torch.ones(len(tokens), len(vectors) + tokens.shape[1]).long()
    mask[:, :padding] = 0
    return {"inputs_embeds": torch.cat(rows, dim=1), "attention_mask": mask}


def _padding_by_hand(case: Case, model: nn.Module, short: Tensor, batch: Tensor) -> float:
    """How far the base's answer for a padded row is from that for the row alone, given a soft prompt's vectors."""
    alone, padded = _by_hand(model, short), _by_hand(model, batch[1:], LONG - SHORT)
    if _generates(model):
        return distance([_logits(case.base, padded)], [_logits(case.base, alone)])
    return distance([run(case.base, padded)[0][:, LONG - SHORT :]], [run(case.base, alone)[0]])


def _steps_by_hand(case: Case, model: nn.Module, tokens: Tensor) -> float:
    """How far the base's steps of generation are from one forward, given a soft prompt's vectors."""
    out = _generated(case.base, _by_hand(model, tokens))
    given = [torch.cat([tokens, out.sequences[:, -NEW:][:, :i]], dim=1) for i in range(NEW)]
    whole = (run(case.base, _by_hand(model, each))[0][:, -1] for each in given)
    return max(distance([step], [one]) for step, one in zip(out.logits, whole, strict=True))


def _generates(model: nn.Module) -> bool:
    return hasattr(model, "can_generate") and model.can_generate()


def _generated(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    torch.manual_seed(11)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(
            **inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip


def _logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return torch.stack(_generated(model, inputs).logits, dim=1)


# What peft does with the same model


def served_by_peft(case: Case, method: str) -> bool:
    """Does Hugging Face PEFT's prompt or prefix run on this model, change its output and get a gradient?"""
    import peft

    kind = peft.PromptTuningConfig if method == "prompt-tuning" else peft.PrefixTuningConfig
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(case.model(), kind(task_type=_task(case.base), num_virtual_tokens=4)).eval()
            found = list(tensors(model(**copy.deepcopy(case.inputs))))
            sum(o.float().square().mean() for o in found if o.requires_grad).backward()
        moved = [p for p in model.prompt_encoder.parameters() if p.grad is not None and bool(p.grad.any())]
        return bool(moved) and not same(found, case.outputs)
    except Exception:
        return False


def _task(model: nn.Module) -> str:
    known = peftcore.observation.detect(model).task_type
    if known:
        return known
    if getattr(model.config, "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM"
    return "CAUSAL_LM" if _generates(model) else "FEATURE_EXTRACTION"


def layers(model: nn.Module) -> dict[str, bool]:
    """Has it a linear layer, a bias?"""
    return {
        "linear": any(peftcore.targets.is_linear(m) for _, m in base_modules(model)),
        "bias": any(name.rpartition(".")[2] == "bias" for name, _ in base_parameters(model)),
    }
