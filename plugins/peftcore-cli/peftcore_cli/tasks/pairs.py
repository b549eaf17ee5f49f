"""Texts that belong together, as vectors (`--task pairs`): sentence pairs, triplets, and pairs with a score.

The vector of a text is pooled from the last hidden states and has length 1, so that a product is a cosine. For pairs
and triplets (van den Oord et al. 2018, arXiv 1807.03748; sentence-transformers' MultipleNegativesRankingLoss):

    loss = mean over anchors of -log softmax(20 cos(anchor, candidate))[its own positive]

where the candidates are the positives and negatives of the whole batch, except those with the text of the anchor's own
positive. For scored pairs the loss is the mean of (cos(one, other) - score)^2 (its CosineSimilarityLoss).
"""

from __future__ import annotations

import contextlib
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
_FILES = {"mean_tokens": "mean", "cls_token": "cls", "lasttoken": "last"}  # by their names in files


class Pairs(Task):
    """A base whose token vectors become one vector of a text."""

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
    no_chat = "makes vectors of texts. Use peftcore predict --data TEXTS.jsonl"

    def recognises(self, lines: FirstLines) -> bool:
        return not lines.are_labelled and lines.media is None and any(lines.have(*keys) for keys in self.keys)

    def read_row(self, where: str, fields: dict[str, Any], keys: tuple[str, ...]) -> Row:
        """Return a pair, a triplet or a scored pair.

        Raises:
            PeftcoreError: a text is empty, or the score is not a number from -1 to 1; the message begins with `where`.
        """
        names = [key for key in keys if key != "score"]
        texts = [text_of(where, key, fields[key]) for key in names]
        empty = next((key for key, text in zip(names, texts, strict=True) if not text.strip()), None)
        if empty is not None:
            raise PeftcoreError(f"{where}: '{empty}' is empty")
        score: float | None = None
        if "score" in keys:
            score = data_labels.number(fields["score"])
            if score is None or not -1 <= score <= 1:
                raise PeftcoreError(
                    f"{where}: 'score' must be a number from -1 to 1, as cosines are, found "
                    f"{data_labels.short(fields['score'])}. Divide scores by the largest, such as 5"
                )
        return Row(where, texts[0], pair=texts[1], negative=texts[2] if len(texts) > 2 else None, label=score)

    def read_question(self, where: str, fields: dict[str, Any], about: AdapterTask) -> Row:
        if "text" not in fields:
            raise missing_key(where, fields, "text", self)
        return Row(where, text_of(where, "text", fields["text"]))

    def check_config(self, model: str, config: PretrainedConfig) -> None:
        if config.is_encoder_decoder:
            raise PeftcoreError(
                f"--task pairs needs an encoder or a decoder, found '{model}' ({config.model_type}), which has both. "
                "Use a model such as sentence-transformers/all-MiniLM-L6-v2"
            )

    def uses(self, weight: str) -> bool:
        return not weight.startswith("pooler.")

    def prepared(self, processor: Any, about: AdapterTask, base: str) -> AdapterTask:
        return replace(about, pooling=pooling_of(base, about.pooling or "auto"))

    def check_options(self, given: RunOptions, data: Sequence[str], *, continues: bool) -> None:
        if given.pooling != "auto" and continues:
            raise PeftcoreError(f"--pooling is the adapter's, found {given.pooling}. Leave it out")

    def check_examples(self, examples: Sequence[Example], what: str, batch_size: int | None = None) -> None:
        """Raise a PeftcoreError if every positive would be the only candidate of its anchor.

        Args:
            examples: pairs, triplets or scored pairs.
            what: which they are, in the message.
            batch_size: of training; None if all examples are candidates at once.
        """
        if examples[0]["labels"] is not None:
            return
        if batch_size == 1 and len(examples[0]["texts"]) == 2:
            raise PeftcoreError(
                "--task pairs learns from the other rows of a batch, found --batch-size 1 and rows without a negative. "
                "Use --batch-size 2 or more, or add negatives"
            )
        if len({tuple(ids) for example in examples for ids in example["texts"][1:]}) < 2:
            raise PeftcoreError(
                f"all {what} examples ({len(examples):,}) have one positive and no other text that could be the wrong "
                "answer. Add rows, or hold out several: --holdout 2, or --eval-data FILE"
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
        """Return examples of `texts`, the token ids of anchor, positive and (in triplets) negative, and `labels`.

        These are the score or None. A text longer than `max_length` is cut at the end.

        Raises:
            PeftcoreError: a text has no tokens.
        """
        examples, truncated = [], 0
        for row in rows:
            texts = [row.text, str(row.pair), *([row.negative] if row.negative is not None else [])]
            whole = processor(texts)["input_ids"]
            cut = processor(texts, truncation=True, max_length=max_length)["input_ids"]
            if not all(cut):
                raise PeftcoreError(f"{row.where}: a text has no tokens")
            truncated += any(len(ids) > max_length for ids in whole)
            examples.append({"texts": [list(ids) for ids in cut], "labels": row.label})
        return Encoded(examples, truncated)

    def collate(self, examples: Sequence[Example], processor: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return a batch with all texts in one: first the anchors, then the positives, then the negatives.

        `labels` [examples] are scores; without scores they are the indices of the positives, and `same` [examples,
        candidates] marks other candidates with the text of the positive.
        """
        columns = list(zip(*(example["texts"] for example in examples), strict=True))
        tensors = as_batch([ids for column in columns for ids in column], processor.pad_token_id or 0)
        if examples[0]["labels"] is not None:
            return {**tensors, "labels": torch.tensor([float(example["labels"]) for example in examples])}
        candidates = [tuple(ids) for column in columns[1:] for ids in column]
        own = torch.arange(len(examples))
        same = torch.tensor([[other == candidates[i] for other in candidates] for i in range(len(examples))])
        same[own, own] = False
        return {**tensors, "labels": own, "same": same}

    def trainer(
        self, arguments: dict[str, Any], settings: Settings, processor: Any, about: AdapterTask, teacher: Any = None
    ) -> Measuring:
        from peftcore_cli.training.trainers import MeasuringTrainer

        class EmbeddingTrainer(MeasuringTrainer):
            def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *_args: Any, **_kwargs: Any) -> Any:
                return loss(vectors(model, inputs, str(about.pooling)), inputs["labels"], inputs.get("same"))

        return EmbeddingTrainer(**arguments, data_collator=self.collator(processor))

    @contextlib.contextmanager
    def with_loss(self, model: nn.Module, about: AdapterTask) -> Iterator[None]:
        """Make `model` take batches of `collate` inside the block, and return their loss with its output.

        Methods that initialise from batches call the model itself, which has no loss for vectors.
        """
        now: list[dict[str, Any]] = []

        def take(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            now[:] = [kwargs]
            return args, {name: value for name, value in kwargs.items() if name not in ("labels", "same")}

        def give(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> Any:
            batch = now.pop()
            if "labels" in batch:
                found = pooled(output.last_hidden_state, batch["attention_mask"], str(about.pooling))
                output.loss = loss(found, batch["labels"], batch.get("same"))
            return output

        hooks = [
            model.register_forward_pre_hook(take, with_kwargs=True),
            model.register_forward_hook(give, with_kwargs=True),
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
        how: Evaluation,
        *,
        answers: bool = True,
        reference: Any = None,
    ) -> Metrics:
        """Return the loss over all examples at once, with recall@1 and the mean reciprocal rank, or correlations."""
        columns = list(zip(*(example["texts"] for example in examples), strict=True))
        texts = [ids for column in columns for ids in column]
        found = embedded(model, texts, how.processor.pad_token_id or 0, str(how.about.pooling), how.batch_size)
        batch = self.collate(examples, how.processor)
        labels, same = batch["labels"], batch.get("same")
        anchors, candidates = found[: len(labels)], found[len(labels) :]
        value = float(loss(found, labels, same))
        if same is None:
            cosines = (anchors * candidates).sum(-1).double()
            figures = {
                "spearman": metrics.pearson(metrics.ranks(cosines), metrics.ranks(labels.double())),
                "pearson": metrics.pearson(cosines, labels.double()),
            }
            return Metrics(value, len(examples), figures)
        scores = (anchors @ candidates.T).masked_fill(same, float("-inf"))
        # Candidates with an equal score count half: a constant model is at the middle rank.
        own = scores[torch.arange(len(labels)), labels][:, None]
        ranks = 1 + (scores > own).sum(1) + ((scores == own).sum(1) - 1) / 2
        named = {"recall_at_1": float((ranks == 1).double().mean()), "mrr": float((1 / ranks).mean())}
        return Metrics(value, len(examples), named)

    def step_of(self, examples: Sequence[Example], processor: Any) -> dict[str, Any]:
        return {"loss": "triplets"} if len(examples[0]["texts"]) > 2 else {}

    def predict(
        self, model: PreTrainedModel, rows: Sequence[Row], processor: Any, about: AdapterTask, *, answer_tokens: int
    ) -> list[dict[str, Any]]:
        """Return each text with its vector, of length 1."""
        ids = processor([row.text for row in rows], truncation=True, max_length=about.max_length)["input_ids"]
        empty = next((row for row, tokens in zip(rows, ids, strict=True) if not tokens), None)
        if empty is not None:
            raise PeftcoreError(f"{empty.where}: the text has no tokens")
        positions.check(model, max(map(len, ids)))
        found = embedded(model, ids, processor.pad_token_id or 0, str(about.pooling))
        return [
            {"text": row.text, "embedding": [round(each, 7) for each in vector.tolist()]}
            for row, vector in zip(rows, found, strict=True)
        ]

    def write_merged(self, folder: Path, model: PreTrainedModel, about: AdapterTask, base: str) -> None:
        write_pooling(folder, about.pooling or pooling_of(base), model.config.hidden_size)


def pooling_of(model: str, given: str = "auto") -> str:
    """Return how vectors are pooled: as given, otherwise as the base's sentence-transformers files say, else the mean.

    Raises:
        PeftcoreError: the pooling is unknown, or the base has layers after it.
    """
    if given != "auto":
        if given not in POOLINGS:
            raise PeftcoreError(f"--pooling must be one of auto, {', '.join(POOLINGS)}, found '{given}'")
        return given
    modules = _stored(model, "modules.json") or []
    kinds = [str(each.get("type", "")).rpartition(".")[2] for each in modules if isinstance(each, dict)]
    other = next((kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")), None)
    if other is not None:
        raise PeftcoreError(
            f"the base '{model}' computes vectors by a module {other}, which --task pairs does not have. Pass another "
            "base, or --pooling to leave the module out"
        )
    folder = next((each.get("path") for each in modules if str(each.get("type", "")).endswith("Pooling")), "1_Pooling")
    stored = _stored(model, f"{folder}/config.json") or {}
    mode = stored.get("pooling_mode")  # of newer files; older ones have a flag for each
    flags = [name.removeprefix(_FLAG) for name, on in stored.items() if on is True and name.startswith(_FLAG)]
    found = [_FILES.get(name, name) for name in ([mode] if isinstance(mode, str) else flags)]
    if not found:
        return "mean"
    if len(found) > 1 or found[0] not in POOLINGS:
        raise PeftcoreError(
            f"the base '{model}' pools by {' and '.join(found)}, and --task pairs by one of {', '.join(POOLINGS)}. "
            "Pass one of these: --pooling mean"
        )
    return found[0]


def _stored(model: str, name: str) -> Any:
    """Return a JSON file of a base, of a folder or the hub; None if it has none."""
    from transformers.utils import cached_file

    try:
        file = cached_file(
            model, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
        return None if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_pooling(folder: Path, pooling: str, width: int) -> None:
    """Write the files by which sentence-transformers, and `pooling_of`, know how a model's vectors are pooled."""
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate((("", "Transformer"), ("1_Pooling", "Pooling")))
    ]
    flags = {f"{_FLAG}{name}": how == pooling for name, how in _FILES.items()}
    (folder / "1_Pooling").mkdir()
    (folder / "modules.json").write_text(json.dumps(modules, indent=2) + "\n", encoding="utf-8")
    text = json.dumps({"word_embedding_dimension": width, **flags}, indent=2) + "\n"
    (folder / "1_Pooling" / "config.json").write_text(text, encoding="utf-8")


def as_batch(texts: Sequence[Sequence[int]], padding: int) -> dict[str, Tensor]:
    """Return texts as `input_ids` and `attention_mask`, [texts, length]."""
    length = max(map(len, texts))
    return {
        "input_ids": torch.tensor([[*ids, *[padding] * (length - len(ids))] for ids in texts]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in texts]),
    }


def pooled(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Return vectors of length 1, [texts, width], in float32, from hidden states [texts, length, width]."""
    states = states.float()
    if pooling == "cls":
        found = states[:, 0]
    elif pooling == "last":
        found = states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]
    else:
        weights = mask[..., None].float()
        found = (states * weights).sum(1) / weights.sum(1)
    return F.normalize(found, dim=-1)


def vectors(model: nn.Module, inputs: dict[str, Any], pooling: str) -> Tensor:
    """Return the vector of each text of a batch."""
    output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    return pooled(output.last_hidden_state, inputs["attention_mask"], pooling)


def loss(found: Tensor, labels: Tensor, same: Tensor | None) -> Tensor:
    """Return the loss of a batch of `collate` from its vectors."""
    anchors, candidates = found[: len(labels)], found[len(labels) :]
    if same is None:
        return F.mse_loss((anchors * candidates).sum(-1), labels.to(found))
    scores = SCALE * anchors @ candidates.T
    return F.cross_entropy(scores.masked_fill(same, float("-inf")), labels)


def embedded(
    model: nn.Module, texts: Sequence[Sequence[int]], padding: int, pooling: str, batch_size: int = 32
) -> Tensor:
    """Return the vectors of texts in their order, in batches of similar lengths, on the processor."""
    device = next(model.parameters()).device
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    parts = []
    with evaluating(model):
        for some in batched(order, batch_size):
            batch = as_batch([texts[i] for i in some], padding)
            parts.append(vectors(model, {name: value.to(device) for name, value in batch.items()}, pooling).cpu())
    found = torch.cat(parts)
    return found[torch.tensor(order).argsort()]
