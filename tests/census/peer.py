"""What Hugging Face PEFT does with the same model."""

from __future__ import annotations

import copy
import warnings

from torch import nn

import peftcore
from census.case import Case, same, tensors
from census.prompts import generates


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
    known = peftcore.model.detect(model).task_type
    if known:
        return known
    if getattr(model.config, "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM"
    return "CAUSAL_LM" if generates(model) else "FEATURE_EXTRACTION"
