"""Fields of the `adapter_config.json` of an applied adapter."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Sequence
from typing import Any

from torch import nn

from peftcore import engine
from peftcore.engine.scaling import scaled_config
from peftcore.engine.trained import TrainedParameters
from peftcore.errors import warn
from peftcore.model import detect, targets
from peftcore.model.base_modules import original_forward
from peftcore.plugin.architecture import Architecture
from peftcore.plugin.method import Method
from peftcore.plugin.placements.placement import Placement
from peftcore.plugin.registry import registry

_TEXT = ("input_ids", "attention_mask", "inputs_embeds", "output_attentions", "output_hidden_states", "return_dict")
# Further arguments that a wrapper always passes on.
_PASSED = {
    "CAUSAL_LM": ("labels",),
    "SEQ_2_SEQ_LM": ("labels", "decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds"),
    "SEQ_CLS": ("labels",),
    "TOKEN_CLS": ("labels",),
    "QUESTION_ANS": ("start_positions", "end_positions"),
    "FEATURE_EXTRACTION": (),
}


def fields_of_config(model: nn.Module, method: Method, adapter: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (fields of an applied adapter's `adapter_config.json`, fields of its method that PEFT does not know).

    The latter contain only values that differ from the default. If PEFT cannot read the file, a warning says so.
    """
    # asdict keeps tuples, and JSON has no sets, tuples or dtypes.
    own_fields = dataclasses.asdict(scaled_config(model, adapter))
    with registry.naming(method.name, "write"):
        fields = method.state.write_fields(own_fields)
    if "ensure_weight_tying" in fields:
        fields["ensure_weight_tying"] = _is_tied_by_peft(model, adapter)
    base = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    fields = {name: sorted(value) if isinstance(value, (set, frozenset)) else value for name, value in fields.items()}
    own = {name: fields.pop(name) for name in sorted(method.state.peft.own_fields) if name in fields}
    usual = {f.name: _as_json(f.default) for f in dataclasses.fields(method.config_class) if f.name in own}
    common = {
        **fields,
        "peft_type": method.state.peft_type,
        "task_type": _task_type(model, adapter),
        "base_model_name_or_path": base,
        "inference_mode": True,
        "revision": None,
        "auto_mapping": None,
    }
    return common, {name: value for name, value in own.items() if _as_json(value) != usual[name]}


def _as_json(value: Any) -> str | None:
    """Return the JSON text of a value, or None for a dataclass's marker of a missing default."""
    return None if isinstance(value, type(dataclasses.MISSING)) else json.dumps(value, sort_keys=True)


def _task_type(model: nn.Module, adapter: str) -> str | None:
    """Return PEFT's task type of an adapter."""
    entry = engine.applied(model, adapter)
    prompts = [placement for placement in engine.placements(model, adapter) if placement.whole_model]
    task_type = _task_type_of(model, detect(model), prompts)
    if prompts and task_type is None:
        warn(
            f"Hugging Face PEFT computes the base from this file: it gives prompts to no {type(model).__name__}",
        )
    paths = [*registry.method(entry.method).state.peft.unreadable(model, entry.paths)]
    paths += [path for path, placed in entry.placements.items() if any(each.is_of_expert(path) for each in placed)]
    if paths:
        names = sorted({".".join(path.split(".")[-2:]) for path in paths})
        way = f"exclude_modules={names}" if hasattr(entry.config, "exclude_modules") else f"adapt none of {names}"
        warn(
            f"Hugging Face PEFT cannot read this file: in a {type(model).__name__} it takes the adapters of "
            f"{len(paths)} modules for others or refuses them, such as '{paths[0]}'. It reads one without: {way}",
        )
    return task_type


def _is_tied_by_peft(model: nn.Module, adapter: str) -> bool:
    """Return whether PEFT's `ensure_weight_tying` ties what this adapter trains tied; if not, PEFT keeps equal copies.

    PEFT turns whatever is tied to the embedding into a linear layer without a bias.
    """
    owned, embedding = TrainedParameters.of(model, adapter), detect(model).embedding
    groups = [slots for slots in owned.slots.values() if len(slots) > 1] if owned is not None else []
    others = [slot for slots in groups for slot in slots if slot != f"{embedding}.weight"]
    modules = [model.get_submodule(slot.rpartition(".")[0]) for slot in others]
    return (
        len(groups) == 1
        and len(others) == len(groups[0]) - 1
        and all(targets.is_linear(module) and module.bias is None for module in modules)
    )


def _task_type_of(model: nn.Module, architecture: Architecture, prompts: Sequence[Placement]) -> str | None:
    """Return the `task_type` with which PEFT computes the same as peftcore; None: no task type.

    Args:
        prompts: the placements of prompts and prefixes. Without any, None means that PEFT would compute the base.
    """
    choices = [architecture.task_type]
    if prompts and architecture.task_type is None:
        generates = architecture.output_head is not None and hasattr(model, "prepare_inputs_for_generation")
        first, *others = (placement.peft_tasks(architecture) for placement in prompts)
        tasks = [task for task in first if all(task in other for other in others)]
        choices += [task for task in tasks if task != "CAUSAL_LM" or generates]
    return next((choice for choice in choices if choice is not None and _passes(model, choice)), None)


def _passes(model: nn.Module, task: str) -> bool:
    """Return whether the model's forward accepts what PEFT's wrapper for `task` passes on."""
    arguments = inspect.signature(original_forward(model)).parameters
    takes_all = any(argument.kind is inspect.Parameter.VAR_KEYWORD for argument in arguments.values())
    names = (*_TEXT, *_PASSED.get(task, ()))
    return "input_ids" in arguments and all(takes_all or name in arguments for name in names)
