"""Checks of files and copies: save and load, shared tensors, deepcopy, pickle, exchange with Hugging Face PEFT."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import tempfile
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

import peftcore
from peftcore.engine import adapter_modules, adapter_parameters
from peftcore.quantization import quantized_experts
from peftcore.quantization.packed_experts import unpack_experts
from peftcore.testing.case import Case, close, differs, disturb, logits, same
from peftcore.testing.checks.register import check

NOT_CHECKED = "not checked: "  # prefix of the reason if a check could not run here


@check("save and load are bit exact", essential=True)
def saving(case: Case) -> None:
    model, fresh = case.model(), case.base()
    with tempfile.TemporaryDirectory() as folder:
        peftcore.save(model, folder, adapter="default")
        peftcore.load(fresh, folder, trainable=True)
        peftcore.save(model, Path(folder, "for use"), adapter="default", resumable=False)
        inference_model = peftcore.load(case.base(), Path(folder, "for use"))
    loaded = dict(adapter_parameters(fresh, "default"))
    for name, parameter in adapter_parameters(model, "default"):
        same(loaded[name], parameter, name)
    expected = logits(model, case.inputs())
    same(logits(fresh, case.inputs()), expected, "output")
    close(
        logits(inference_model, case.inputs()),
        expected,
        "output of a file without tensors that only training needs",
        1e-5,
    )


@check("a file of a dense base on a quantized one (NF4), and the reverse")
def on_another_format(case: Case) -> str | None:
    reason = case.why_not_quantized("nf4")
    if reason is not None:
        return reason
    for trained_on, loaded_on in ((None, "nf4"), ("nf4", None)):
        model = case.add(case.base(quant_type=trained_on), 1, "default")
        with tempfile.TemporaryDirectory() as folder:
            peftcore.save(model, folder, adapter="default")
            loaded = peftcore.load(case.base(quant_type=loaded_on), folder)
        expected, actual = _change(case, model, trained_on), _change(case, loaded, loaded_on)
        share = ((actual - expected).norm() / expected.norm()).item()
        # Rounding the base changes the effect of a correct method by at most a quarter; an incorrect one differs by 80
        # %.
        assert share <= 0.5, (
            f"trained on {trained_on or 'dense'}, loaded on {loaded_on or 'dense'}: its change of the output differs "
            f"by {share:.0%}. Keep what `place` computes from weights in persistent buffers, which are saved"
        )
    return None


def _change(case: Case, model: nn.Module, quant_type: str | None) -> torch.Tensor:
    """Return the difference between the outputs with and without the adapter."""
    output = logits(model, case.inputs())
    return output - logits(case.base(quant_type=quant_type), case.inputs())


@check("deepcopy and pickle")
def copying(case: Case) -> None:
    model, inputs = case.model(), case.inputs()
    expected = logits(model, inputs)
    for copy_kind, twin in (("deepcopy", copy.deepcopy(model)), ("pickle", pickle.loads(pickle.dumps(model)))):
        same(logits(twin, inputs), expected, copy_kind)
        disturb(twin, "default", 5)
        differs(logits(twin, inputs), expected)
        same(logits(model, inputs), expected, f"the original after its {copy_kind} changed")


@check("shared tensors are saved once, and stay shared after load, deepcopy and .to()")
def sharing(case: Case) -> str | None:
    model = case.model()
    shared = _shared(model)
    if not shared:
        return "its adapters share no tensor"
    with tempfile.TemporaryDirectory() as folder:
        peftcore.save(model, folder, adapter="default")
        on_disk = load_file(Path(folder, "adapter_model.safetensors"))
        loaded = peftcore.load(case.base(), folder)
    for group, value in shared.items():
        names = [name for name, t in on_disk.items() if t.shape == value.shape and torch.equal(t, value.to(t))]
        assert len(names) <= 1, f"the shared tensor {sorted(group)} is saved {len(names)} times: {names}"
    twins = {"load": loaded, "deepcopy": copy.deepcopy(model), ".to()": copy.deepcopy(model).to(torch.float64)}
    for copy_kind, twin in twins.items():
        lost_groups = shared.keys() - _shared(twin).keys()
        assert not lost_groups, f"no longer shared after {copy_kind}: {[sorted(group)[:3] for group in lost_groups]}"
    return None


def _shared(model: nn.Module) -> dict[frozenset[str], torch.Tensor]:
    """Return {name: tensor} for all names of tensors that several adapters share."""
    places: dict[int, list[str]] = defaultdict(list)
    tensors: dict[int, torch.Tensor] = {}
    for path, adapter in adapter_modules(model, "default"):
        tensors_of_adapter = [
            *adapter.named_parameters(remove_duplicate=False),
            *adapter.named_buffers(remove_duplicate=False),
        ]
        for name, tensor in tensors_of_adapter:
            places[id(tensor)].append(f"{path}.{name}")
            tensors[id(tensor)] = tensor.detach()
    several = {key: names for key, names in places.items() if len(names) > 1}
    return {frozenset(names): tensors[key] for key, names in several.items()}


@check("Hugging Face PEFT computes the same from the file", essential=True)
def read_by_peft(case: Case) -> str | None:
    peft, reason = _peft(case)
    if peft is None:
        return reason
    model, inputs = case.model(), case.inputs()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's warnings about names that transformers has deprecated
        peftcore.save(model, folder, adapter="default")
        actual = logits(peft.PeftModel.from_pretrained(_base_for_peft(case), folder).eval(), inputs)
    expected = logits(model, inputs)
    close(actual[:, -expected.shape[1] :], expected, "output")  # PEFT's output starts with that of the soft prompt
    return None


@check("a file that Hugging Face PEFT writes computes the same here", essential=True)
def written_by_peft(case: Case) -> str | None:
    peft, reason = _peft(case)
    if peft is None:
        return reason
    inputs = case.inputs()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peftcore.save(case.model(), folder, adapter="default")
        config = peft.PeftConfig.from_pretrained(folder)
        config.inference_mode = False
        torch.manual_seed(7)
        peft_model = peft.get_peft_model(_base_for_peft(case), config).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in peft_model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        peft_model.save_pretrained(Path(folder, "theirs"))
        model = peftcore.load(case.base(), Path(folder, "theirs"))
        actual, expected = logits(model, inputs), logits(peft_model, inputs)
    close(actual, expected[:, -actual.shape[1] :], "output")
    return None


def _base_for_peft(case: Case) -> nn.Module:
    """Return the base with dense experts, since PEFT does not support quantized experts."""
    model = case.base()
    for _, experts in list(quantized_experts(model)):
        unpack_experts(experts)
    return model


def _peft(case: Case) -> tuple[Any, str | None]:
    """Return (the library peft, None), or (None, the reason why the method cannot be compared with PEFT)."""
    if importlib.util.find_spec("peft") is None:
        return None, f"{NOT_CHECKED}peft is not installed"
    import peft

    method = case.method
    if method.recorded_as is not None:
        return peft, None
    if method.state.peft_type not in peft.PeftType.__members__:
        return None, "PEFT has no such method"
    model = case.add(case.family.make(), None, "default")
    if method.state.peft.unreadable(model, [path for path, _ in adapter_modules(model, "default")]):
        return None, "PEFT does not support the method on these layers, and save warns"
    return peft, None
