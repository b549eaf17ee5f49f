"""Multitask prompt tuning (Wang et al. 2023, arXiv 2303.02861, section 3): a shared prompt with a factor per task.

    P_k = P ∘ (C_k R_k)      P [n, hidden] is shared; C_k [n, ranks] and R_k [ranks, hidden] belong to task k

P_k comes before the embedded input, as in prompt tuning. The call names each row's task: `model(..., task_ids=t)`,
`model.generate(..., task_ids=t)`, or `with peftcore.call_arguments(model, task_ids=t)`; t int64 [batch], or one number.
n · hidden + tasks · ranks · (n + hidden) numbers are trained.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peftcore_prompt_tuning import PromptTuningConfig, initial_values, token_embedding
from safetensors.torch import load_file
from torch import Tensor, nn

from peftcore.plugin import (
    Adapter,
    Architecture,
    Method,
    PeftcoreError,
    Placement,
    SoftPrompt,
    StateRules,
    current_call,
    hookimpl,
    prompt_tensor_name,
    validation,
)

peftcore_api = ">=3.0,<4"

Init = Literal["RANDOM", "TEXT", "AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"]
_SOURCES = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")


@dataclass(frozen=True)
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """Config with the field names of Hugging Face PEFT's `MultitaskPromptTuningConfig`; others are prompt tuning's.

    Args:
        num_tasks: number of tasks that share P.
        num_ranks: rank of each task's factor. Wang et al. use 1.
        prompt_tuning_init: "RANDOM", "TEXT", or how to start from an adapter of this method that was trained on source
            tasks. "ONLY_SOURCE_SHARED" copies its P. For a single target task, "AVERAGE_SOURCE_TASKS" also copies the
            means of its C and R, and "EXACT_SOURCE_TASK" copies C and R of one of its tasks.
        prompt_tuning_init_state_dict_path: the source's `adapter_model.safetensors`, or its folder.
        prompt_tuning_init_task: the source's task, for "EXACT_SOURCE_TASK".
    """

    prompt_tuning_init: Init = "RANDOM"  # type: ignore[assignment]
    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int = 0
    num_ranks: int = 1
    num_tasks: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.positive_whole(num_ranks=self.num_ranks, num_tasks=self.num_tasks)
        init = self.prompt_tuning_init
        validation.require(
            init not in _SOURCES or self.prompt_tuning_init_state_dict_path is not None,
            f"prompt_tuning_init='{init}' needs prompt_tuning_init_state_dict_path, the file of the source's adapter",
        )
        validation.require(
            init not in _SOURCES[:2] or self.num_tasks == 1,
            f"prompt_tuning_init='{init}' starts one target task: num_tasks must be 1, found {self.num_tasks}",
        )

    def resolved(self, model: nn.Module, architecture: Architecture) -> Any:
        """Return prompt tuning's config, except that encoder-decoders have a prompt only in the encoder."""
        if architecture.is_encoder_decoder and self.num_transformer_submodules not in (None, 1):
            raise PeftcoreError(
                "a multitask prompt comes before the encoder's input only. Use num_transformer_submodules=1"
            )
        return replace(super().resolved(model, architecture), num_transformer_submodules=1)


class MultitaskPrompt(Adapter):
    """P, and C and R of all tasks. A call returns P_k `[batch or 1, n, hidden]` for its tasks."""

    needs_call = ("task_ids",)

    def __init__(self, rows: Tensor, config: MultitaskPromptTuningConfig) -> None:
        super().__init__()
        self.tokens, self.hidden = rows.shape
        self.prompt_embeddings = nn.Parameter(rows)
        tasks, ranks = config.num_tasks, config.num_ranks
        self.prefix_task_cols = nn.Parameter(torch.empty(tasks, self.tokens, ranks).normal_(std=0.02))
        self.prefix_task_rows = nn.Parameter(torch.empty(tasks, ranks, self.hidden).normal_(std=0.02))

    def forward(self) -> Tensor:
        tasks = current_call().get("task_ids")
        if tasks is None:
            if len(self.prefix_task_cols) > 1:
                raise PeftcoreError(
                    f"the prompt has {len(self.prefix_task_cols)} tasks, but the call names none. Use model(..., "
                    "task_ids=t); transformers' Trainer drops that column unless remove_unused_columns=False"
                )
            tasks = 0
        cols = self.prefix_task_cols
        index = validation.task_ids(tasks, len(cols), cols.device, on_card=True)
        factor = cols.index_select(0, index) @ self.prefix_task_rows.index_select(0, index)
        return self.prompt_embeddings * factor


def start_from_source(prompt: MultitaskPrompt, config: MultitaskPromptTuningConfig) -> None:
    """Copy values from the source adapter's file into `prompt`."""
    path = Path(config.prompt_tuning_init_state_dict_path or "")
    path = path / "adapter_model.safetensors" if path.is_dir() else path
    if path.suffix != ".safetensors" or not path.is_file():
        raise PeftcoreError(
            f"prompt_tuning_init_state_dict_path='{path}' is not a safetensors file. Pass the source adapter's "
            "adapter_model.safetensors or its folder"
        )
    source, kind, task = load_file(path), config.prompt_tuning_init, config.prompt_tuning_init_task
    for name, parameter in prompt.named_parameters():
        if name != "prompt_embeddings" and kind == "ONLY_SOURCE_SHARED":
            continue
        value = source.get(name, torch.empty(0))
        if name != "prompt_embeddings":
            value = value[task : task + 1] if kind == "EXACT_SOURCE_TASK" else value.mean(0, keepdim=True)
        if parameter.shape != value.shape:
            raise PeftcoreError(
                f"'{name}' of '{path}' has shape {list(value.shape)}, but the prompt needs {list(parameter.shape)}. "
                "Choose num_virtual_tokens and num_ranks as in the source"
            )
        parameter.data.copy_(value)


def place(model: nn.Module, config: Any, architecture: Architecture) -> list[Placement]:
    from_source = config.prompt_tuning_init in _SOURCES
    plain = replace(config, prompt_tuning_init="RANDOM") if from_source else config
    prompt = MultitaskPrompt(initial_values(plain, token_embedding(model, architecture)), config)
    if from_source and config.initialize and not prompt.prompt_embeddings.is_meta:
        start_from_source(prompt, config)
    return [SoftPrompt(prompt, (prompt.tokens, prompt.hidden))]


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(
        peft_type="MULTITASK_PROMPT_TUNING",
        tensor_name=prompt_tensor_name,
        read=lambda _model, tensors, fields: (tensors, {**fields, "initialize": False}),
        write=lambda _model, tensors, fields: (tensors, {n: v for n, v in fields.items() if n != "initialize"}),
    )
    return [Method("multitask-prompt-tuning", MultitaskPromptTuningConfig, place, rules, learning_rate=3e-2)]
