"""The suite finds what is wrong with a method's first values, loss, groups, schedule and files."""

from __future__ import annotations

import queue
import warnings
from typing import Any

import pytest
import torch
from peftcore_lora import LoraConfig
from support import processes, tiny
from support.faulty_methods import Gain, check, failed, method_of
from support.whole_run import WHOLE
from torch import Tensor

import peftcore
from peftcore.plugin import StateRules, tensor_name
from peftcore.testing import FAMILIES, check_sharded
from peftcore.testing.case import Case, merge_exactly
from peftcore.testing.sharded import first_error
from peftcore.testing.suite import APPLIES

FILES = "save and load are bit exact"
LEFT_OUT = "no layer is left out without a warning"
RESUME = "resume is exact"
ACCUMULATE = "gradients of four accumulated batches equal those of one, with the method's loss term once"
GROUPS = "parameter groups name each trained parameter once"


def total(adapters: Any) -> Tensor:
    return sum(((adapter.gain - 1) ** 2).sum() for adapter in adapters.values())


def values(adapters: Any) -> list[Any]:
    return [p for adapter in adapters.values() for p in adapter.parameters()]


class Remembers(Gain):
    """What its last forward was given decides what it adds to the loss."""

    def forward(self, base: Any, x: Tensor) -> Tensor:
        self.size = x.detach().abs().max() ** 2
        return super().forward(base, x)


def test_a_loss_that_depends_on_how_a_step_is_cut() -> None:
    def of_last_batch(adapters: Any, config: Any) -> Tensor:
        return sum((adapter.gain * adapter.size).sum() for adapter in adapters.values())

    assert failed(method_of(Remembers, loss=of_last_batch), ACCUMULATE)
    check(method_of(Gain, loss=lambda adapters, config: total(adapters)), ACCUMULATE)


def test_parameter_groups() -> None:
    def twice(adapters: Any, config: Any, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        return [{"params": values(adapters), "lr": lr}, {"params": values(adapters)[:1], "lr": lr}]

    def backwards(adapters: Any, config: Any, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        return [{"params": values(adapters), "lr": -lr}]

    def half(adapters: Any, config: Any, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        return [{"params": values(adapters)[::2], "lr": 16 * lr}]

    for wrong in (twice, backwards):
        assert failed(method_of(Gain, parameter_groups=wrong), GROUPS)
    check(method_of(Gain, parameter_groups=half), GROUPS, RESUME)


def test_first_values_that_change_the_base() -> None:
    def moves(model: Any, adapters: Any, config: Any, batches: Any) -> None:
        next(model.parameters()).add_(1)

    def says_nothing(model: Any, adapters: Any, config: Any, batches: Any) -> None:
        if batches is None:
            raise peftcore.PeftcoreError("give it batches")
        for adapter in adapters.values():
            adapter.gain.fill_(1)

    found = failed(method_of(Gain, initialize=moves), FILES)
    assert (
        "has changed the base tensor 'model.embed_tokens.weight'" in str(found)
        and f"FAILED          {APPLIES}" in found
    )
    assert failed(method_of(Gain, initialize=moves), FILES, not_applicable={"Llama": "no"}), "it is no refusal"
    check(method_of(Gain, initialize=says_nothing), FILES)


def test_first_values_from_batches() -> None:
    """A method that requires batches, with labels, is given them by every check, on every family."""

    def from_gradients(model: Any, adapters: Any, config: Any, batches: Any) -> None:
        if batches is None:
            raise peftcore.PeftcoreError("give it batches")
        with torch.enable_grad():
            losses = [model(**batch).loss for batch in batches]
        for adapter in adapters.values():
            adapter.gain.fill_(1 + 0 * float(sum(losses)))

    check(method_of(Gain, initialize=from_gradients), LEFT_OUT, families=["Llama", "T5", "BERT", "ViT"])


def test_first_values_from_batches_of_the_authors_own() -> None:
    """A method whose first values need what the suite's own batches do not have, the outputs of a teacher."""

    def from_teacher(model: Any, adapters: Any, config: Any, batches: Any) -> None:
        if batches is None:
            raise peftcore.PeftcoreError("give it batches")
        far = [(model(batch["input_ids"]).logits - batch["teacher"]).abs().mean() for batch in batches]
        for adapter in adapters.values():
            adapter.gain.fill_(1 + 0 * float(sum(far)))

    def taught(model: Any) -> list[dict[str, Tensor]]:
        tokens = torch.arange(12).view(2, 6)
        with torch.no_grad():
            return [{"input_ids": tokens, "teacher": model(tokens).logits}]

    method = method_of(Gain, initialize=from_teacher)
    (error,) = failed(method, FILES).values()
    assert "KeyError: 'teacher'" in error
    check(method, FILES, batches=taught)


def test_an_error_of_first_values_is_what_is_reported() -> None:
    """Also where the method prepares the base, which is asked for inputs."""

    def refuses(model: Any, adapters: Any, config: Any, batches: Any) -> None:
        raise peftcore.PeftcoreError("no batches" if batches is None else "it needs 1,000 tokens")

    def fails(model: Any, adapters: Any, config: Any, batches: Any) -> None:
        raise KeyError("labels")

    for prepare in (None, lambda model, config: None):
        (refused,) = failed(method_of(Gain, initialize=refuses, prepare=prepare), FILES).values()
        assert "it needs 1,000 tokens" in refused and "Recursion" not in refused
        (error,) = failed(method_of(Gain, initialize=fails, prepare=prepare), FILES).values()
        assert (
            "PluginError: `initialize` of the plugin 'faulty' (peftcore-faulty 1.0) failed: KeyError: 'labels'" in error
        )


def test_exported_names_that_collide() -> None:
    rules = StateRules(peft_type="TOY_FAULTY", export=lambda placement: {"gain": placement.adapter.gain})
    assert failed(method_of(Gain, state=rules), FILES)


def test_two_names_of_a_part_that_export_loses() -> None:
    """What is exported in place of an adapter's own tensors must compute the same."""

    def export(placement: Any) -> dict[str, Tensor]:
        return {tensor_name(placement, "gain"): torch.ones_like(placement.adapter.gain)}

    rules = StateRules(peft_type="TOY_FAULTY", export=export)
    assert failed(method_of(Gain, state=rules), FILES)


def test_on_ranks_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    if not WHOLE:  # ranks are forks with the imports done, since starting Python takes most of the time
        processes.start_server()
        monkeypatch.setattr("multiprocessing.get_context", lambda method: processes.CONTEXT)
    check_sharded(LoraConfig(r=3))


def test_the_first_error_of_a_rank_ends_the_check() -> None:
    """The other rank waits for the one that failed, and puts nothing."""
    results: queue.Queue[str | None] = queue.Queue()
    results.put("rank 1: wrong")
    assert first_error(results, 60) == "rank 1: wrong"
    results.put(None)
    assert first_error(results, 0.01) == "a rank did not finish within 0.01 s"
    results.put(None)
    results.put(None)
    assert first_error(results, 60) is None


def test_a_warning_of_a_merge_is_a_refusal_only_if_a_change_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    other = "something else"
    monkeypatch.setattr(peftcore, "merge", lambda model, undo: warnings.warn(other, UserWarning, stacklevel=1))
    with pytest.warns(UserWarning, match=other):
        merge_exactly(torch.nn.Linear(1, 1))
    lost = "requantizing 2 merged layers loses 3%"
    monkeypatch.setattr(peftcore, "merge", lambda model, undo: warnings.warn(lost, UserWarning, stacklevel=1))
    with pytest.raises(peftcore.PeftcoreError, match=lost):
        merge_exactly(torch.nn.Linear(1, 1))


def test_a_base_that_is_computed_with_in_one_format_alone() -> None:
    """Each format's check detects what the method does with this format, and reports no other."""
    names = {
        "nf4": "a quantized base (NF4)",
        "mxfp4": "a quantized base (MXFP4)",
        "affine4": "a quantized base (affine4)",
    }

    for quant_type, name in names.items():

        class Shifts(Gain):
            def forward(self, base: Any, x: Tensor, quant_type: str = quant_type) -> Tensor:
                found = getattr(base.module, "quant_type", None)
                return super().forward(base, x) + float(found == quant_type)

        assert list(failed(method_of(Shifts), *names.values())) == [f"FAILED          {name}"]


def test_a_merge_that_dense_weights_alone_have() -> None:
    class Shifts(Gain):
        def forward(self, base: Any, x: Tensor) -> Tensor:
            is_quantized = hasattr(base.module, "quant_type")
            return super().forward(base, x) + (self.gain - 1) * float(is_quantized)

    (error,) = failed(method_of(Shifts), "a quantized base (affine4)").values()
    assert "PeftcoreError: " in error and "merge" in error


def test_models_that_a_format_cannot_quantize() -> None:
    """The suite's own models are quantized to each format; of an author's model the check says what is wrong."""
    names = ("a quantized base (NF4)", "a quantized base (MXFP4)", "a quantized base (affine4)")
    for family in FAMILIES.values():
        for quant_type in ("nf4", "mxfp4", "affine4"):
            assert Case(None, family).why_not_quantized(quant_type) is None
    nf4, *others = check(method_of(Gain), *names, families=[tiny.llama]).of("llama")[1:]
    assert nf4.reason is None
    for result in others:
        assert result.reason and "its model cannot be quantized: 'model.layers.0.mlp.down_proj' has 48" in result.reason
