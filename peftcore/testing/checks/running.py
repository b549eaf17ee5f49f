"""Checks of ways to run a model: compiled as one graph, in `generate`, with rows of different lengths, in threads."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from peftcore.errors import PeftcoreError, PluginError
from peftcore.testing.case import Case, close, first_output, logits, loss_of, same
from peftcore.testing.checks.register import check
from peftcore.testing.checks.training import gradients_of


@check("torch.compile(fullgraph=True)")
def compiling(case: Case) -> str | None:
    with warnings.catch_warnings():  # PyTorch's tracing creates an instance of an `autograd.Function`, and warns
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
    expected = logits(model, inputs)
    outputs: list[Tensor] = []

    def run(**call: Any) -> tuple[Tensor]:
        outputs.append(first_output(compiled(**call)))
        return (outputs[-1],)

    loss_of(run, inputs).backward()  # one graph for the output and the gradients
    close(outputs[0], expected, "compiled")
    compiled_gradients = gradients_of(model)
    model.zero_grad()
    loss_of(model, inputs).backward()
    for name, gradient in gradients_of(model).items():
        atol = 1e-4 * gradient.abs().max().item() + 1e-7
        same(compiled_gradients[name], gradient, f"gradient of '{name}'", atol)


@check("generate, with and without cache, equals one full forward")
def generating(case: Case) -> str | None:
    if not case.generates:
        return "the model does not generate"
    inputs = case.prompts()
    model: Any = case.model()
    for use_cache in (True, False):
        out = _generate(model, inputs, use_cache)
        if case.is_encoder_decoder:
            expected = logits(model, {**inputs, "decoder_input_ids": out.sequences})[:, :-1]
        else:
            full = {"input_ids": out.sequences, "attention_mask": torch.ones_like(out.sequences)}
            expected = logits(model, full)[:, inputs["input_ids"].shape[1] - 1 : -1]
        same(_steps(out), expected, f"logits of the steps, use_cache={use_cache}", atol=1e-4)
    return None


@check("generate for rows of different lengths, with and without cache, equals each row alone")
def padding(case: Case) -> str | None:
    if not case.generates:
        return "the model does not generate"
    model: Any = case.model()
    tokens = case.prompts()["input_ids"]
    short, gap = tokens[1:, 3:], torch.zeros_like(tokens[1:, :3])
    padded = [short, gap] if case.is_encoder_decoder else [gap, short]  # as their tokenizers do
    batch = torch.cat([tokens[:1], torch.cat(padded, dim=1)])
    for use_cache in (True, False):
        steps = _steps(_generate(model, {"input_ids": batch, "attention_mask": (batch != 0).long()}, use_cache))
        for row, single_row in enumerate((tokens[:1], short)):
            inputs = {"input_ids": single_row, "attention_mask": torch.ones_like(single_row)}
            expected = _steps(_generate(model, inputs, use_cache))[0]
            same(steps[row], expected, f"logits of row {row}, use_cache={use_cache}", atol=1e-4)
    return None


@check("texts packed into a row equal a row for each, or are refused")
def packing(case: Case) -> str | None:
    if not case.generates or case.is_encoder_decoder:
        return "the model is not a decoder that generates"
    tokens = case.prompts()["input_ids"]
    rows: dict[str, Any] = {"input_ids": tokens, "use_cache": False}
    positions = torch.arange(tokens.shape[1]).repeat(len(tokens))[None]
    row = {**rows, "input_ids": tokens.reshape(1, -1), "position_ids": positions}
    expected = logits(case.original, rows)
    try:
        close(logits(case.original, row).view_as(expected), expected, "the model without adapters")
    except (AssertionError, TypeError):
        return "the model without adapters does not separate the texts of a row"
    model = case.model()
    expected = logits(model, rows)
    try:
        actual = logits(model, row)
    except PeftcoreError as refusal:
        if isinstance(refusal, PluginError):
            raise
        return str(refusal)
    close(actual.view_as(expected), expected, "texts packed into a row")
    return None


@check("two threads at once compute what each computes alone")
def threads(case: Case) -> None:
    model, rows = case.model(), case.inputs(rows=4)
    calls = [
        {name: value[part] if isinstance(value, Tensor) else value for name, value in rows.items()}
        for part in (slice(0, 2), slice(2, 4))
    ]
    expected = [logits(model, call) for call in calls]
    turns = _Turns(len(calls))

    def run(number: int) -> Tensor:
        with turns.of(number):
            return logits(model, calls[number])

    # Whether a mode is active is a global of PyTorch, which each mode restores to what it was. Without a mode around
    # all threads it could stay set, and PyTorch 2.9 then compiles nothing.
    with _EachOperation(lambda: None), ThreadPoolExecutor(len(calls)) as pool:
        outputs = [future.result() for future in [pool.submit(run, number) for number in range(len(calls))]]
    for number, output in enumerate(outputs):
        close(output, expected[number], f"thread {number}, while another one called the model with other inputs")


class _Turns:
    """Scheduler that lets threads run one PyTorch operation each in turn, to interleave them deterministically."""

    def __init__(self, threads: int) -> None:
        self._changed = threading.Condition()
        self._running = list(range(threads))
        self._turn = 0

    @contextmanager
    def of(self, number: int) -> Iterator[None]:
        """Within the block, make each operation of this thread wait for its turn."""
        try:
            with _EachOperation(lambda: self._wait(number)):
                yield
        finally:
            with self._changed:
                self._pass_on(number)
                self._running.remove(number)
                self._changed.notify_all()

    def _wait(self, number: int) -> None:
        with self._changed:  # with a timeout, since the other thread may wait for a lock that this thread holds
            self._changed.wait_for(lambda: self._turn == number or self._running == [number], timeout=0.2)
            self._pass_on(number)
            self._changed.notify_all()

    def _pass_on(self, number: int) -> None:
        later_threads = [thread for thread in self._running if thread > number] or self._running
        self._turn = later_threads[0]


class _EachOperation(TorchDispatchMode):
    """Mode that calls a function before each operation of this thread."""

    def __init__(self, before: Callable[[], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._before = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._before()
        return func(*args, **(kwargs or {}))


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
