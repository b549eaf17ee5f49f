"""Select modules by suffix lists, regular expressions, `all-linear`, exclusions and layer indices.

It also selects parameters that a config trains in addition to its adapters: `modules_to_save` and biases.

Patterns match as in PEFT, so that a config selects the same modules in both libraries, but a pattern without a match
raises an error.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from peftcore.errors import PeftcoreError, nearest
from peftcore.model import bypassed_layers, modules_without_gradients, rewritten_layers
from peftcore.model.base_modules import base_modules, base_parameters, original_class
from peftcore.model.experts import expert_biases
from peftcore.model.experts.in_model import expert_layers, routers, stacked_weight_name
from peftcore.model.targets.expert_selection import ALL_LINEAR, name_experts, parameter_suffixes, weight_owners
from peftcore.model.targets.patterns import (
    compile_pattern,
    excluded,
    is_inside,
    layer_indices,
    matches,
    path_suffixes,
    shortest_suffixes,
    suggest_paths,
)
from peftcore.plugin.architecture import Architecture, Sublayer
from peftcore.plugin.layers import is_conv1d, is_linear, sizes, unknown_layers
from peftcore.plugin.placements.train import Train

Supported = Callable[[nn.Module], bool]  # whether the method can adapt a module


def widths(model: nn.Module, path: str, architecture: Architecture) -> tuple[int, int]:
    """Return the (input, output) sizes of a linear layer; for other modules, the model's hidden size twice.

    Raises:
        PeftcoreError: the model's config has no hidden size.
    """
    module, width = model.get_submodule(path), architecture.hidden_size
    if is_linear(module):
        return sizes(module)
    if width is None:
        raise PeftcoreError(
            f"the width of '{path}' ({type(module).__name__}) is unknown, because the config of "
            f"{type(model).__name__} has no hidden_size. Select linear layers instead (target_modules)"
        )
    return width, width


def select(
    model: nn.Module,
    architecture: Architecture,
    *,
    target_modules: str | Sequence[str],
    exclude_modules: str | Sequence[str] | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    layers_pattern: str | Sequence[str] | None = None,
    modules_to_save: Sequence[str] | None = None,
    supported: Supported = is_linear,
    own_parameters: bool = False,
) -> dict[str, nn.Module]:
    """Return the selected modules by path, in the model's order.

    Args:
        target_modules: list of suffixes, a regular expression that matches full paths, or `all-linear`: all linear
            layers except the output head, task heads, routers, and layers that are bypassed or run without gradients.
            An `nn.MultiheadAttention` is selected in place of its projections if it is `supported`; else they are
            skipped. An entry without a match among adaptable modules may match a module of experts or one of its
            stacked weights. Their layers are returned one by one, at paths as in a list of experts
            (`experts.3.down_proj`).
        exclude_modules: list of suffixes or a regular expression; matching modules are removed from the selection.
        layers_to_transform: layer indices. `layers_pattern` names the list of layers (`layers`, `h`); by default the
            first number in a path is the index.
        modules_to_save: fully trained modules; nothing inside them is selected.
        supported: (module) -> whether the method can adapt it.
        own_parameters: the method trains the modules' own parameters, so `all-linear` includes layers whose weight is
            read without a call.

    Raises:
        PeftcoreError: a pattern does not match anything, or matches a module that the method cannot adapt.
    """
    modules, weights = dict(base_modules(model)), weight_owners(model)
    names = [*modules, *weights]
    excluded_names = excluded(names, exclude_modules)
    skipped_names = excluded_names | _inside(modules, modules_to_save or ())
    experts: dict[str, str] = {}  # {name of a selected stacked weight: path of its module}
    if weights and not own_parameters and supported(nn.Linear(1, 1, device="meta")):
        target_modules, expert_weights = name_experts(model, target_modules, supported)
        experts = {name: weights[name] for name in expert_weights}

    selects_all, only_experts = target_modules == ALL_LINEAR, bool(experts) and not target_modules
    candidates: list[str] = []
    if selects_all:
        candidates = _all_linear(model, modules, architecture, supported, own_parameters)
    elif not only_experts:
        candidates = _by_pattern(modules, names, target_modules, supported)
    is_regex = isinstance(target_modules, str) and not (selects_all or only_experts)
    # With layers_to_transform the expression may match modules that are in no layer.
    if is_regex and not own_parameters and layers_to_transform is None:
        remaining = {path: module for path, module in modules.items() if path not in skipped_names}
        _refuse_other_layers(remaining, str(target_modules), supported)

    selected_paths = [path for path in candidates if path not in skipped_names]
    selected_paths += [name for name, path in experts.items() if skipped_names.isdisjoint((name, path))]
    if selects_all:
        selected_paths = _with_attention(modules, selected_paths, excluded_names, supported)
    if layers_to_transform is not None:
        selected_paths = _in_layers(selected_paths, layers_to_transform, layers_pattern)
    if not selected_paths:
        raise PeftcoreError(
            f"target_modules={target_modules!r} selects no module after exclude_modules={exclude_modules!r} and "
            f"modules_to_save={modules_to_save!r}. Select more modules, or exclude fewer"
        )
    return _in_order(
        model, modules, [path for path in selected_paths if path not in experts], set(selected_paths) & experts.keys()
    )


def _inside(modules: Iterable[str], parents: Iterable[str]) -> set[str]:
    """Return the paths of all modules that are matched by an entry in `parents` or lie inside such a module."""
    parents = list(parents)
    return {path for path in modules if any(is_inside(parent, path) for parent in parents)}


def _all_linear(
    model: nn.Module,
    modules: dict[str, nn.Module],
    architecture: Architecture,
    supported: Supported,
    own_parameters: bool,
) -> list[str]:
    """Return the linear layers that `all-linear` selects, before exclusions.

    Raises:
        PeftcoreError: the model has no such layer.
    """
    heads = [f"{head}." for head in (architecture.output_head, *architecture.task_heads) if head is not None]
    paths = [path for path, module in modules.items() if is_linear(module) and not f"{path}.".startswith(tuple(heads))]
    if not own_parameters:
        unreachable = {
            *bypassed_layers(model),
            *rewritten_layers(model),
            *routers(model),
            *modules_without_gradients(model),
        }
        paths = [path for path in paths if path not in unreachable]
    if not paths:
        raise PeftcoreError(
            f"target_modules='{ALL_LINEAR}' found no linear layers in {type(model).__name__}. Name modules: "
            f"{_examples(modules, supported)}{unknown_layers(modules.values())}"
        )
    return paths


def _in_layers(
    paths: list[str], layers_to_transform: int | Sequence[int], layers_pattern: str | Sequence[str] | None
) -> list[str]:
    """Return the modules in the layers with these indices.

    Raises:
        PeftcoreError: the list of indices is empty, or a layer contains none of the modules.
    """
    layers = {layers_to_transform} if isinstance(layers_to_transform, int) else set(layers_to_transform)
    if not layers:
        raise PeftcoreError(
            "layers_to_transform=[] does not select any layer. Name layers, or leave it out for all layers"
        )
    indices = layer_indices(paths, layers_pattern)
    missing_layers = layers - set(indices.values())
    if missing_layers:
        layers_present = sorted({index for index in indices.values() if index is not None})
        raise PeftcoreError(
            f"layers_to_transform: no targeted module is in layer {sorted(missing_layers)} "
            f"(layers found: {layers_present or f'none by layers_pattern={layers_pattern!r}'})"
        )
    return [path for path in paths if indices[path] in layers]


def _in_order(
    model: nn.Module, modules: Mapping[str, nn.Module], chosen: Collection[str], weights: Collection[str]
) -> dict[str, nn.Module]:
    """Return the modules `chosen` and each expert of the stacked `weights`, in the model's order."""
    if not weights:
        return {path: modules[path] for path in chosen}
    layers: dict[str, nn.Module] = {}
    for path, module in modules.items():
        if path in chosen:
            layers[path] = module
        names = [name for name in module._parameters if f"{path}.{name}" in weights]
        if names:
            layers |= expert_layers(model, path, names)
    return layers


def select_by(config: Any, model: nn.Module, architecture: Architecture, **others: Any) -> dict[str, nn.Module]:
    """Call `select` with the config's fields of the same names; `others` take precedence."""
    fields = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
    return select(model, architecture, **{**{name: getattr(config, name) for name in fields}, **others})


def sublayers(
    model: nn.Module, architecture: Architecture, kinds: Collection[str], layers: int | Sequence[int] | None = None
) -> list[Sublayer]:
    """Return the detected sublayers of these kinds, in all layers or only in those with the indices `layers`.

    Raises:
        PeftcoreError: no such sublayer was detected, or an index does not exist.
    """
    candidates = [sublayer for sublayer in architecture.sublayers if sublayer.kind in kinds]
    if not candidates:
        linear = [path for path, module in base_modules(model) if is_linear(module)][:3]
        raise PeftcoreError(
            f"cannot detect the attention and feed-forward modules of {type(model).__name__}. Name modules: "
            f"target_modules=[...]; its linear layers are: {', '.join(linear) or 'none'}"
        )
    if layers is None:
        return candidates
    layers_wanted = {layers} if isinstance(layers, int) else set(layers)
    present = {sublayer.layer for sublayer in candidates}
    if not layers_wanted or layers_wanted - present:
        problem = f"the model has no layers {sorted(layers_wanted - present)}" if layers_wanted else "it names no layer"
        raise PeftcoreError(f"layers_to_transform: {problem} (layers: {sorted(present)})")
    return [sublayer for sublayer in candidates if sublayer.layer in layers_wanted]


def match_counts(model: nn.Module, target_modules: str | Iterable[str]) -> dict[str, int]:
    """Return the number of modules that each pattern of `target_modules` matches."""
    paths = [path for path, _ in base_modules(model)]
    if isinstance(target_modules, str):
        return {target_modules: sum(map(compile_pattern(target_modules, "target_modules"), paths))}
    weights = list(weight_owners(model))
    counts: dict[str, int] = {}
    for pattern in target_modules:
        count = sum(matches(pattern, path) for path in paths)
        counts[pattern] = count or sum(matches(pattern, name) for name in weights)
    return counts


def minimal_suffixes(model: nn.Module, paths_of_modules: Iterable[str]) -> list[str]:
    """Return the shortest list of suffixes that selects exactly these modules, for a saved config."""
    paths, names = (
        [path for path, _ in base_modules(model)],
        {stacked_weight_name(model, path) for path in paths_of_modules},
    )
    layers = names.intersection(paths)
    suffixes = shortest_suffixes(layers, [path for path in paths if path not in layers])
    return suffixes + (parameter_suffixes(model, names - layers) if names - layers else [])


def conv1d_paths(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """Return the paths of transformers' Conv1D layers, which PEFT refuses for many methods."""
    return [path for path in paths if is_conv1d(model.get_submodule(path))]


def drop_unmatched(model: nn.Module, entries: Sequence[str], experts: bool = False) -> list[str]:
    """Return the entries that match a module of `model`, or, with `experts`, a stacked weight.

    PEFT's files may name modules that the model does not have (`classifier` and `score` for every classifier). The
    tensors in the file decide which modules must exist.
    """
    known_suffixes: set[str] = set()
    weights = weight_owners(model) if experts else {}
    for path in [*dict(base_modules(model)), *weights]:
        known_suffixes.update(path_suffixes(path))
    return [entry for entry in dict.fromkeys(entries) if entry in known_suffixes]


def refuse_bypassed(model: nn.Module, paths: Iterable[str]) -> None:
    """Raise a PeftcoreError if the model reads the weight of a module without calling it, or changes the weight.

    An adapter would have no effect in the first case; in the second, the weight would change under the adapter.
    """
    modules, bypass_reasons, rewrite_reasons = (
        dict(base_modules(model)),
        bypassed_layers(model),
        rewritten_layers(model),
    )
    for path in paths:
        attention, name = _attention_over(modules, path), path.rpartition(".")[2]
        if attention is not None:
            raise PeftcoreError(
                f"an adapter on '{path}' would have no effect, because nn.MultiheadAttention reads its weight "
                "without calling it. If the method can adapt nn.MultiheadAttention, select it with "
                f"target_modules=['{attention.rpartition('.')[2]}']; otherwise exclude the layer: "
                f"exclude_modules=['{name}']"
            )
        if path in bypass_reasons:
            raise PeftcoreError(
                f"an adapter on '{path}' would have no effect, at least in some modes or on some devices: "
                f"{bypass_reasons[path]}. Leave it out of target_modules, or exclude it: exclude_modules=['{name}']"
            )
        if path in rewrite_reasons:
            raise PeftcoreError(
                f"an adapter on '{path}' would not follow changes of the weight: {rewrite_reasons[path]}. Leave it "
                f"out of target_modules, or exclude it: exclude_modules=['{name}']"
            )


def _attention_over(modules: Mapping[str, nn.Module], path: str) -> str | None:
    """Return the path of the `nn.MultiheadAttention` that contains the projection at `path`, or None."""
    parent = path.rpartition(".")[0]
    is_attention = path and parent in modules and issubclass(original_class(modules[parent]), nn.MultiheadAttention)
    return parent if is_attention else None


def _with_attention(
    modules: Mapping[str, nn.Module], selected: list[str], excluded_paths: Collection[str], supported: Supported
) -> list[str]:
    """Replace projections by their `nn.MultiheadAttention`, or drop them if it is not `supported`."""
    paths: list[str] = []
    for path in selected:
        attention = _attention_over(modules, path)
        if attention is None:
            paths.append(path)
        elif attention not in excluded_paths and supported(modules[attention]):
            paths.append(attention)
    # If nothing else is selected, keep the projections so that an error can name them.
    return paths if paths or excluded_paths else selected


def _by_pattern(
    modules: dict[str, nn.Module], names: Collection[str], patterns: str | Sequence[str], supported: Supported
) -> list[str]:
    """Return the paths that a regular expression, or a list of suffixes, selects."""
    if isinstance(patterns, str):
        return _by_regex(modules, patterns, supported)
    return _by_suffix(modules, patterns, supported, names)


def _by_regex(modules: dict[str, nn.Module], pattern: str, supported: Supported) -> list[str]:
    matched_paths = list(filter(compile_pattern(pattern, "target_modules"), modules))
    selected = [path for path in matched_paths if supported(modules[path])]
    if not selected:
        kinds = f"matches only {_kinds(modules, matched_paths)}, which this method cannot adapt"
        problem = kinds if matched_paths else "matches no module"
        raise PeftcoreError(
            f"target_modules={pattern!r}, a regular expression for full paths, {problem}. Examples of paths: "
            f"{_examples(modules, supported)}"
        )
    return selected


def _refuse_other_layers(modules: dict[str, nn.Module], pattern: str, supported: Supported) -> None:
    """Raise a PeftcoreError if a regular expression also matches layers that the method cannot adapt."""
    matched_paths = filter(compile_pattern(pattern, "target_modules"), modules)
    unsupported = [path for path in matched_paths if not supported(modules[path]) and _is_layer(modules[path])]
    if unsupported:
        raise PeftcoreError(
            f"target_modules={pattern!r} also matches {_kinds(modules, unsupported)} (such as '{unsupported[0]}'), "
            "which this method cannot adapt. Add them to exclude_modules, or write an expression that does not "
            "match them"
        )


def _is_layer(module: nn.Module) -> bool:
    """Return whether the module itself has a matrix or a convolution kernel."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() > 1 and not any(True for _ in module.children())


def _by_suffix(
    modules: dict[str, nn.Module], patterns: Sequence[str], supported: Supported, names: Collection[str]
) -> list[str]:
    if not patterns:
        raise PeftcoreError("target_modules is empty. Name modules, or use 'all-linear'")
    paths_by_suffix: dict[str, list[str]] = defaultdict(list)
    for path in modules:
        for end in path_suffixes(path):
            paths_by_suffix[end].append(path)
    selected: set[str] = set()
    for pattern in patterns:
        matched_paths = paths_by_suffix.get(pattern, [])
        selected.update(matched_paths)
        if not matched_paths:
            raise PeftcoreError(f"target_modules: '{pattern}' matches no module{suggest_paths(pattern, names)}")
        unsupported = [path for path in matched_paths if not supported(modules[path])]
        if unsupported:
            raise PeftcoreError(
                f"target_modules: '{pattern}' matches {_kinds(modules, unsupported)} (such as '{unsupported[0]}'), "
                f"which this method cannot adapt. It can adapt: {_examples(modules, supported)}"
            )
    return [path for path in modules if path in selected]


def _kinds(modules: dict[str, nn.Module], paths: Iterable[str]) -> str:
    return ", ".join(sorted({original_class(modules[path]).__name__ for path in paths}))


def _examples(modules: dict[str, nn.Module], supported: Supported) -> str:
    return ", ".join([f"'{path}'" for path, module in modules.items() if path and supported(module)][:3]) or "none"


def trained_modules(model: nn.Module, modules_to_save: Sequence[str]) -> Train:
    """Return the placement that trains the parameters of the modules in `modules_to_save`.

    Raises:
        PeftcoreError: an entry matches no module with parameters.
    """
    names = [name for name, _ in base_parameters(model)]
    parameters: list[str] = []
    for pattern in modules_to_save:
        paths = [path for path, _ in base_modules(model) if path and matches(pattern, path)]
        matching = [name for name in names if any(name.startswith(f"{path}.") for path in paths)]
        if not matching:
            candidates = {part for path, _ in base_modules(model) for part in (path, path.rpartition(".")[2])}
            raise PeftcoreError(
                f"modules_to_save: '{pattern}' matches no module with parameters{nearest(pattern, candidates)}"
            )
        parameters += matching
    return Train(tuple(dict.fromkeys(parameters)))


def refuse_targeted(target_modules: str | Sequence[str] | None, paths: Iterable[str], relation: str) -> None:
    """Raise a PeftcoreError if `target_modules` selects one of the fully trained modules `paths`."""
    if not target_modules or target_modules == ALL_LINEAR:
        return
    for path in paths:
        if isinstance(target_modules, str):
            is_targeted = compile_pattern(target_modules, "target_modules")(path)
        else:
            is_targeted = any(matches(pattern, path) for pattern in target_modules)
        if is_targeted:
            raise PeftcoreError(
                f"target_modules={target_modules!r} selects '{path}', whose weight is {relation}, which "
                "modules_to_save fully trains. Remove it from target_modules, or untie the weights: "
                "ensure_weight_tying=False"
            )


def biases(model: nn.Module, paths: Iterable[str] | None = None) -> Train:
    """Return the placement that trains the parameters named `bias`, in the model or in the modules `paths`."""
    names = [name for name, _ in base_parameters(model) if name.rpartition(".")[2] == "bias"]
    if paths is not None:
        paths = set(paths)
        names = [name for name in names if name.rpartition(".")[0] in paths]
    return Train(tuple(names))


def trained_biases(model: nn.Module, bias: str, paths: Iterable[str]) -> list[Train]:
    """Return the placements for PEFT's field `bias`: "none", "all" biases of the model, or those of `paths`."""
    if bias == "none":
        return []
    of_experts = next((path for path in paths if stacked_weight_name(model, path) != path), None)
    if of_experts is not None and any(expert_biases(module) for _, module in base_modules(model)):
        raise PeftcoreError(
            f"bias={bias!r} is not supported for experts ('{of_experts}'), because their biases have other names. "
            "Choose bias='none'"
        )
    return [biases(model, None if bias == "all" else paths)]
