"""Task type under which Hugging Face PEFT passes a call on to the model.

PEFT wraps a model by the file's `task_type`. Each wrapper passes its own argument names, and only wrappers with a task
insert prompts and prefixes; without a task PEFT computes the base.
"""

from __future__ import annotations

import inspect

from torch import nn

from peftcore.adaptation.class_swap import original_forward
from peftcore.architecture import Architecture
from peftcore.method import PrefixKV

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


def task_type(model: nn.Module, architecture: Architecture, placement: type | None = None) -> str | None:
    """Return the `task_type` with which PEFT computes the same as peftcore; None: no task type.

    Args:
        placement: SoftPrompt or PrefixKV, if the adapter has one. None then means that PEFT would compute the base.
    """
    choices = [architecture.task_type]
    if placement is not None and architecture.task_type is None:
        if architecture.output_head is not None and hasattr(model, "prepare_inputs_for_generation"):
            choices.append("CAUSAL_LM")
        if (
            placement is PrefixKV or not architecture.is_encoder_decoder
        ):  # there PEFT puts prompts into the encoder only
            choices.append("FEATURE_EXTRACTION")
    return next((choice for choice in choices if choice is not None and _passes(model, choice)), None)


def _passes(model: nn.Module, task: str) -> bool:
    """Return whether the model's forward accepts what PEFT's wrapper for `task` passes on."""
    arguments = inspect.signature(original_forward(model)).parameters
    takes_all = any(argument.kind is inspect.Parameter.VAR_KEYWORD for argument in arguments.values())
    names = (*_TEXT, *_PASSED.get(task, ()))
    return "input_ids" in arguments and all(takes_all or name in arguments for name in names)
