"""The built-in tasks, registered through the same hook as the tasks of plugins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftcore.plugin import hookimpl

if TYPE_CHECKING:
    from peftcore_cli.tasks.task import Task


@hookimpl
def peftcore_tasks() -> list[Task]:
    """Return the tasks, in the order in which messages list them."""
    from peftcore_cli.tasks import (
        asr,
        audio_text,
        causal_lm,
        classification,
        dpo,
        grpo,
        image,
        image_dpo,
        image_text,
        kto,
        multi_label,
        orpo,
        pairs,
        regression,
        reward,
        seq2seq,
        tags,
    )

    return [
        causal_lm.CausalLM(),
        seq2seq.Seq2Seq(),
        image_text.ImageText(),
        audio_text.AudioText(),
        pairs.Pairs(),
        asr.Transcripts(),
        classification.Classification(),
        regression.Regression(),
        multi_label.MultiLabel(),
        tags.Tags(),
        image.Images(),
        dpo.DPO(),
        image_dpo.ImageDPO(),
        kto.KTO(),
        orpo.ORPO(),
        reward.Reward(),
        grpo.GRPO(),
    ]
