"""What tests that put Hugging Face PEFT beside prompts and prefixes share."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import peftcore
from peftcore.testing import disturb
from support import tiny

# PEFT's task of each of tiny.MODELS.
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}


def quiet(call: Any, *args: Any, **kwargs: Any) -> Any:
    """PEFT warns of names that transformers has deprecated, and of its own optional kernels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **kwargs)


def logits(model: nn.Module, **changes: Any) -> Tensor:
    """Logits of a model of ours or PEFT's for the caller's tokens; PEFT gives those of a prompt, too."""
    call = {**tiny.inputs(model.get_base_model() if isinstance(model, peft.PeftModel) else model), **changes}
    with torch.no_grad():
        found = quiet(model, **call).logits
    return found[:, -call.get("decoder_input_ids", call["input_ids"]).shape[1] :] if found.dim() == 3 else found


def compare_padded(ours: nn.Module, theirs: nn.Module) -> None:
    """The same logits for a row that is padded on the right."""
    tokens, mask = tiny.TOKENS.clone(), torch.ones_like(tiny.TOKENS)
    tokens[1, 5:], mask[1, 5:] = ours.config.pad_token_id or 0, 0
    found, wanted = (logits(model, input_ids=tokens, attention_mask=mask) for model in (ours, theirs))
    if found.shape[:2] == mask.shape:
        found, wanted = found[mask == 1], wanted[mask == 1]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def both_ways(make: Any, folder: Path, ours: nn.Module, config: peft.PeftConfig) -> None:
    """Hugging Face PEFT computes what `ours` does from its file, and we what a model of PEFT's with `config` does."""
    disturb(ours, "default", seed=1)
    assert (logits(ours) - logits(make())).abs().max() > 1e-3
    peftcore.save(ours, folder / "ours")
    theirs = quiet(peft.PeftModel.from_pretrained, make(), folder / "ours").eval()
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=1e-5)
    theirs = moved(quiet(peft.get_peft_model, make(), config).eval())
    quiet(theirs.save_pretrained, folder / "theirs")
    ours = peftcore.load(make(), folder / "theirs", trainable=True)
    assert (logits(ours) - logits(make())).abs().max() > 1e-3
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)


class Layer(nn.Module):
    """A model of one layer, with random values."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)
        return found


def same_layer(make: Any, x: Tensor, folder: Path, config: peft.PeftConfig, method: str, **fields: Any) -> None:
    """An adapter of one layer starts as PEFT's, computes what PEFT computes from its file, and merges; and PEFT's here.

    Args:
        make: () -> the layer.
        config: PEFT's, with the fields `fields`.
    """

    def box() -> Layer:
        return Layer(make()).eval()

    def compare(found: nn.Module, wanted: nn.Module) -> None:
        y = wanted(x).detach()
        assert (y - box()(x)).abs().max() > 0.02
        torch.testing.assert_close(found(x).detach(), y, rtol=0, atol=3e-5)

    torch.manual_seed(0)
    ours = peftcore.apply(box(), method, target_modules=["layer"], **fields)
    start = peft.get_peft_model_state_dict(quiet(peft.get_peft_model, box(), config))
    found = load_file(peftcore.save(ours, folder / "start", resumable=False) / "adapter_model.safetensors")
    assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in start.items()}
    for name, t in start.items():
        if len(t.unique()) == 1:
            assert torch.equal(found[name], t), name
        elif t.numel() > 16:  # else chance decides
            assert 0.5 < found[name].std() / t.std() < 2, name
    disturb(ours, "default", seed=1)
    ours(x).square().sum().backward()
    own = [p for _, p in peftcore.engine.adapter_parameters(ours, "default")]
    assert own and all(p.grad is not None and p.grad.abs().max() > 0 for p in own)
    peftcore.save(ours, folder / "ours")
    theirs = quiet(peft.PeftModel.from_pretrained, box(), folder / "ours").eval()
    compare(ours, theirs)
    compare(quiet(theirs.merge_and_unload), peftcore.merge(ours, undo=True))
    theirs = moved(quiet(peft.get_peft_model, box(), config).eval())
    quiet(theirs.save_pretrained, folder / "theirs")
    ours = peftcore.load(box(), folder / "theirs", trainable=True)
    compare(ours, theirs)
    compare(peftcore.merge(ours, undo=True), quiet(theirs.merge_and_unload))


def trained_by_peft(model: nn.Module, config_class: type, **fields: Any) -> nn.Module:
    """A model of PEFT's with four virtual tokens, whose values are not those of the start."""
    task = peftcore.model.detect(model).task_type
    config = config_class(task_type=task, num_virtual_tokens=4, **fields)
    return moved(quiet(peft.get_peft_model, model, config).eval())


def moved(model: nn.Module) -> nn.Module:
    """A model of PEFT's with noise on all that trains."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def same_start(make: Any, folder: Path, ours: nn.Module, config: peft.PeftConfig) -> None:
    """An adapter that nothing has changed has PEFT's tensors: constant ones are equal, random ones as wide."""
    theirs = peft.get_peft_model_state_dict(quiet(peft.get_peft_model, make(), config))
    found = load_file(peftcore.save(ours, folder / "start") / "adapter_model.safetensors")
    assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in theirs.items()}
    for kind in {name.rpartition(".")[2] for name in found}:  # of all layers together
        own, wanted = (
            torch.cat([t.flatten() for n, t in each.items() if n.endswith(kind)]) for each in (found, theirs)
        )
        width, off = wanted.std(correction=0).item(), 0.1 + 3 / len(wanted) ** 0.5
        assert abs(own.mean() - wanted.mean()) <= off * width, kind
        assert abs(own.std(correction=0).item() - width) <= off * width, kind
