"""What becomes of one model class under one method: exact, refused with a PeftcoreError, wrong, or a crash.

The base model itself is the oracle. An adapter must get a gradient where the weight beside it gets one; a padded row
must give the answer of the row alone where it does so without the adapter; a step with the cache likewise.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import re
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import peftcore
from census import prompts
from census.case import Case, Wrong, distance, gradients, run, same, tensors
from peftcore.engine import adapter_modules, adapter_parameters, applied
from peftcore.model.base_modules import base_modules, base_parameters
from peftcore.quantization import default_skip
from peftcore.testing import disturb

PROMPTS = ("prompt-tuning", "prefix-tuning")
IMAGES = ", images"  # behind the name of one of these: with images beside text
FIELDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 2},
    "qlora": {"r": 2, "target_modules": "all-linear"},
    "qlora-mxfp4": {"r": 2, "target_modules": "all-linear"},
    "qlora-affine4": {"r": 2, "target_modules": "all-linear"},
    "bitfit": {},
    "adapter": {},
    "prompt-tuning": {"num_virtual_tokens": prompts.VIRTUAL},
    "prefix-tuning": {"num_virtual_tokens": prompts.VIRTUAL},
}
QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "qlora": {},
    "qlora-mxfp4": {"quant_type": "mxfp4"},
    "qlora-affine4": {"quant_type": "affine4", "blocksize": 32},
}
START_IS_BASE = ("lora", *QUANTIZATIONS, "bitfit", "adapter")  # before training they compute what the base computes
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
    modules = re.search(r"Name modules: ('[^']+'(?:, '[^']+')*)", found.why) if "all-linear" in found.why else None
    fields = {"target_modules": re.findall("'([^']+)'", modules[1])} if modules else {}
    skip = re.search(r"leave \d+ of \d+ weights dense: skip=(\[[^\]]*\])", found.why)
    if skip is not None:
        fields["skip"] = ast.literal_eval(skip[1])
    if "Use add_missing=True" in found.why:
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
    if method in QUANTIZATIONS:
        skip = fields.get("skip", default_skip(model))
        base = peftcore.quantize(case.model(), skip=skip, **QUANTIZATIONS[method])
        outputs = run(base, case.inputs)
    kept = {name: value.detach().clone() for name, value in base.state_dict().items()}

    def apply() -> None:
        torch.manual_seed(7)
        name = "qlora" if method in QUANTIZATIONS else method
        peftcore.apply(model, name, **QUANTIZATIONS.get(method, {}), **fields)

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
            if not _is_hidden(case, reached):
                raise Wrong("changed adapters change nothing")
            notes.append("changed weights beside the adapters change nothing either: codes, or a softmax of one winner")

    def gets_gradients() -> Any:
        found = gradients(model, case.inputs)
        silent = [name for name in reached if not any(name_of in found for name_of in reached[name])]
        if silent and method in PROMPTS and not prompts.mixes(case):
            return notes.append("gradients: no token sees another, such as in attention whose kernel is not there")
        silent = [name for name in silent if _beside_learns(model, case, name)] if silent else []
        if silent and case.gradients:
            raise Wrong(f"no gradient for {len(silent)} of {len(reached)}, such as {silent[0]}")
        for name in applied(model, "default").trained:
            silent_bias = method == "bitfit" and name in case.gradients and not any(n in found for n in reached[name])
            if silent_bias and not _is_rounding(case, name):
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
            peftcore.merge(model, undo=True, **({"dtype": torch.float32} if method in QUANTIZATIONS else {}))
        except peftcore.PeftcoreError as error:
            return notes.append(f"merge: {error}")
        found = run(model, case.inputs)
        peftcore.unmerge(model)
        if not same(run(model, case.inputs), moved):
            raise Wrong("unmerged, differs from before")
        allowed = 2e-3 * max(1e-2, distance(moved, outputs)) + 1e-4  # sums in another order
        if distance(found, moved) > allowed:
            if any(distance(_enlarged(model, case, 1 + 1e-6 * i), moved) > allowed for i in (-3, -1, 1, 3)):
                return notes.append("merge: rounding decides what the model chooses, such as its best queries")
            raise Wrong(f"merged, differs by {distance(found, moved):.3g}; changed by {distance(moved, outputs):.3g}")
        return None

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
            yield "definition", lambda: prompts.definition(case, notes)
        yield "padding", lambda: prompts.padding(case, model, notes)
        yield "cache", lambda: prompts.cache(case, model, notes)
    yield "remove", removed


def _reached(model: nn.Module, case: Case) -> dict[str, list[str]]:
    """{module: full names of its adapter's parameters} where the base has a gradient, for this input."""
    found: dict[str, list[str]] = {}
    for path, adapter in adapter_modules(model, "default"):
        own = [f"{path}.{name}" if path else name for name, _ in adapter.named_parameters()]
        inside = f"{path}." if path else ""
        if own and any(name.startswith(inside) for name in case.gradients):
            found[path] = own
    trained, parameters = applied(model, "default").trained, dict(base_parameters(model))
    for name in trained:
        if name in case.gradients:
            found[name] = [each for each in trained if parameters[each] is parameters[name]]
    return found


def _enlarged(model: nn.Module, case: Case, factor: float = 1000) -> list[Tensor]:
    """The outputs with adapters so much larger: what scales a layer by 1e-6 (ConvNeXt) shows them, too."""
    adapters = [parameter for _, parameter in adapter_parameters(model, "default")]
    kept = [parameter.detach().clone() for parameter in adapters]
    with torch.no_grad():
        for parameter in adapters:
            parameter.mul_(factor)
        outputs = run(model, case.inputs)
        for parameter, value in zip(adapters, kept, strict=True):
            parameter.copy_(value)
    return outputs


def _is_hidden(case: Case, reached: dict[str, list[str]]) -> bool:
    """Are the base's outputs the same with other weights where there are adapters?"""
    other, generator = case.model(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            there = name in reached or (parameter.dim() > 1 and any(name.startswith(f"{path}.") for path in reached))
            if parameter.is_floating_point() and there:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * parameter.abs().mean())
    return same(run(other, case.inputs), case.outputs)


def _is_rounding(case: Case, name: str) -> bool:
    """Is the base's gradient for `name` none but for rounding, as that of a shift before a BatchNorm is?"""
    inputs = tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, case.inputs)
    exact = {n: g.abs().max().item() for n, g in gradients(case.model().double(), inputs, everywhere=True).items()}
    return exact.get(name, 0.0) <= 1e-10 * max(exact.values())


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


def _equal(found: Tensor, wanted: Tensor) -> bool:
    return found.dtype == wanted.dtype and torch.equal(torch.nan_to_num(found), torch.nan_to_num(wanted))


def layers(model: nn.Module) -> dict[str, bool]:
    """Has it a linear layer, a bias?"""
    return {
        "linear": any(peftcore.model.targets.is_linear(m) for _, m in base_modules(model)),
        "bias": any(name.rpartition(".")[2] == "bias" for name, _ in base_parameters(model)),
    }
