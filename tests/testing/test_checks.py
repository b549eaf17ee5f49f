"""The suite finds faults that are planted in a method, by the check that is for them, and blames none for its base."""

from typing import Any

import pytest
import torch
from support import tiny
from support.faulty_methods import Gain, check, failed, method_of
from torch import Tensor, nn

import peftcore
from peftcore.plugin import Adapter, Architecture, Around, weight_format
from peftcore.testing import COMPILE, IDENTITY, MERGE
from peftcore.testing.suite import APPLIES, Report, Result

BASE = "base untouched by training"
CHECKPOINTING = "gradient checkpointing"
FILES = "save and load are bit exact"
FORMATS = "a file of a dense base on a quantized one (NF4), and the reverse"
LEFT_OUT = "no layer is left out without a warning"
NEUTRAL = "neutral tensors change nothing"
PACKED = "texts packed into a row equal a row for each, or are refused"
PER_SAMPLE = "an adapter for each sample of a batch equals each sample alone"
REMOVE = "remove is bit exact"
RESUME = "resume is exact"
SHARED = "shared tensors are saved once, and stay shared after load, deepcopy and .to()"
STACKED = "with another method's adapter, merged in both orders, saved and removed"
THREADS = "two threads at once compute what each computes alone"
TOGETHER = "two adapters of the method together, merged in both orders"


class BreaksTheGraph(Gain):
    def forward(self, base: Any, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(base, x)


class MergesWrong(Gain):
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.gain * weight + 0.01, bias


class ForgetsTheBias(Gain):
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.gain * weight, bias


class ForgetsAPart(Gain):
    """Its second factor is drawn anew, and not saved."""

    def __init__(self, value: float) -> None:
        super().__init__(value)
        self.register_buffer("drawn", torch.rand(()), persistent=False)

    def forward(self, base: Any, x: Tensor) -> Tensor:
        return super().forward(base, x) * (1 + self.drawn)


class IsNeutralAtZero(Gain):
    def neutral(self) -> dict[str, Tensor]:
        return {"gain": torch.zeros_like(self.gain)}


class HasABuffer(Gain):
    def __init__(self, value: float) -> None:
        super().__init__(value)
        self.register_buffer("drawn", torch.rand(()))

    def neutral(self) -> dict[str, Tensor]:
        return {"gain": torch.ones_like(self.gain)}


class NamesItsBuffer(HasABuffer):
    def neutral(self) -> dict[str, Tensor]:
        return {**super().neutral(), "drawn": torch.zeros(())}


class Sparse(Adapter):
    """Adds `values` to a weight at `positions`."""

    def __init__(self, positions: Tensor, persistent: bool) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(len(positions)))
        self.register_buffer("positions", positions, persistent=persistent)

    def forward(self, base: Any, x: Tensor) -> Tensor:
        weight = torch.zeros(base.module.out_features, base.module.in_features)
        change = weight.flatten().index_add(0, self.positions, self.values).view(weight.shape)
        return base(x) + nn.functional.linear(x, change)


class MovesTheBase(Gain):
    def forward(self, base: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            base.module.weight.mul_(1.001)
        return super().forward(base, x)


class KeepsTheCall(Gain):
    """Its change depends on the input, which it keeps on itself while the layer runs."""

    def forward(self, base: Any, x: Tensor) -> Tensor:
        self.size = x.detach().abs().mean()
        return super().forward(base, x) * self.size


class KeepsNothing(Gain):
    def forward(self, base: Any, x: Tensor) -> Tensor:
        size = x.detach().abs().mean()
        return super().forward(base, x) * size


class LeavesAnAttribute(Gain):
    def forward(self, base: Any, x: Tensor) -> Tensor:
        base.module.last_input = x.detach()
        return super().forward(base, x)


class LeavesAHook(Gain):
    def forward(self, base: Any, x: Tensor) -> Tensor:
        if not base.module._forward_pre_hooks:
            base.module.register_forward_pre_hook(lambda *_: None)
        return super().forward(base, x)


class MixesTheBatch(Gain):
    def forward(self, base: Any, x: Tensor) -> Tensor:
        return super().forward(base, x) + self.gain.to(x.dtype) * x.mean(0, keepdim=True).mean()


class TakesTheBareWeight(Gain):
    """Forgets what stands inside, and so what it computes changes with the order."""

    def forward(self, base: Any, x: Tensor) -> Tensor:
        return self.gain.to(x.dtype) * nn.functional.linear(x, base.module.weight, base.module.bias)


class Bank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.ones(3))


class SharesATensor(Gain):
    """Not a module, and so each has its own after `.to()`."""

    def __init__(self, value: float) -> None:
        super().__init__(value)
        self.register_buffer("bank", TENSOR)

    def forward(self, base: Any, x: Tensor) -> Tensor:
        return super().forward(base, x) * self.bank.sum().to(x.dtype)


class SharesAModule(Gain):
    def __init__(self, value: float) -> None:
        super().__init__(value)
        self.bank = BANK

    def forward(self, base: Any, x: Tensor) -> Tensor:
        return super().forward(base, x) * self.bank.values.sum().to(x.dtype)


TENSOR, BANK = torch.ones(2), Bank()


FAULTS = [
    (BreaksTheGraph, COMPILE, "Llama"),
    (MergesWrong, MERGE, "Llama"),
    (ForgetsTheBias, MERGE, "Qwen2"),
    (ForgetsAPart, FILES, "Llama"),
    (MovesTheBase, BASE, "Llama"),
    (LeavesAnAttribute, REMOVE, "Llama"),
    (LeavesAHook, REMOVE, "Llama"),
    (MixesTheBatch, PER_SAMPLE, "Llama"),
    (TakesTheBareWeight, STACKED, "Llama"),
    (SharesATensor, SHARED, "Llama"),
    (IsNeutralAtZero, NEUTRAL, "Llama"),
    (NamesItsBuffer, NEUTRAL, "Llama"),
]


@pytest.mark.parametrize(("adapter", "name", "family"), FAULTS, ids=lambda each: getattr(each, "__name__", None))
def test_a_fault_is_found(adapter: type[nn.Module], name: str, family: str) -> None:
    assert failed(method_of(adapter), name, families=[family]).keys() == {f"FAILED          {name}"}


def test_a_calls_state_that_is_kept_on_a_module() -> None:
    """Whichever thread is slower: each runs one operation, then the other one."""
    found = failed(method_of(KeepsTheCall), THREADS)
    assert "while another one called the model with other inputs: differs by" in str(found)
    check(method_of(KeepsNothing), THREADS)


def test_a_method_without_fault_passes() -> None:
    checks = [MERGE, FILES, BASE, REMOVE, PER_SAMPLE, STACKED, SHARED, TOGETHER]
    report = check(method_of(Gain), *checks, families=["Llama", "Qwen2"])
    reasons = {result.name: result.reason for result in report.results if result.reason}
    assert reasons == {SHARED: "its adapters share no tensor"}
    for adapter, name in ((SharesAModule, SHARED), (HasABuffer, NEUTRAL)):
        assert all(result.reason is None for result in check(method_of(adapter), name).results)


def test_rounding_is_no_fault_of_checkpointing() -> None:
    class RoundsEachCall(Gain):
        """Results of two calls differ by rounding, as sums in another order do."""

        calls = 0

        def forward(self, base: Any, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(base, x) * (1 + 1000 * (self.calls % 2) * torch.finfo(x.dtype).eps)

    check(method_of(RoundsEachCall), CHECKPOINTING)


def test_a_base_that_does_not_compile_is_no_fault_of_the_method() -> None:
    def broken_llama() -> nn.Module:
        model = tiny.llama()
        for layer in model.model.layers:
            layer.mlp.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
        return model

    report = check(method_of(Gain), COMPILE, families=[broken_llama])
    (result,) = [result for result in report.results if result.name == COMPILE]
    assert result.reason == "the model without adapters does not compile as one graph here"


def test_layers_that_are_left_out_in_silence() -> None:
    """Of experts the matrices are no linear layers; of T5 one of the two stacks is forgotten."""

    def linear(model: nn.Module, config: Any, architecture: Architecture) -> list[Any]:
        paths = [path for path, module in peftcore.model.targets.base_modules(model) if isinstance(module, nn.Linear)]
        return [Around(path, Gain(config.value)) for path in paths if not path.startswith("decoder")]

    method = tiny.method("silent", linear)
    assert failed(method, LEFT_OUT, families=["Llama", "Qwen3-MoE"])[f"FAILED          {LEFT_OUT}"]
    assert "decoder.block.0.layer.0.SelfAttention, decoder.block.1.layer.0.SelfAttention" in str(
        failed(method, LEFT_OUT, families=["Llama", "T5"])
    )

    def said(model: nn.Module, config: Any, architecture: Architecture) -> list[Any]:
        import warnings

        warnings.warn("experts are left out", stacklevel=1)
        return linear(model, config, architecture)

    check(tiny.method("said", said), LEFT_OUT, families=["Qwen3-MoE"])


def test_an_after_step_that_does_not_resume() -> None:
    class Steps(Gain):
        """Counts the steps where no file keeps them."""

        seen = 0

    def after_step(adapters: Any, config: Any, step: int, total: int) -> None:
        for adapter in adapters.values():
            adapter.seen += 1
            with torch.no_grad():
                adapter.gain.mul_(1 + adapter.seen / 100)

    def of_the_step(adapters: Any, config: Any, step: int, total: int) -> None:
        for adapter in adapters.values():
            with torch.no_grad():
                adapter.gain.mul_(1 + step / total / 100)

    assert failed(method_of(Steps, after_step=after_step), RESUME)
    check(method_of(Steps, after_step=of_the_step), RESUME)


# What is excused


def only_llama(model: nn.Module, config: Any, architecture: Architecture) -> list[Any]:
    if model.config.model_type != "llama":
        raise peftcore.PeftcoreError("it is for Llama alone")
    layers = peftcore.model.targets.select(model, architecture, target_modules="all-linear")
    return [Around(path, Gain(config.value)) for path in layers]


def test_a_family_that_the_method_refuses_is_excused_with_a_reason() -> None:
    method = tiny.method("picky", only_llama)
    found = failed(method, IDENTITY, families=["Llama", "ViT"])
    assert "it is for Llama alone. If the method cannot be applied to it: not_applicable={'ViT'" in str(found)
    report = check(method, IDENTITY, families=["Llama", "ViT"], not_applicable={"ViT": "no images"})
    assert [(r.name, r.reason) for r in report.of("ViT")] == [(APPLIES, "no images")]
    assert report.first == "Llama"


def test_an_excuse_that_nothing_needs_fails() -> None:
    excused = {MERGE: "I thought so", "ViT": "I thought so"}
    found = failed(method_of(Gain), MERGE, families=["Llama", "ViT"], not_applicable=excused)
    assert found.keys() == {f"FAILED          {MERGE}", "FAILED          ViT"}
    assert "Remove it from not_applicable" in str(found)


def test_a_wrong_merge_is_no_excuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "peftcore.engine.merging.merge.merged_layers", lambda *_, **__: []
    )  # merges nothing, in silence
    found = failed(method_of(Gain), MERGE, not_applicable={MERGE: "it cannot be merged"})
    assert "merged: differs by" in str(found)


def test_names_that_are_none() -> None:
    with pytest.raises(peftcore.PeftcoreError, match="'merging' is not a check"):
        check(method_of(Gain), not_applicable={"merging": "no"})
    with pytest.raises(peftcore.PeftcoreError, match=r"'Lama' is not a family.*Llama"):
        check(method_of(Gain), families=["Lama"])
    with pytest.raises(peftcore.PeftcoreError, match="is not a check"):
        check(method_of(Gain), "ViT")


def test_a_report_of_a_failure_shows_how_a_check_is_excused() -> None:
    hint = f"Correct the method. If a check cannot apply: not_applicable={{{MERGE!r}: 'the reason'}}"
    right, wrong = Result(IDENTITY, family="Llama"), Result(MERGE, family="Llama", error="differs by 1")
    assert str(Report("gain", (right, wrong))).splitlines()[-1] == hint
    assert hint not in str(Report("gain", (right,)))
    assert "Correct" not in str(Report("gain", (Result(APPLIES, family="Llama", error="it is for others"),)))


class AddsTheTokensBefore(Gain):
    def forward(self, base: Any, x: Tensor) -> Tensor:
        return super().forward(base, x) + 0.1 * base(x).cumsum(1)


def test_a_method_that_mixes_the_texts_of_a_row() -> None:
    assert list(failed(method_of(AddsTheTokensBefore), PACKED)) == [f"FAILED          {PACKED}"]


@pytest.mark.parametrize("saved", [True, False])
def test_what_place_computes_from_a_weight_must_be_saved(saved: bool) -> None:
    """A 4-bit weight's largest numbers are at other positions."""

    def place(model: nn.Module, config: Any, architecture: Architecture) -> list[Any]:
        placements = []
        for path, layer in peftcore.model.targets.select(model, architecture, target_modules="all-linear").items():
            weight = weight_format(layer).read(layer).detach()
            placements.append(Around(path, Sparse(weight.abs().flatten().topk(20)[1], saved)))
        return placements

    method = tiny.method("faulty", place)
    if saved:
        check(method, FILES, FORMATS)
    else:
        check(method, FILES)
        assert "differs by " in failed(method, FORMATS)[f"FAILED          {FORMATS}"]
