"""Next-token prediction on texts, prompts with completions and conversations (`--task causal-lm`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peftcore_cli.bases.adapter_folders import AdapterTask
from peftcore_cli.data.first_lines import FirstLines
from peftcore_cli.settings import Settings
from peftcore_cli.tasks import generations
from peftcore_cli.tasks.task import Task

if TYPE_CHECKING:
    from peftcore import AdapterInfo
    from peftcore_cli.training.trainers import Measuring


class CausalLM(Task):
    """A causal language model. This task is the fallback for rows that no other task recognises."""

    name = "causal-lm"
    shown_keys = "text, prompt/completion, messages, conversations, instruction/output or input_ids"
    one_kind = learns_texts = writes = True
    needed_model = "a model that generates text, found {}. For an encoder-decoder model use --task seq2seq"
    peft_task_type = "CAUSAL_LM"
    family = "writers"
    figures = ("perplexity", *generations.FIGURES)

    def recognises(self, lines: FirstLines) -> bool:
        return True

    def from_peft(self, info: AdapterInfo) -> AdapterTask | None:
        return AdapterTask(self.name, 512) if info.task_type is None else super().from_peft(info)

    def trainer(
        self, arguments: dict[str, Any], settings: Settings, processor: Any, about: AdapterTask, teacher: Any = None
    ) -> Measuring:
        if teacher is None:
            return super().trainer(arguments, settings, processor, about)
        from peftcore_cli.training.distillation import DistillingTrainer

        collate, weight = self.collator(processor), settings.teacher_weight
        return DistillingTrainer(**arguments, data_collator=collate, teacher=teacher, weight=weight)
