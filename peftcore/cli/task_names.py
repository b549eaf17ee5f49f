"""Names of the tasks, as `--task` takes them, and groups of tasks."""

from __future__ import annotations

from peftcore.errors import PeftcoreError

LANGUAGE_MODEL = "causal-lm"
CLASSIFICATION, REGRESSION, MULTI_LABEL = LABELLED = ("classification", "regression", "multi-label")
TAGS, IMAGE = "tags", "image"
HEADED = (*LABELLED, TAGS, IMAGE)  # with a new head on the base, whose outputs have labels
SEQ2SEQ = "seq2seq"
IMAGE_TEXT, AUDIO_TEXT = "image-text", "audio-text"
EMBEDDING = "pairs"
SPEECH = "asr"
PREFERENCES = "dpo"
IMAGE_PREFERENCES = "image-dpo"
UNPAIRED = "kto"
ODDS, REWARD = "orpo", "reward"
ROLLOUTS = "grpo"
PAIRED = (PREFERENCES, ODDS, REWARD)  # rows with a chosen and a rejected answer
SEEING = (IMAGE_TEXT, IMAGE_PREFERENCES)  # conversations with images
MULTIMODAL = (*SEEING, AUDIO_TEXT)  # conversations with other parts than texts
# On judged answers, each with a module of its own.
COMPARED = (PREFERENCES, IMAGE_PREFERENCES, UNPAIRED, ODDS, REWARD, ROLLOUTS)
TASKS = (LANGUAGE_MODEL, SEQ2SEQ, IMAGE_TEXT, AUDIO_TEXT, EMBEDDING, SPEECH, *HEADED, *COMPARED)
NEW_HEAD = (*HEADED, REWARD)
NO_PROMPTS = (*NEW_HEAD, *MULTIMODAL, EMBEDDING, SPEECH)  # whose models do not answer a text


def check_task(task: str) -> None:
    """Raise a PeftcoreError unless `task` is one of `TASKS`."""
    if task not in TASKS:
        raise PeftcoreError(f"--task must be one of {', '.join(TASKS)}, found '{task}'")
