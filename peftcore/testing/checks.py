"""The checks, each a small function; its docstring is what the report prints."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import peftcore
from peftcore.adaptation.adapted import base_parameters
from peftcore.engine import adapter_parameters, applied, set_trainable
from peftcore.quantization import quantize
from peftcore.registry import registry
from peftcore.testing.case import Case, differs, disturb, logits, loss_of, optimizer_of, same, train

CHECKS: dict[str, Callable[[Case], str | None]] = {}


def _check(function: Callable[[Case], str | None]) -> Callable[[Case], str | None]:
    CHECKS[(function.__doc__ or "").strip().rstrip(".")] = function
    return function


@_check
def identity(case: Case) -> None:
    """identity at the start"""
    same(logits(case.model(seed=None), case.inputs()), logits(case.base(), case.inputs()), "output")


@_check
def base_untouched(case: Case) -> None:
    """base untouched by training"""
    base, model = case.base(), case.model()
    train(model, case.inputs(), steps=2)
    state = model.state_dict()
    missing = [key for key in base.state_dict() if key not in state]
    assert not missing, f"keys of the base are gone: {missing[:3]}"
    trained = set(applied(model, "default").trained)
    with peftcore.disabled(model):
        for name, parameter in base_parameters(model):
            same(parameter, base.get_parameter(name), name)
    for name, value in base.state_dict().items():
        if name not in trained:
            same(state[name], value, name)


@_check
def gradients(case: Case) -> None:
    """gradients only where they belong"""
    model = case.model()
    loss_of(model, case.inputs()).backward()
    own = {id(p): name for name, p in adapter_parameters(model, "default")}
    for name, parameter in model.named_parameters():
        if id(parameter) in own:
            assert parameter.grad is not None, f"'{name}' of the adapter gets no gradient"
            assert torch.isfinite(parameter.grad).all(), f"the gradient of '{name}' is not finite"
        else:
            assert parameter.grad is None and not parameter.requires_grad, f"'{name}' of the base gets a gradient"


@_check
def learns(case: Case) -> None:
    """training lowers the loss"""
    losses = train(case.model(seed=None), case.inputs(), steps=12)
    assert losses[-1] < losses[0], f"the loss went from {losses[0]:.4f} to {losses[-1]:.4f} in 12 steps"


@_check
def disabling(case: Case) -> None:
    """disabled equals base"""
    model, inputs = case.model(), case.inputs()
    before, base = logits(model, inputs), logits(case.base(), inputs)
    differs(before, base)
    with peftcore.disabled(model):
        same(logits(model, inputs), base, "disabled")
    same(logits(model, inputs), before, "enabled again")


@_check
def removing(case: Case) -> None:
    """remove is bit exact"""
    base, model = case.base(), case.model()
    train(model, case.inputs(), steps=1)
    peftcore.remove(model, "default")
    wanted, found = base.state_dict(), model.state_dict()
    assert list(found) == list(wanted), f"keys differ: {set(found) ^ set(wanted)}"
    for name in wanted:
        same(found[name], wanted[name], name)
    for (name, module), (_, original) in zip(model.named_modules(), base.named_modules(), strict=True):
        assert type(module) is type(original), f"'{name}' is still {type(module)}"
    for (name, parameter), (_, original) in zip(model.named_parameters(), base.named_parameters(), strict=True):
        assert parameter.requires_grad == original.requires_grad, f"requires_grad of '{name}'"


@_check
def saving(case: Case) -> None:
    """save and load are bit exact"""
    model, fresh = case.model(), case.base()
    with tempfile.TemporaryDirectory() as folder:
        peftcore.save(model, folder)
        peftcore.load(fresh, folder)
    loaded = dict(adapter_parameters(fresh, "default"))
    for name, parameter in adapter_parameters(model, "default"):
        same(loaded[name], parameter, name)
    same(logits(fresh, case.inputs()), logits(model, case.inputs()), "output")


@_check
def merging(case: Case) -> None:
    """merge equals forward, unmerge is bit exact"""
    model, inputs = case.model(), case.inputs()
    before = logits(model, inputs)
    kept = {name: p.detach().clone() for name, p in base_parameters(model)}
    peftcore.merge(model)
    same(logits(model, inputs), before, "merged", atol=1e-4 * before.abs().max().item())
    peftcore.unmerge(model)
    for name, parameter in base_parameters(model):
        same(parameter, kept[name], name)
    same(logits(model, inputs), before, "unmerged")


@_check
def switching(case: Case) -> None:
    """two adapters are switched"""
    inputs = case.inputs()
    alone = {name: logits(case.model(seed=seed, adapter=name), inputs) for name, seed in (("a", 1), ("b", 2))}
    model = case.model(seed=1, adapter="a")
    peftcore.activate(model, [])
    case.add(model, 2, "b")
    for name in ("b", "a", "b"):
        peftcore.activate(model, name)
        same(logits(model, inputs), alone[name], f"'{name}' of two")
        others = [p for n in ("a", "b") if n != name for _, p in adapter_parameters(model, n)]
        assert not any(p.requires_grad for p in others), "a resting adapter requires gradients"


@_check
def resuming(case: Case) -> None:
    """resume is exact"""
    whole = case.model(seed=None)
    train(whole, case.inputs(), steps=4)
    first, second = case.model(seed=None), case.base()
    with tempfile.TemporaryDirectory() as folder:
        optimizer = optimizer_of(first)
        train(first, case.inputs(), steps=2, optimizer=optimizer)
        peftcore.save(first, folder)
        peftcore.load(second, folder)
    resumed = optimizer_of(second)
    resumed.load_state_dict(optimizer.state_dict())
    train(second, case.inputs(), steps=2, optimizer=resumed)
    for (name, parameter), (_, wanted) in zip(
        adapter_parameters(second, "default"), adapter_parameters(whole, "default"), strict=True
    ):
        same(parameter, wanted, name)


@_check
def freezing(case: Case) -> None:
    """a frozen adapter gets no gradients"""
    model = case.model()
    set_trainable(model, "default", False)
    assert not any(p.requires_grad for p in model.parameters()), "a parameter still requires gradients"


@_check
def dtypes(case: Case) -> None:
    """bf16 and fp32 bases"""
    for dtype in (torch.bfloat16, torch.float32):
        model = case.model(dtype)
        trained = set(applied(model, "default").trained)
        output = model(**case.inputs())[0]
        assert output.dtype == logits(case.base(dtype), case.inputs()).dtype, f"{dtype}: output is {output.dtype}"
        assert torch.isfinite(output).all(), f"{dtype}: the output is not finite"
        for name, parameter in adapter_parameters(model, "default"):
            wanted = dtype if name in trained else torch.float32
            assert parameter.dtype == wanted, f"{dtype}: '{name}' is {parameter.dtype}"
        loss_of(model, case.inputs()).backward()


@_check
def copying(case: Case) -> None:
    """deepcopy and pickle"""
    model, inputs = case.model(), case.inputs()
    wanted = logits(model, inputs)
    for how, twin in (("deepcopy", copy.deepcopy(model)), ("pickle", pickle.loads(pickle.dumps(model)))):
        same(logits(twin, inputs), wanted, how)
        disturb(twin, "default", 5)
        differs(logits(twin, inputs), wanted)
        same(logits(model, inputs), wanted, f"the original after its {how} changed")


@_check
def compiling(case: Case) -> str | None:
    """torch.compile(fullgraph=True)"""
    with warnings.catch_warnings():  # PyTorch's tracing of an `autograd.Function` makes an instance, and warns of it
        warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
        try:
            _compile(case)
        except torch._dynamo.exc.TorchDynamoException:
            if _compiles(case.base(), case):
                raise
            return "the model without adapters does not compile as one graph here"
        finally:
            torch._dynamo.reset()
    return None


def _compiles(model: nn.Module, case: Case) -> bool:
    torch._dynamo.reset()
    try:
        logits(torch.compile(model, fullgraph=True, backend=case.compile_backend), case.inputs())
    except torch._dynamo.exc.TorchDynamoException:
        return False
    return True


def _compile(case: Case) -> None:
    model, inputs = case.model(), case.inputs()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=case.compile_backend)
    wanted = logits(model, inputs)
    same(logits(compiled, inputs), wanted, "compiled", atol=1e-4 * wanted.abs().max().item())
    loss_of(compiled, inputs).backward()
    compiled_gradients = _gradients(model)
    model.zero_grad()
    loss_of(model, inputs).backward()
    for name, gradient in _gradients(model).items():
        atol = 1e-4 * gradient.abs().max().item() + 1e-7
        same(compiled_gradients[name], gradient, f"gradient of '{name}'", atol)


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in adapter_parameters(model, "default"):
        assert parameter.grad is not None, f"'{name}' gets no gradient"
        found[name] = parameter.grad.clone()
    return found


@_check
def checkpointing(case: Case) -> str | None:
    """gradient checkpointing"""
    if not getattr(case.base(), "supports_gradient_checkpointing", False):
        return "the model has none"
    wanted: dict[str, Tensor] = {}
    for kwargs in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model: Any = case.model().train()
        if kwargs is not None:
            enable = getattr(model, "activation_checkpointing_enable", None)  # renamed in transformers 5
            (enable or model.gradient_checkpointing_enable)(kwargs)
            if kwargs["use_reentrant"]:
                model.enable_input_require_grads()
        model(**case.inputs(), use_cache=False)[0].square().mean().backward()
        found = _gradients(model)
        wanted = wanted or found
        for name, gradient in found.items():
            limit = 1e-5 * wanted[name].abs().max().item() + 1e-7  # a gradient that is zero but for rounding
            same(gradient, wanted[name], f"{kwargs}: gradient of '{name}'", limit)
    return None


@_check
def quantized_base(case: Case) -> None:
    """a quantized base (NF4)"""
    base, inputs = quantize(case.base()), case.inputs()
    packed = [p for _, p in base_parameters(base) if p.dtype is torch.uint8]
    bits = [p.clone() for p in packed]
    model = case.add(base, 1, "default")
    loss_of(model, inputs).backward()
    for name, gradient in _gradients(model).items():
        assert torch.isfinite(gradient).all(), f"the gradient of '{name}' is not finite"
    with tempfile.TemporaryDirectory() as folder:
        peftcore.save(model, folder)
        fresh = peftcore.load(quantize(case.base()), folder)
    same(logits(fresh, inputs), logits(model, inputs), "output after save and load")
    peftcore.remove(model, "default")
    same(logits(model, inputs), logits(quantize(case.base()), inputs), "removed")
    for parameter, before in zip(packed, bits, strict=True):
        same(parameter, before, "a weight in 4 bits")


@_check
def generating(case: Case) -> str | None:
    """generate, with and without cache, equals one full forward"""
    inputs = case.prompts()
    model: Any = case.model()
    if not case.generates:
        return "the model does not generate"
    for use_cache in (True, False):
        out = _generate(model, inputs, use_cache)
        if model.config.is_encoder_decoder:
            wanted = logits(model, {**inputs, "decoder_input_ids": out.sequences})[:, :-1]
        else:
            full = {"input_ids": out.sequences, "attention_mask": torch.ones_like(out.sequences)}
            wanted = logits(model, full)[:, inputs["input_ids"].shape[1] - 1 : -1]
        same(_steps(out), wanted, f"logits of the steps, use_cache={use_cache}", atol=1e-4)
    return None


@_check
def padding(case: Case) -> str | None:
    """generate for rows of different lengths, with and without cache, equals each row alone"""
    model: Any = case.model()
    if not case.generates:
        return "the model does not generate"
    tokens = case.prompts()["input_ids"]
    short, gap = tokens[1:, 3:], torch.zeros_like(tokens[1:, :3])
    padded = [short, gap] if model.config.is_encoder_decoder else [gap, short]  # as their tokenizers pad
    batch = torch.cat([tokens[:1], torch.cat(padded, dim=1)])
    for use_cache in (True, False):
        steps = _steps(_generate(model, {"input_ids": batch, "attention_mask": (batch != 0).long()}, use_cache))
        for row, alone in enumerate((tokens[:1], short)):
            inputs = {"input_ids": alone, "attention_mask": torch.ones_like(alone)}
            wanted = _steps(_generate(model, inputs, use_cache))[0]
            same(steps[row], wanted, f"logits of row {row}, use_cache={use_cache}", atol=1e-4)
    return None


@_check
def read_by_peft(case: Case) -> str | None:
    """Hugging Face PEFT computes the same from the file"""
    if importlib.util.find_spec("peft") is None:
        return "peft is not installed"
    import peft

    model, inputs = case.model(), case.inputs()
    kind = registry.method(applied(model, "default").method).state.peft_type
    if kind not in peft.PeftType.__members__:
        return "PEFT has no such method"
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of names that transformers has deprecated
        peftcore.save(model, folder)
        found = logits(peft.PeftModel.from_pretrained(case.base(), folder).eval(), inputs)
    wanted = logits(model, inputs)
    found = found[:, -wanted.shape[1] :]  # theirs of a soft prompt's own places come first
    same(found, wanted, "output", atol=1e-4)
    return None


def _generate(model: Any, inputs: dict[str, Tensor], use_cache: bool) -> Any:
    return model.generate(
        **inputs,
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        use_cache=use_cache,
        output_logits=True,
        return_dict_in_generate=True,
    )


def _steps(out: Any) -> Tensor:
    return torch.stack(out.logits, dim=1)  # [batch, new, vocabulary]
