"""Checks of the placement of adapters, of the changes that they make, and of their removal."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

import peftcore
from peftcore.engine import adapter_modules, adapter_parameters, applied, set_trainable
from peftcore.engine.adaptation.class_swap import BUILT
from peftcore.model import detect
from peftcore.model.base_modules import base_parameters
from peftcore.model.experts import experts_layout
from peftcore.model.targets.coverage import coverage
from peftcore.plugin.adapter import neutral_of
from peftcore.plugin.architecture import Architecture, Sublayer
from peftcore.testing.case import Case, close, differs, logits, loss_of, same, train
from peftcore.testing.checks.register import check


@check("identity at the start", essential=True)
def identity(case: Case) -> None:
    model, expected = case.model(seed=None), case.base_output
    rounded = any(experts_layout(model.get_submodule(path)) for path in applied(model, "default").paths)
    # experts are summed in one operator
    (close if rounded else same)(logits(model, case.inputs()), expected, "output")


@check("neutral tensors change nothing", essential=True)
def neutral(case: Case) -> str | None:
    model, start, has_neutral = case.model(), case.model(seed=None), False
    attached: set[int] = set()
    for _, adapter in adapter_modules(model, "default"):
        attached.update(map(id, adapter.parameters()))
    with torch.no_grad():
        pairs = zip(adapter_parameters(model, "default"), adapter_parameters(start, "default"), strict=True)
        for (_, parameter), (_, original) in pairs:  # a classifier's head, for example, is trained as well
            if id(parameter) not in attached:
                parameter.copy_(original)
        path_without_neutral = None
        for path, adapter in adapter_modules(model, "default"):
            values = neutral_of(adapter)
            if values is None:
                path_without_neutral = path
                continue
            tensors, has_neutral = dict(adapter.named_parameters()), True
            unknown = sorted(values.keys() - tensors.keys())
            assert not unknown, f"neutral() names {unknown}, which are not parameters of the adapter at '{path}'"
            for name, value in values.items():
                tensors[name].copy_(value)
    if not has_neutral:
        return "its adapters have no neutral tensors"
    label = (
        "output"
        if path_without_neutral is None
        else f"output, with an adapter on '{path_without_neutral}' that does not define neutral()"
    )
    close(logits(model, case.inputs()), case.base_output, label)
    return None


@check("no layer is left out without a warning", essential=True)
def unadapted_layers(case: Case) -> str | None:
    model = case.base()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        case.add(model, None, "default")
    entry, architecture = applied(model, "default"), detect(model)
    if caught or getattr(entry.config, "layers_to_transform", None) is not None:
        return None
    if any(placement.whole_model for placement in chain.from_iterable(entry.placements.values())):
        return None  # the method does not choose where prompts act
    adapted_paths = [*entry.paths, *(f"{name.rpartition('.')[0]}." for name in entry.trained)]
    covered = coverage(model, architecture, adapted_paths)
    without_adapters = coverage(model, architecture, ())  # its `left_out` counts every layer
    for kind, count in without_adapters.left_out.items():
        is_unadapted = covered.left_out.get(kind) == count
        has_most_weights = count >= covered.total / 2
        # A method that adapts no layer at all, such as one for embeddings, does not leave any out.
        assert covered.share == 0 or not (is_unadapted and has_most_weights), (
            f"{case.method.name} {covered}, without a warning. Adapt them, or warn in place(...)"
        )
    _require_all_or_no_sublayers(architecture, adapted_paths)
    return None


def _require_all_or_no_sublayers(architecture: Architecture, adapted_paths: Sequence[str]) -> None:
    """Fail if the paths reach sublayers of a kind in some blocks but not in all."""
    for kind in dict.fromkeys(sublayer.kind for sublayer in architecture.sublayers):
        scopes = [_scope(sublayer) for sublayer in architecture.sublayers if sublayer.kind == kind]
        lacking = [scope for scope in scopes if not any(_meet(scope, path.rstrip(".")) for path in adapted_paths)]
        assert not lacking or len(lacking) == len(scopes), (
            f"{kind} layers are left out without a warning: {', '.join(lacking)}. Adapt them, or warn in place(...)"
        )


def _scope(sublayer: Sublayer) -> str:
    """Return the path of the innermost module that contains all detected layers of a sublayer."""
    parts = [path.split(".") for path in (sublayer.output, sublayer.query, *sublayer.inner) if path]
    common = [names[0] for names in zip(*parts, strict=False) if len(set(names)) == 1]
    return ".".join(common)


def _meet(path: str, other_path: str) -> bool:
    """Return whether one of two paths contains the other."""
    return f"{path}.".startswith(f"{other_path}." if other_path else "") or f"{other_path}.".startswith(f"{path}.")


@check("base untouched by training", essential=True)
def base_untouched(case: Case) -> None:
    base, model = case.original, case.model()
    train(model, case.inputs(), steps=2)
    state = model.state_dict()
    missing_keys = [key for key in base.state_dict() if key not in state]
    assert not missing_keys, f"keys of the base are missing: {missing_keys[:3]}"
    trained = set(applied(model, "default").trained)
    with peftcore.disabled(model):
        for name, parameter in base_parameters(model):
            same(parameter, base.get_parameter(name), name)
    for name, value in base.state_dict().items():
        if name not in trained:
            same(state[name], value, name)


@check("gradients only where they belong", essential=True)
def gradients(case: Case) -> None:
    model = case.model()
    loss_of(model, case.inputs()).backward()
    adapter_names = {id(p): name for name, p in adapter_parameters(model, "default")}
    for name, parameter in model.named_parameters():
        if id(parameter) in adapter_names:
            assert parameter.grad is not None, f"'{name}' of the adapter gets no gradient"
            assert torch.isfinite(parameter.grad).all(), f"the gradient of '{name}' is not finite"
        else:
            assert parameter.grad is None and not parameter.requires_grad, f"'{name}' of the base gets a gradient"


@check("disabled equals base", essential=True)
def disabling(case: Case) -> None:
    model, inputs = case.model(), case.inputs()
    adapted_output, base = logits(model, inputs), case.base_output
    differs(adapted_output, base)
    with peftcore.disabled(model):
        same(logits(model, inputs), base, "disabled")
    same(logits(model, inputs), adapted_output, "enabled again")


@check("remove is bit exact", essential=True)
def removing(case: Case) -> None:
    model, inputs = case.base().train(), case.inputs()
    with torch.no_grad():
        model.eval()(**inputs)  # a first call has effects that are not the method's
    snapshot = _Snapshot(model.train())
    case.add(model, 1, "default")
    train(model, inputs, steps=1)
    peftcore.remove(model, "default")
    snapshot.compare(model)


class _Snapshot:
    """Snapshot of a model: classes, tensors, hooks and other attributes."""

    def __init__(self, model: nn.Module) -> None:
        self._facts = dict(_facts(model))
        self._tensors = {place: (value, value.detach().clone()) for place, value in _tensors(model)}

    def compare(self, model: nn.Module) -> None:
        """Fail unless `model` is exactly in the state of the snapshot."""
        tensors, facts = dict(_tensors(model)), dict(_facts(model))
        assert list(tensors) == list(self._tensors), f"tensors differ: {sorted(tensors.keys() ^ self._tensors.keys())}"
        for place, (tensor, value) in self._tensors.items():
            same(tensors[place], value, place)
            assert tensors[place] is tensor, f"'{place}' is another tensor with equal values"
        missing_places, new_places = self._facts.keys() - facts.keys(), facts.keys() - self._facts.keys()
        assert not missing_places and not new_places, (
            f"left behind: {sorted(new_places)[:5]}, missing: {sorted(missing_places)[:5]}"
        )
        for place, fact in self._facts.items():
            assert facts[place] == fact, f"{place} was {fact!r:.100} and is now {facts[place]!r:.100}"


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return parameters and all buffers, by name."""
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _facts(model: nn.Module) -> list[tuple[str, Any]]:
    """Return (place, value) of everything except tensors; objects are compared by identity."""
    facts: list[tuple[str, Any]] = [
        (f"requires_grad of '{name}'", p.requires_grad) for name, p in model.named_parameters()
    ]
    facts += [(f"the gradient of '{name}'", id(p.grad)) for name, p in model.named_parameters()]
    for path, module in model.named_modules():
        facts.append((f"the class of '{path}'", type(module)))
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", *BUILT):  # adapters attached before this method
                continue
            is_plain = isinstance(value, (bool, int, float, str, tuple, set, torch.dtype, type(None)))
            fact = value if is_plain else id(value)
            if isinstance(value, dict):  # hooks, children
                fact = {key: id(element) for key, element in value.items()}
            facts.append((f"'{name}' of '{path}'", fact))
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        facts += [(f"'{name}' of the model's config", value) for name, value in config.to_dict().items()]
    return facts


@check("two adapters are switched")
def switching(case: Case) -> None:
    inputs = case.inputs()
    single_outputs = {name: logits(case.model(seed=seed, adapter=name), inputs) for name, seed in (("a", 1), ("b", 2))}
    model = _with_two(case)
    for name, other_name in (("b", "a"), ("a", "b"), ("b", "a")):
        peftcore.activate(model, name)
        same(logits(model, inputs), single_outputs[name], f"'{name}' of two")
        trains = any(parameter.requires_grad for _, parameter in adapter_parameters(model, other_name))
        assert not trains, "an inactive adapter requires gradients"


def _with_two(case: Case) -> nn.Module:
    """Return a model with two adapters, of which the last one is active."""
    model = case.model(seed=1, adapter="a")
    peftcore.activate(model, [])
    return case.add(model, 2, "b")


@check("an adapter for each sample of a batch equals each sample alone")
def per_sample(case: Case) -> str | None:
    model, names = _with_two(case), ["a", None, "b", "a"]
    inputs: dict[str, Any] = {**case.inputs(rows=len(names)), **({"use_cache": False} if case.generates else {})}
    try:
        peftcore.activate(model, names, per_sample=True)
    except peftcore.PeftcoreError as refusal:
        if "acts on the batch as a whole" in str(refusal):
            return "it acts on the batch as a whole"
        raise
    output = logits(model, inputs)
    for row, name in enumerate(names):
        peftcore.activate(model, name or [])
        sample = {key: value[row : row + 1] if isinstance(value, Tensor) else value for key, value in inputs.items()}
        single_output = logits(model, sample)
        close(output[row : row + 1], single_output, f"row {row}, adapter {name}")
    return None


@check("a frozen adapter gets no gradients")
def freezing(case: Case) -> None:
    model = case.model()
    set_trainable(model, "default", False)
    assert not any(p.requires_grad for p in model.parameters()), "a parameter still requires gradients"


@check("bf16 and fp32 bases")
def dtypes(case: Case) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        model = case.model(dtype)
        trained = set(applied(model, "default").trained)
        output = model(**case.inputs())[0]
        assert output.dtype == logits(case.base(dtype), case.inputs()).dtype, f"{dtype}: output is {output.dtype}"
        assert torch.isfinite(output).all(), f"{dtype}: the output is not finite"
        for name, parameter in adapter_parameters(model, "default"):
            expected = dtype if name in trained else torch.float32
            assert parameter.dtype == expected, f"{dtype}: '{name}' is {parameter.dtype}"
        loss_of(model, case.inputs()).backward()
