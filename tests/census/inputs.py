"""What a model class expects of its input beyond what its forward's signature and its config say."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from census import image_inputs, sound_inputs  # noqa: F401  they register changes
from census.changes import CHANGES, of
from peftcore.model.inputs import BATCH, LENGTH, Facts, example_inputs


def inputs(name: str, model: Any) -> dict[str, Any]:
    """Keyword arguments for one small forward of the instance `model` of the class `name`."""
    facts = Facts(model, torch.device("cpu"))
    found = example_inputs(model)
    for pattern, change in CHANGES:
        if re.fullmatch(pattern, name):
            found = change(found, facts)
    return found


# Text


@of(".*ForMultipleChoice")
def _two_choices(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    """For each of two questions."""
    return {key: value.view(1, *value.shape) for key, value in found.items()}


@of(".*ForSequenceClassification")
def _pooled_at_the_last_eos(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    if facts.model.config.is_encoder_decoder:
        found["input_ids"][:, -1] = facts.model.config.eos_token_id
    return found


@of("LongformerForQuestionAnswering", "LongformerForMultipleChoice")
def _question_and_two_separators(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    found["input_ids"][..., [2, 3, -1]] = facts.model.config.sep_token_id
    return found


@of("SplinterForPreTraining")
def _with_a_question(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    found["input_ids"][:, 2] = facts.model.config.question_token_id
    return found


@of("Blt.*")
def _without_cache(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    """Making one needs a number of layers, which the config does not have."""
    return {**found, "use_cache": False}


@of("JevForDecision")
def _one_prompt_with_two_questions(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    marks, options, kinds = torch.tensor([[3, 6]]), torch.tensor([[2, 2]]), torch.tensor([[0, 1]])
    return {"input_ids": found["input_ids"][:1], "marks": marks, "num_options": options, "question_type_ids": kinds}


@of("Bros.*")
def _with_boxes_of_eight(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return {**found, "bbox": facts.floats(BATCH, LENGTH, facts.model.config.dim_bbox).abs()}


@of("TapasForQuestionAnswering")
def _cells(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    """All tokens are of one cell: what is of none is masked by a number that hides the others."""
    return {**found, "token_type_ids": facts.whole(1, BATCH, LENGTH, 7)}


@of("Udop.*")
def _with_boxes_of_tokens(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return {**found, "bbox": facts.floats(BATCH, LENGTH, 4).abs()}


@of("PerceiverForMaskedLM", "PerceiverForSequenceClassification")
def _tokens_as_inputs(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return {"inputs": facts.tokens(BATCH, LENGTH)}


@of("PerceiverModel")
def _vectors_as_inputs(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return {"inputs": facts.floats(BATCH, LENGTH, facts.model.config.d_model)}


@of("OneFormerForUniversalSegmentation")
def _a_task(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return {**found, "task_inputs": facts.tokens(BATCH, facts.model.config.task_seq_len)}


# Others


@of("TimesFmModelForPrediction", "TimesFmModel", "TimesFm2_5.*")
def _series(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    series = facts.floats(BATCH, facts.model.config.context_length)
    if type(facts.model).__name__ == "TimesFmModel":
        freq, padding = facts.whole(0, BATCH, 1), torch.zeros(series.shape, dtype=torch.long)
        return {"past_values": series, "past_values_padding": padding, "freq": freq}
    return {"past_values": list(series) if "ForPrediction" in type(facts.model).__name__ else series}


@of("BlipForQuestionAnswering")
def _answer(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return {**found, "decoder_input_ids": facts.tokens(BATCH, LENGTH)}


@of("Blip2QFormerModel")
def _states_of_an_image(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return {**found, "encoder_hidden_states": facts.floats(BATCH, 5, facts.model.config.encoder_hidden_size)}


@of("MuseGlimmerAssistantModel")
def _states_of_some_layers(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    states: Tensor = found["context_hidden_states"]
    return {**found, "context_hidden_states": facts.floats(*states.shape[:2], 4 * states.shape[2])}


@of("DecisionTransformerModel")
def _an_episode(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    config, shape = facts.model.config, (BATCH, LENGTH)
    return {
        "states": facts.floats(*shape, config.state_dim),
        "actions": facts.floats(*shape, config.act_dim),
        "returns_to_go": facts.floats(*shape, 1),
        "timesteps": torch.arange(LENGTH).expand(shape),
        "attention_mask": facts.whole(1, *shape),
    }
