"""A config that is being converted: what was taken from it, and what it became."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from peftcore.plugin import PeftcoreError

IMAGES = (
    "data: rows are conversations that name the files of their images (docs/guides/image-chats.md); save images of a "
    "hub data set as files"
)
AUDIO = (
    "data: rows are conversations that name the files of their audio and images (docs/guides/image-chats.md); save "
    "those of a hub data set as files"
)
OWN_CODE = (
    "trust_remote_code: nothing for models of transformers; for others read the code of their repository, and pass "
    "--trust-remote-code"
)
SEEING = "for answers to images, --task image-dpo, or TRL's trainers with peftcore.apply"
_NOT_ASKED: tuple[Any, ...] = (None, False, "", [], {}, 0, "disabled")


def asks(value: Any) -> bool:
    """Return whether a value asks for something; keys with others are as good as absent."""
    return value not in _NOT_ASKED and not (isinstance(value, dict) and value.get("enabled") is False)


def keyed(said: Mapping[str, str]) -> dict[str, str]:
    """Return {key: what to do instead} of {what to do instead: keys}."""
    return {key: instead for instead, keys in said.items() for key in keys.split()}


class Reading:
    """A config of another program, and the options that it has become.

    Args:
        config: the config.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self._taken: set[str] = set()
        self.command = "train"  # what the config asks for: a command of `peftcore`
        self.options: dict[str, Any] = {}  # of that command
        self.fields: dict[str, Any] = {}  # of the method's config
        self.left_out: dict[str, str] = {}  # {key: what to do instead}
        self.to_do: list[str] = []  # what the user must look at or write

    def take(self, key: str, default: Any = None) -> Any:
        """Return the value of a key, `default` if it is absent or null, and count the key as converted."""
        self._taken.add(key)
        value = self._config.get(key)
        return default if value is None else value

    def has(self, key: str) -> bool:
        """Return whether the config asks for something by this key."""
        return asks(self._config.get(key))

    def part(self, key: str) -> Reading:
        """Return a table of the config, empty if there is none, whose options and fields are those of the whole."""
        value = self.take(key)
        part = Reading(value if isinstance(value, dict) else {})
        part.options, part.fields, part.left_out, part.to_do = self.options, self.fields, self.left_out, self.to_do
        return part

    def option(self, key: str, option: str, kind: type | None = None) -> None:
        """Make the value of a key, if there is one, the value of an option, converted to `kind`."""
        value = self.take(key)
        if value is not None:
            self.options[option] = value if kind is None else self.number(key, value, kind)

    def field(self, key: str, field: str) -> None:
        """Make the value of a key, if it asks for something, the value of a field of the method."""
        value = self.take(key)
        if asks(value):
            self.fields[field] = value

    def leave_out(self, key: str, instead: str) -> None:
        """Note that a key has no counterpart."""
        self.left_out[key] = instead

    def refuse(self, key: str, instead: str) -> None:
        """Raise a PeftcoreError for a key without which the training would be another one."""
        raise PeftcoreError(
            f"'{key}: {self._config.get(key)}' has no counterpart in peftcore {self.command}. Instead: {instead}"
        )

    def line(self) -> str:
        """Return the command with its options, as a shell reads it."""
        words = ["peftcore", self.command]
        for option, value in self.options.items():
            for each in value if isinstance(value, list) else [value]:
                words += [f"--{option.replace('_', '-')}", str(each)]
        return shlex.join(words)

    def left(self) -> Iterator[str]:
        """Yield the keys that ask for something and were not taken."""
        yield from (key for key, value in self._config.items() if key not in self._taken and asks(value))

    @staticmethod
    def number(key: str, value: Any, kind: type) -> Any:
        """Return the value of a key as a number."""
        try:
            return kind(value)  # YAML reads 1e-4 as a text
        except (TypeError, ValueError):
            raise PeftcoreError(f"'{key}' must be a number, found {value!r}") from None


def judged(reading: Reading, key: str, task: str) -> None:
    """Set the task of a training on judged answers, to conversations with images if these are what is read.

    Raises:
        PeftcoreError: only DPO reads images.
    """
    if reading.options.get("task") not in ("image-text", "audio-text"):
        reading.options["task"] = task
    elif task == "dpo" and reading.options["task"] == "image-text":
        reading.options["task"] = "image-dpo"
    else:
        reading.refuse(key, SEEING)


def optimizer(reading: Reading, key: str, name: str) -> None:
    """Set `optim`: those of 8 and 4 bits, which need bitsandbytes or torchao, become peftcore's own."""
    low = name.lower()
    if "8bit" in low or "4bit" in low:
        reading.options["optim"] = "paged_adamw_8bit"
    elif name:
        reading.options["optim"] = name
    if "4bit" in low:
        reading.leave_out(key, "paged_adamw_8bit, with 8 bits")


def dataset(path: str, split: str | None = None, config: str | None = None) -> str:
    """Return a data set as `--data` names it."""
    if config:
        return f"{path}@{config}/{split or 'train'}"
    return f"{path}@{split}" if split and split != "train" else path


def names_of(value: Any) -> list[str]:
    """Return the names in a list, or in a text that separates them by commas."""
    return [str(name).strip() for name in (value if isinstance(value, list) else str(value).split(","))]


def held_out(reading: Reading, share: Any) -> None:
    """Set `holdout`; one example at least is held out, of answers marked as good or bad two."""
    reading.options["holdout"] = float(share) or (2 if reading.options.get("task") == "kto" else 1)


def single(values: list[str]) -> str | list[str]:
    """Return the value of a list that has one."""
    return values[0] if len(values) == 1 else values


def only_first(reading: Reading, key: str, values: list[Any]) -> Any:
    """Return the first of several data sets to evaluate on, and note that the others are left out."""
    if len(values) > 1:
        reading.leave_out(key, "one file with all examples: --eval-data FILE")
    return values[0]


def _steps_between(reading: Reading, key: str, option: str) -> None:
    """Set a number of steps; a number below 1 is a share of all steps, which no option takes."""
    value = reading.take(key)
    if asks(value) and reading.number(key, value, float) < 1:
        reading.leave_out(key, f"a number of steps: --{option.replace('_', '-')} N")
    elif asks(value):
        reading.options[option] = reading.number(key, value, int)


def training(reading: Reading, *, epochs: str, scheduler: str, patience: str) -> None:
    """Take the keys that are named after transformers' TrainingArguments; three of them have other names, as given."""
    reading.option("gradient_accumulation_steps", "grad_accum", int)
    steps = reading.number("max_steps", reading.take("max_steps", 0), int)
    if steps > 0:
        reading.options["steps"] = steps
        reading.take(epochs)
    else:
        reading.option(epochs, "epochs", float)
    reading.option("learning_rate", "lr", float)
    reading.option(scheduler, "scheduler")
    reading.option("warmup_ratio", "warmup", float)
    if reading.has("warmup_steps") or not reading.has("warmup_ratio"):  # 0 steps leave the ratio in force
        reading.option("warmup_steps", "warmup", float)
    reading.take("warmup_steps")
    reading.option("weight_decay", "weight_decay", float)
    reading.option("max_grad_norm", "max_grad_norm", float)
    reading.option("seed", "seed", int)
    _steps_between(reading, "eval_steps", "eval_every")
    keep = reading.take("save_total_limit")
    if asks(keep):
        reading.options["keep"] = max(2, reading.number("save_total_limit", keep, int))
    without_improvement, best = reading.take(patience), reading.take("load_best_model_at_end")
    if asks(without_improvement):
        reading.options["patience"] = reading.number(patience, without_improvement, int)
    elif best:
        reading.options["load_best"] = True
    if reading.options.keys() & {"patience", "load_best"}:  # which save at each evaluation
        reading.take("save_steps")
    else:
        _steps_between(reading, "save_steps", "save_every")
    if reading.take("resume_from_checkpoint"):
        reading.leave_out("resume_from_checkpoint", "--resume continues a run of peftcore")
