"""The conformance suite a plugin author runs: `check_method(config)` tries what users do with every method.

Each check is a small function below; its docstring is what the report prints.
"""

from __future__ import annotations

import copy
import pickle
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import peftcore
from peftcore.adapted import base_parameters
from peftcore.engine import adapter_parameters, set_trainable
from peftcore.quantization import quantize
from peftcore.registry import registry


def tiny_llama(seed: int = 0) -> nn.Module:
    """A Llama of 2 layers, hidden size 32, grouped-query attention and a vocabulary of 96, random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 96}
    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()


@dataclass(frozen=True)
class Result:
    """One check: passed (`error` and `reason` are None), failed (`error`) or not applicable (`reason`)."""

    name: str
    error: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Report:
    """What `check_method` found. Printing it gives one line a check."""

    method: str
    results: tuple[Result, ...]

    @property
    def failed(self) -> tuple[Result, ...]:
        return tuple(result for result in self.results if result.error)

    def __str__(self) -> str:
        lines = [f"check_method: {self.method}"]
        for result in self.results:
            state = "FAILED" if result.error else "not applicable" if result.reason else "passed"
            detail = result.error or result.reason or ""
            lines.append(f"  {state:<14}  {result.name}" + (f": {detail}" if detail else ""))
        return "\n".join(lines)


def check_method(
    config: Any,
    *,
    make_model: Callable[[], nn.Module] = tiny_llama,
    not_applicable: Mapping[str, str] | None = None,
    compile_backend: str = "aot_eager",
) -> Report:
    """Run every check on `make_model()` with the method of `config`, and print the report.

    Args:
        config: of an installed method, with dropout off: the checks compare outputs.
        make_model: a transformers model, the same weights at each call; causal language models get all checks.
        not_applicable: {check: reason} of checks that this method cannot pass; the report prints the reason.
        compile_backend: of `torch.compile(fullgraph=True)`; "inductor" is the real thing and takes a minute.

    Raises:
        AssertionError: a check failed; the message is the report.
        PeftcoreError: `not_applicable` names no check.
    """
    excused = dict(not_applicable or {})
    for name in excused:
        if name not in CHECKS:
            raise peftcore.PeftcoreError(f"'{name}' is no check. The checks: {', '.join(CHECKS)}")
    case = _Case(config, make_model, compile_backend)
    results = []
    for name, check in CHECKS.items():
        reason = excused.get(name)
        error = None
        if reason is None:
            try:
                reason = check(case)
            except Exception as found:
                where = traceback.extract_tb(found.__traceback__)[-1]
                error = f"{type(found).__name__}: {found} ({where.name}, line {where.lineno})"
        results.append(Result(name, error, reason))
    report = Report(registry.method_of_config(config).name, tuple(results))
    print(report)
    if report.failed:
        raise AssertionError(str(report))
    return report


@dataclass(frozen=True)
class _Case:
    config: Any
    make_model: Callable[[], nn.Module]
    compile_backend: str

    def base(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        return self.make_model().to(dtype)

    def model(self, dtype: torch.dtype = torch.float32, seed: int | None = 1, adapter: str = "default") -> nn.Module:
        """A model with the adapter, moved away from its start by noise of `seed` (None: as it starts)."""
        return self.add(self.base(dtype), seed, adapter)

    def add(self, model: nn.Module, seed: int | None, adapter: str) -> nn.Module:
        """Apply the method to `model`, the same start values at each call."""
        torch.manual_seed(7)
        peftcore.apply(model, self.config, adapter=adapter)
        if seed is not None:
            disturb(model, adapter, seed)
        return model

    def inputs(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(3)
        tokens = torch.randint(3, 90, (2, 9), generator=generator)
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if getattr(self.base().config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = tokens[:, :5]
        return inputs


def disturb(model: nn.Module, adapter: str, seed: int, std: float = 0.2) -> None:
    """Add noise to all that `adapter` trains, so that it computes something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in adapter_parameters(model, adapter):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((std * noise).to(parameter))


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The model's first floating output, without gradients."""
    with torch.no_grad():
        return model(**inputs)[0]


CHECKS: dict[str, Callable[[_Case], str | None]] = {}


def _check(function: Callable[[_Case], str | None]) -> Callable[[_Case], str | None]:
    CHECKS[(function.__doc__ or "").strip().rstrip(".")] = function
    return function


def _same(found: Tensor, wanted: Tensor, what: str, atol: float = 0.0) -> None:
    assert found.shape == wanted.shape, f"{what}: shape {list(found.shape)}, expected {list(wanted.shape)}"
    difference = (found.float() - wanted.float()).abs().max().item()
    assert difference <= atol, f"{what}: differs by {difference:.3g}, allowed {atol:g}"


def _differs(found: Tensor, base: Tensor) -> None:
    assert found.shape != base.shape or not torch.equal(found, base), "the adapter changes nothing"


@_check
def identity(case: _Case) -> None:
    """identity at the start"""
    _same(logits(case.model(seed=None), case.inputs()), logits(case.base(), case.inputs()), "output")


@_check
def base_untouched(case: _Case) -> None:
    """base untouched by training"""
    base, model = case.base(), case.model()
    _train(model, case.inputs(), steps=2)
    state = model.state_dict()
    missing = [key for key in base.state_dict() if key not in state]
    assert not missing, f"keys of the base are gone: {missing[:3]}"
    trained = set(peftcore.engine.applied(model, "default").trained)
    with peftcore.disabled(model):
        for name, parameter in base_parameters(model):
            _same(parameter, base.get_parameter(name), name)
    for name, value in base.state_dict().items():
        if name not in trained:
            _same(state[name], value, name)


@_check
def gradients(case: _Case) -> None:
    """gradients only where they belong"""
    model = case.model()
    _loss(model, case.inputs()).backward()
    own = {id(p): name for name, p in adapter_parameters(model, "default")}
    for name, parameter in model.named_parameters():
        if id(parameter) in own:
            assert parameter.grad is not None, f"'{name}' of the adapter gets no gradient"
            assert torch.isfinite(parameter.grad).all(), f"the gradient of '{name}' is not finite"
        else:
            assert parameter.grad is None and not parameter.requires_grad, f"'{name}' of the base gets a gradient"


@_check
def learns(case: _Case) -> None:
    """training lowers the loss"""
    losses = _train(case.model(seed=None), case.inputs(), steps=12)
    assert losses[-1] < losses[0], f"the loss went from {losses[0]:.4f} to {losses[-1]:.4f} in 12 steps"


@_check
def disabling(case: _Case) -> None:
    """disabled equals base"""
    model, inputs = case.model(), case.inputs()
    before, base = logits(model, inputs), logits(case.base(), inputs)
    _differs(before, base)
    with peftcore.disabled(model):
        _same(logits(model, inputs), base, "disabled")
    _same(logits(model, inputs), before, "enabled again")


@_check
def removing(case: _Case) -> None:
    """remove is bit exact"""
    base, model = case.base(), case.model()
    _train(model, case.inputs(), steps=1)
    peftcore.remove(model, "default")
    wanted, found = base.state_dict(), model.state_dict()
    assert list(found) == list(wanted), f"keys differ: {set(found) ^ set(wanted)}"
    for name in wanted:
        _same(found[name], wanted[name], name)
    for (name, module), (_, original) in zip(model.named_modules(), base.named_modules(), strict=True):
        assert type(module) is type(original), f"'{name}' is still {type(module)}"
    for (name, parameter), (_, original) in zip(model.named_parameters(), base.named_parameters(), strict=True):
        assert parameter.requires_grad == original.requires_grad, f"requires_grad of '{name}'"


@_check
def saving(case: _Case) -> None:
    """save and load are bit exact"""
    model, fresh = case.model(), case.base()
    with tempfile.TemporaryDirectory() as folder:
        peftcore.save(model, folder)
        peftcore.load(fresh, folder)
    loaded = dict(adapter_parameters(fresh, "default"))
    for name, parameter in adapter_parameters(model, "default"):
        _same(loaded[name], parameter, name)
    _same(logits(fresh, case.inputs()), logits(model, case.inputs()), "output")


@_check
def merging(case: _Case) -> None:
    """merge equals forward, unmerge is bit exact"""
    model, inputs = case.model(), case.inputs()
    before = logits(model, inputs)
    kept = {name: p.detach().clone() for name, p in base_parameters(model)}
    peftcore.merge(model)
    _same(logits(model, inputs), before, "merged", atol=1e-4 * before.abs().max().item())
    peftcore.unmerge(model)
    for name, parameter in base_parameters(model):
        _same(parameter, kept[name], name)
    _same(logits(model, inputs), before, "unmerged")


@_check
def switching(case: _Case) -> None:
    """two adapters are switched"""
    inputs = case.inputs()
    alone = {name: logits(case.model(seed=seed, adapter=name), inputs) for name, seed in (("a", 1), ("b", 2))}
    model = case.model(seed=1, adapter="a")
    peftcore.activate(model, [])
    case.add(model, 2, "b")
    for name in ("b", "a", "b"):
        peftcore.activate(model, name)
        _same(logits(model, inputs), alone[name], f"'{name}' of two")
        others = [p for n in ("a", "b") if n != name for _, p in adapter_parameters(model, n)]
        assert not any(p.requires_grad for p in others), "a resting adapter requires gradients"


@_check
def resuming(case: _Case) -> None:
    """resume is exact"""
    whole = case.model(seed=None)
    _train(whole, case.inputs(), steps=4)
    first, second = case.model(seed=None), case.base()
    with tempfile.TemporaryDirectory() as folder:
        optimizer = _optimizer(first)
        _train(first, case.inputs(), steps=2, optimizer=optimizer)
        peftcore.save(first, folder)
        peftcore.load(second, folder)
    resumed = _optimizer(second)
    resumed.load_state_dict(optimizer.state_dict())
    _train(second, case.inputs(), steps=2, optimizer=resumed)
    for (name, parameter), (_, wanted) in zip(
        adapter_parameters(second, "default"), adapter_parameters(whole, "default"), strict=True
    ):
        _same(parameter, wanted, name)


@_check
def freezing(case: _Case) -> None:
    """a frozen adapter gets no gradients"""
    model = case.model()
    set_trainable(model, "default", False)
    assert not any(p.requires_grad for p in model.parameters()), "a parameter still requires gradients"


@_check
def dtypes(case: _Case) -> None:
    """bf16 and fp32 bases"""
    for dtype in (torch.bfloat16, torch.float32):
        model = case.model(dtype)
        trained = set(peftcore.engine.applied(model, "default").trained)
        output = model(**case.inputs())[0]
        assert output.dtype == logits(case.base(dtype), case.inputs()).dtype, f"{dtype}: output is {output.dtype}"
        assert torch.isfinite(output).all(), f"{dtype}: the output is not finite"
        for name, parameter in adapter_parameters(model, "default"):
            wanted = dtype if name in trained else torch.float32
            assert parameter.dtype == wanted, f"{dtype}: '{name}' is {parameter.dtype}"
        _loss(model, case.inputs()).backward()


@_check
def copying(case: _Case) -> None:
    """deepcopy and pickle"""
    model, inputs = case.model(), case.inputs()
    wanted = logits(model, inputs)
    for how, twin in (("deepcopy", copy.deepcopy(model)), ("pickle", pickle.loads(pickle.dumps(model)))):
        _same(logits(twin, inputs), wanted, how)
        disturb(twin, "default", 5)
        _differs(logits(twin, inputs), wanted)
        _same(logits(model, inputs), wanted, f"the original after its {how} changed")


@_check
def compiling(case: _Case) -> None:
    """torch.compile(fullgraph=True)"""
    with warnings.catch_warnings():  # PyTorch's tracing of an `autograd.Function` makes an instance, and warns of it
        warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
        _compile(case)


def _compile(case: _Case) -> None:
    model, inputs = case.model(), case.inputs()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=case.compile_backend)
    wanted = logits(model, inputs)
    _same(logits(compiled, inputs), wanted, "compiled", atol=1e-4 * wanted.abs().max().item())
    _loss(compiled, inputs).backward()
    compiled_gradients = [p.grad.clone() for _, p in adapter_parameters(model, "default")]
    model.zero_grad()
    _loss(model, inputs).backward()
    for (name, parameter), gradient in zip(adapter_parameters(model, "default"), compiled_gradients, strict=True):
        _same(gradient, parameter.grad, f"gradient of '{name}'", atol=1e-4 * parameter.grad.abs().max().item() + 1e-7)
    torch._dynamo.reset()


@_check
def checkpointing(case: _Case) -> str | None:
    """gradient checkpointing"""
    if not getattr(case.base(), "supports_gradient_checkpointing", False):
        return "the model has none"
    wanted = None
    for kwargs in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model = case.model().train()
        if kwargs is not None:
            enable = getattr(model, "activation_checkpointing_enable", None)  # renamed in transformers 5
            (enable or model.gradient_checkpointing_enable)(kwargs)
            if kwargs["use_reentrant"]:
                model.enable_input_require_grads()
        model(**case.inputs(), use_cache=False)[0].square().mean().backward()
        found = {name: p.grad for name, p in adapter_parameters(model, "default")}
        wanted = wanted or found
        for name, gradient in found.items():
            assert gradient is not None, f"{kwargs}: '{name}' gets no gradient"
            limit = 1e-5 * wanted[name].abs().max().item() + 1e-7  # a gradient that is zero but for rounding
            _same(gradient, wanted[name], f"{kwargs}: gradient of '{name}'", limit)


@_check
def quantized_base(case: _Case) -> None:
    """a quantized base (NF4)"""
    base, inputs = quantize(case.base()), case.inputs()
    packed = [p for _, p in base_parameters(base) if p.dtype is torch.uint8]
    bits = [p.clone() for p in packed]
    model = case.add(base, 1, "default")
    _loss(model, inputs).backward()
    for name, parameter in adapter_parameters(model, "default"):
        assert parameter.grad is not None, f"'{name}' gets no gradient"
        assert torch.isfinite(parameter.grad).all(), f"the gradient of '{name}' is not finite"
    with tempfile.TemporaryDirectory() as folder:
        peftcore.save(model, folder)
        fresh = peftcore.load(quantize(case.base()), folder)
    _same(logits(fresh, inputs), logits(model, inputs), "output after save and load")
    peftcore.remove(model, "default")
    _same(logits(model, inputs), logits(quantize(case.base()), inputs), "removed")
    for parameter, before in zip(packed, bits, strict=True):
        _same(parameter, before, "a weight in 4 bits")


@_check
def generating(case: _Case) -> str | None:
    """generate, with and without cache, equals one full forward"""
    model = case.model()
    if not _generates(model):
        return "the model does not generate"
    inputs = case.inputs()
    length = inputs["input_ids"].shape[1]
    for use_cache in (True, False):
        out = _generate(model, inputs, use_cache)
        full = logits(model, {"input_ids": out.sequences, "attention_mask": torch.ones_like(out.sequences)})
        steps = torch.stack(out.logits, dim=1)  # [batch, new, vocabulary]
        _same(steps, full[:, length - 1 : -1], f"logits of the steps, use_cache={use_cache}", atol=1e-4)


@_check
def padding(case: _Case) -> str | None:
    """left-padded batches"""
    model = case.model()
    if not _generates(model):
        return "the model does not generate"
    tokens = case.inputs()["input_ids"]
    padded = torch.cat([torch.zeros(2, 3, dtype=tokens.dtype), tokens], dim=1)
    mask = (padded != 0).long()
    for use_cache in (True, False):
        alone = _generate(model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, use_cache)
        out = _generate(model, {"input_ids": padded, "attention_mask": mask}, use_cache)
        steps, wanted = torch.stack(out.logits, dim=1), torch.stack(alone.logits, dim=1)
        _same(steps, wanted, f"logits of padded rows, use_cache={use_cache}", atol=1e-4)


def _generates(model: nn.Module) -> bool:
    return hasattr(model, "can_generate") and model.can_generate() and not model.config.is_encoder_decoder


def _generate(model: nn.Module, inputs: dict[str, Tensor], use_cache: bool) -> Any:
    return model.generate(
        **inputs,
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        use_cache=use_cache,
        output_logits=True,
        return_dict_in_generate=True,
    )


def _loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    output = model(**inputs)[0].float()
    return torch.nn.functional.cross_entropy(output.flatten(0, -2), torch.arange(output[..., 0].numel()) % 3)


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def _train(
    model: nn.Module, inputs: dict[str, Tensor], steps: int, optimizer: torch.optim.Optimizer | None = None
) -> list[float]:
    optimizer = optimizer or _optimizer(model)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = _loss(model, inputs)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
