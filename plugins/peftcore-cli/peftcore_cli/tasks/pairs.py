"""Text embeddings, trained on pairs, triplets or scored pairs (`--task pairs`).

The embedding of a text is pooled from the last hidden states and normalised, so that dot products are cosines. For
pairs and triplets (van den Oord et al. 2018, arXiv 1807.03748; sentence-transformers' MultipleNegativesRankingLoss):

    loss = mean over anchors of -log softmax(20 cos(anchor, candidate))[its own positive]

where the candidates are all positives and negatives of the batch, except candidates with the same text as the anchor's
positive. For scored pairs the loss is the mean of (cos(a, b) - score)^2 (CosineSimilarityLoss there).
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from peftcore.errors import PeftcoreError
from peftcore_cli.data import labels as data_labels
from peftcore_cli.data.first_lines import FirstLines
from peftcore_cli.data.labels import text_of
from peftcore_cli.data.row import Row
from peftcore_cli.settings import RunOptions, Settings
from peftcore_cli.tasks import metrics, positions
from peftcore_cli.tasks.encoded_examples import Encoded, Example
from peftcore_cli.tasks.evaluation_mode import batched, evaluating
from peftcore_cli.tasks.labelled import missing_key
from peftcore_cli.tasks.metrics import Metrics
from peftcore_cli.tasks.task import Evaluation, Task

if TYPE_CHECKING:
    from peftcore_cli.bases.adapter_folders import AdapterTask
    from peftcore_cli.training.trainers import Measuring

SCALE = 20.0
POOLINGS = ("mean", "cls", "last")
_FLAG = "pooling_mode_"
# {name in sentence-transformers' files: pooling}
_FILES = {"mean_tokens": "mean", "cls_token": "cls", "lasttoken": "last"}


class Pairs(Task):
    """A base whose hidden states are pooled to a text embedding."""

    name = "pairs"
    keys = (
        ("anchor", "positive", "negative"),
        ("anchor", "positive"),
        ("query", "positive", "negative"),
        ("query", "positive"),
        ("sentence1", "sentence2", "score"),
        ("text", "text_pair", "score"),
    )
    shown_keys = "anchor/positive, anchor/positive/negative or sentence1/sentence2/score"
    columns_example = "anchor=question,positive=answer"
    one_kind = predicts = examples_count = True
    model_class = "AutoModel"
    peft_task_type = "FEATURE_EXTRACTION"
    options = ("pooling",)
    divides_batches = answers_texts = generates = False
    figures = ("recall_at_1", "mrr", "spearman", "pearson")
    step_loss = "pairs"
    no_chat = "computes text embeddings. Use peftcore predict --data TEXTS.jsonl"

    def recognises(self, lines: FirstLines) -> bool:
        return not lines.are_labelled and lines.media is None and any(lines.have(*keys) for keys in self.keys)

    def read_row(self, location: str, fields: dict[str, Any], keys: tuple[str, ...]) -> Row:
        """Return a pair, a triplet or a scored pair.

        Raises:
            PeftcoreError: a text is empty, or the score is not a number from -1 to 1. The message begins with
                `location`.
        """
        names = [key for key in keys if key != "score"]
        texts = [text_of(location, key, fields[key]) for key in names]
        empty_key = next((key for key, text in zip(names, texts, strict=True) if not text.strip()), None)
        if empty_key is not None:
            raise PeftcoreError(f"{location}: '{empty_key}' is empty. Remove the row, or add a text")
        score: float | None = None
        if "score" in keys:
            score = data_labels.number(fields["score"])
            if score is None or not -1 <= score <= 1:
                raise PeftcoreError(
                    f"{location}: 'score' must be a number from -1 to 1, like a cosine, found "
                    f"{data_labels.short(fields['score'])}. Divide all scores by the highest possible score, such as "
                    "5"
                )
        return Row(location, texts[0], pair=texts[1], negative=texts[2] if len(texts) > 2 else None, label=score)

    def read_question(self, location: str, fields: dict[str, Any], about: AdapterTask) -> Row:
        if "text" not in fields:
            raise missing_key(location, fields, "text", self)
        return Row(location, text_of(location, "text", fields["text"]))

    def check_config(self, model: str, config: PretrainedConfig) -> None:
        if config.is_encoder_decoder:
            raise PeftcoreError(
                f"--task pairs does not support encoder-decoder models such as '{model}' ({config.model_type}). "
                "Use a model such as sentence-transformers/all-MiniLM-L6-v2"
            )

    def uses(self, weight: str) -> bool:
        return not weight.startswith("pooler.")

    def prepare(self, processor: Any, about: AdapterTask, base: str) -> AdapterTask:
        return replace(about, pooling=pooling_of(base, about.pooling or "auto"))

    def check_options(self, run_options: RunOptions, data: Sequence[str], *, continues: bool) -> None:
        if run_options.pooling != "auto" and continues:
            raise PeftcoreError(
                f"--pooling {run_options.pooling} cannot change the pooling of an existing adapter. Remove --pooling"
            )

    def check_examples(self, examples: Sequence[Example], subset: str, batch_size: int | None = None) -> None:
        """Raise a PeftcoreError if an anchor's only candidate is its positive.

        Args:
            examples: pairs, triplets or scored pairs.
            subset: name of the examples in messages, such as "training".
            batch_size: batch size of training; None for evaluation, where all examples are candidates.
        """
        if examples[0]["labels"] is not None:
            return
        if batch_size == 1 and len(examples[0]["texts"]) == 2:
            raise PeftcoreError(
                "--task pairs uses the other rows of a batch as negatives, so --batch-size 1 needs rows with a "
                "negative. Use --batch-size 2 or more, or add negatives"
            )
        if len({tuple(ids) for example in examples for ids in example["texts"][1:]}) < 2:
            raise PeftcoreError(
                f"all {len(examples):,} {subset} examples have the same positive, so there are no negatives. Add "
                "rows, or hold out several: --holdout 2, or --eval-data FILE"
            )

    def encode(
        self,
        rows: Sequence[Row],
        processor: PreTrainedTokenizerBase,
        max_length: int,
        labels: Sequence[str] = (),
        *,
        may_be_empty: bool = False,
    ) -> Encoded:
        """Encode rows as `texts`, the token ids of anchor, positive and (in triplets) negative, and `labels`.

        The label is the score or None. A text longer than `max_length` is truncated at the end.

        Raises:
            PeftcoreError: a text has no tokens.
        """
        examples, truncated_count = [], 0
        for row in rows:
            texts = [row.text, str(row.pair), *([row.negative] if row.negative is not None else [])]
            full_ids = processor(texts)["input_ids"]
            tokens = processor(texts, truncation=True, max_length=max_length)["input_ids"]
            if not all(tokens):
                raise PeftcoreError(f"{row.location}: a text has no tokens. Remove the row")
            truncated_count += any(len(ids) > max_length for ids in full_ids)
            examples.append({"texts": [list(ids) for ids in tokens], "labels": row.label})
        return Encoded(examples, truncated_count)

    def collate(self, examples: Sequence[Example], processor: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return one batch of all texts: first the anchors, then the positives, then the negatives.

        `labels` [examples] are the scores, or without scores the indices of the positives. `same` [examples,
        candidates] marks other candidates with the same text as the positive.
        """
        texts = _all_texts(examples)
        tensors = as_batch(texts, processor.pad_token_id or 0)
        if examples[0]["labels"] is not None:
            return {**tensors, "labels": torch.tensor([float(example["labels"]) for example in examples])}
        candidates = texts[len(examples) :]
        positives = candidates[: len(examples)]
        indices = torch.arange(len(examples))
        is_same_text = torch.tensor([[candidate == positive for candidate in candidates] for positive in positives])
        is_same_text[indices, indices] = False
        return {**tensors, "labels": indices, "same": is_same_text}

    def trainer(
        self, arguments: dict[str, Any], settings: Settings, processor: Any, about: AdapterTask, teacher: Any = None
    ) -> Measuring:
        from peftcore_cli.training.trainers import MeasuringTrainer

        class EmbeddingTrainer(MeasuringTrainer):
            def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *_args: Any, **_kwargs: Any) -> Any:
                embeddings = compute_embeddings(model, inputs, str(about.pooling))
                return loss(embeddings, inputs["labels"], inputs.get("same"))

        return EmbeddingTrainer(**arguments, data_collator=self.collator(processor))

    @contextlib.contextmanager
    def with_loss(self, model: nn.Module, about: AdapterTask) -> Iterator[None]:
        """Inside the block, let `model` take batches of `collate` and add the loss to its output.

        Methods that initialise from data call the model directly, and the model has no loss for embeddings.
        """
        pending: list[dict[str, Any]] = []

        def remove_labels(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            pending[:] = [kwargs]
            return args, {name: value for name, value in kwargs.items() if name not in ("labels", "same")}

        def add_loss(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> Any:
            batch = pending.pop()
            if "labels" in batch:
                embeddings = pool(output.last_hidden_state, batch["attention_mask"], str(about.pooling))
                output.loss = loss(embeddings, batch["labels"], batch.get("same"))
            return output

        hooks = [
            model.register_forward_pre_hook(remove_labels, with_kwargs=True),
            model.register_forward_hook(add_loss, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def measure(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        evaluation: Evaluation,
        *,
        answers: bool = True,
        reference: Any = None,
    ) -> Metrics:
        """Return the loss over all examples at once, with recall@1 and mean reciprocal rank, or with correlations."""
        padding, pooling = evaluation.processor.pad_token_id or 0, str(evaluation.about.pooling)
        embeddings = embed(model, _all_texts(examples), padding, pooling, evaluation.batch_size)
        batch = self.collate(examples, evaluation.processor)
        labels, is_same_text = batch["labels"], batch.get("same")
        anchors, candidates = embeddings[: len(labels)], embeddings[len(labels) :]
        value = float(loss(embeddings, labels, is_same_text))
        if is_same_text is None:
            cosines = (anchors * candidates).sum(-1).double()
            figures = {
                "spearman": metrics.pearson(metrics.ranks(cosines), metrics.ranks(labels.double())),
                "pearson": metrics.pearson(cosines, labels.double()),
            }
            return Metrics(value, len(examples), figures)
        scores = (anchors @ candidates.T).masked_fill(is_same_text, float("-inf"))
        # Candidates with an equal score count half, so that a constant model gets the middle rank.
        own_scores = scores[torch.arange(len(labels)), labels][:, None]
        ranks = 1 + (scores > own_scores).sum(1) + ((scores == own_scores).sum(1) - 1) / 2
        figures = {"recall_at_1": float((ranks == 1).double().mean()), "mrr": float((1 / ranks).mean())}
        return Metrics(value, len(examples), figures)

    def step_of(self, examples: Sequence[Example], processor: Any) -> dict[str, Any]:
        return {"loss": "triplets"} if len(examples[0]["texts"]) > 2 else {}

    def predict(
        self, model: PreTrainedModel, rows: Sequence[Row], processor: Any, about: AdapterTask, *, answer_tokens: int
    ) -> list[dict[str, Any]]:
        """Return each text with its embedding, of length 1."""
        ids = processor([row.text for row in rows], truncation=True, max_length=about.max_length)["input_ids"]
        empty_row = next((row for row, tokens in zip(rows, ids, strict=True) if not tokens), None)
        if empty_row is not None:
            raise PeftcoreError(f"{empty_row.location}: the text has no tokens. Remove the row")
        positions.check(model, max(map(len, ids)))
        embeddings = embed(model, ids, processor.pad_token_id or 0, str(about.pooling))
        return [
            {"text": row.text, "embedding": [round(number, 7) for number in vector.tolist()]}
            for row, vector in zip(rows, embeddings, strict=True)
        ]

    def write_merged(self, folder: Path, model: PreTrainedModel, about: AdapterTask, base: str) -> None:
        write_pooling(folder, about.pooling or pooling_of(base), model.config.hidden_size)


def _all_texts(examples: Sequence[Example]) -> list[list[int]]:
    """Return the token ids of all anchors, then of all positives, then (of triplets) of all negatives."""
    columns = zip(*(example["texts"] for example in examples), strict=True)
    return list(itertools.chain.from_iterable(columns))


def pooling_of(model: str, pooling: str = "auto") -> str:
    """Return `pooling`, or with `auto` the pooling in the base's sentence-transformers files, by default the mean.

    Raises:
        PeftcoreError: the pooling is unknown, or the base has layers after the pooling.
    """
    if pooling != "auto":
        if pooling not in POOLINGS:
            raise PeftcoreError(f"--pooling must be one of auto, {', '.join(POOLINGS)}, found '{pooling}'")
        return pooling
    poolings = _recorded_poolings(model)
    if not poolings:
        return "mean"
    if len(poolings) > 1 or poolings[0] not in POOLINGS:
        raise PeftcoreError(
            f"the base '{model}' uses {' and '.join(poolings)} pooling, but --task pairs only supports "
            f"{', '.join(POOLINGS)}. Choose one, such as --pooling mean"
        )
    return poolings[0]


def _recorded_poolings(model: str) -> list[str]:
    """Return the poolings in the base's sentence-transformers files; empty without such files.

    Raises:
        PeftcoreError: the base has layers after the pooling.
    """
    folder = "1_Pooling"
    for module in _load_json(model, "modules.json") or []:
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind not in ("Transformer", "Pooling", "Normalize"):
            raise PeftcoreError(
                f"the base '{model}' computes embeddings with a module {kind}, which --task pairs does not support. "
                "Pass another base, or pass --pooling to skip the module"
            )
        if kind == "Pooling":
            folder = module.get("path")
    config = _load_json(model, f"{folder}/config.json") or {}
    mode = config.get("pooling_mode")
    if isinstance(mode, str):
        names = [mode]
    else:  # older files have a flag for each pooling
        names = [name.removeprefix(_FLAG) for name, on in config.items() if on is True and name.startswith(_FLAG)]
    return [_FILES.get(name, name) for name in names]


def _load_json(model: str, name: str) -> Any:
    """Return the contents of a JSON file of a base (a folder or a hub id), or None if it does not exist."""
    from transformers.utils import cached_file

    try:
        file = cached_file(
            model, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
        return None if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_pooling(folder: Path, pooling: str, width: int) -> None:
    """Write the files from which sentence-transformers and `pooling_of` read the pooling of a model."""
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate((("", "Transformer"), ("1_Pooling", "Pooling")))
    ]
    flags = {f"{_FLAG}{name}": value == pooling for name, value in _FILES.items()}
    (folder / "1_Pooling").mkdir()
    (folder / "modules.json").write_text(json.dumps(modules, indent=2) + "\n", encoding="utf-8")
    text = json.dumps({"word_embedding_dimension": width, **flags}, indent=2) + "\n"
    (folder / "1_Pooling" / "config.json").write_text(text, encoding="utf-8")


def as_batch(texts: Sequence[Sequence[int]], padding: int) -> dict[str, Tensor]:
    """Return texts as padded `input_ids` and `attention_mask`, [texts, length]."""
    length = max(map(len, texts))
    return {
        "input_ids": torch.tensor([[*ids, *[padding] * (length - len(ids))] for ids in texts]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in texts]),
    }


def pool(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Pool hidden states [texts, length, width] to normalised embeddings [texts, width] in float32."""
    states = states.float()
    if pooling == "cls":
        embeddings = states[:, 0]
    elif pooling == "last":
        embeddings = states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]
    else:
        weights = mask[..., None].float()
        embeddings = (states * weights).sum(1) / weights.sum(1)
    return F.normalize(embeddings, dim=-1)


def compute_embeddings(model: nn.Module, inputs: dict[str, Any], pooling: str) -> Tensor:
    """Return the embedding of each text of a batch, [texts, width]."""
    output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    return pool(output.last_hidden_state, inputs["attention_mask"], pooling)


def loss(embeddings: Tensor, labels: Tensor, is_same_text: Tensor | None) -> Tensor:
    """Return the loss of a batch of `collate` from its embeddings."""
    anchors, candidates = embeddings[: len(labels)], embeddings[len(labels) :]
    if is_same_text is None:
        return F.mse_loss((anchors * candidates).sum(-1), labels.to(embeddings))
    scores = SCALE * anchors @ candidates.T
    return F.cross_entropy(scores.masked_fill(is_same_text, float("-inf")), labels)


def embed(model: nn.Module, texts: Sequence[Sequence[int]], padding: int, pooling: str, batch_size: int = 32) -> Tensor:
    """Return the embeddings of texts in order, on the CPU; batches have texts of similar lengths."""
    device = next(model.parameters()).device
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    parts = []
    with evaluating(model):
        for batch_indices in batched(order, batch_size):
            batch = as_batch([texts[i] for i in batch_indices], padding)
            inputs = {name: value.to(device) for name, value in batch.items()}
            parts.append(compute_embeddings(model, inputs, pooling).cpu())
    embeddings = torch.cat(parts)
    return embeddings[torch.tensor(order).argsort()]
