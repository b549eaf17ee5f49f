"""Count of other programs' example configs that have a counterpart, by docs/coming-from and by `convert-config`.

    python benchmarks/coming_from.py CHECKOUTS [--write FILE] [--page]

CHECKOUTS is a folder with the repositories axolotl, llama-factory and torchtune. A config that trains an adapter is
*whole* if the page's first tables have each of its keys that asks for something; *partly* if some are in the table
"What is not here", which says what to do instead; else *unknown*, which is a gap of the page. `peftcore convert-config`
converts it whole, without some keys, or refuses it. --write writes the distinct conversions, which
plugins/peftcore-convert-config/tests trains for two steps each; --page writes docs/coming-from/examples.md, the outcome
of each config by its name.
"""

import argparse
import collections
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from peftcore_convert_config import programs

from peftcore import PeftcoreError

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = {"axolotl": "examples", "llama-factory": "examples", "torchtune": "recipes/configs"}
NAMES = {"axolotl": "axolotl", "llama-factory": "LLaMA-Factory", "torchtune": "torchtune"}
DATES = {"axolotl": "July 2026", "llama-factory": "August 2026", "torchtune": "April 2026"}
HEAD = """# Example configs of other programs

What `peftcore convert-config` makes of each example config that trains an adapter: the whole training; the training
without keys that the pages on [axolotl](axolotl.md), [LLaMA-Factory](llama-factory.md) and [torchtune](torchtune.md)
explain ("What is not here"); or an error that says what to do instead. Conversions that differ in more than numbers
train for two steps on tiny models in `make test-all`. Written by `benchmarks/coming_from.py --page`."""
OPENED = ("datasets", "test_datasets", "peft_config", "quant_config", "model", "tokenizer", "checkpointer", "dataset")
OPENED += ("dataset_val", "loss", "optimizer", "lr_scheduler")  # tables whose keys are options, too
ALIKE = ("epochs", "steps", "eval_every", "save_every", "keep", "weight_decay", "warmup")  # train in the same way
PLACES = ("model", "teacher", "data", "eval_data", "output", "columns", "seed", "report_to")  # not those of a tiny run
NOT_ASKED = (None, False, "", [], {}, 0, "disabled")


def is_adapter(config: dict[str, Any]) -> bool:
    """Return whether a config trains an adapter."""
    model = config.get("model")
    if isinstance(model, dict):
        return "lora_rank" in model
    kinds = config.get("adapter"), config.get("finetuning_type"), (config.get("peft_config") or {}).get("name")
    return any(kind in ("lora", "qlora", "oft") for kind in kinds)


def asked(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the keys that ask for something, with their values as text."""
    for key, value in config.items():
        if value in NOT_ASKED or (isinstance(value, dict) and value.get("enabled") is False):
            continue
        yield key, str(value)
        if key in OPENED:
            for each in value if isinstance(value, list) else [value]:
                yield from asked(each) if isinstance(each, dict) else ()


def tables(page: str) -> tuple[set[str], set[str]]:
    """Return the keys of a page's tables, those that have a counterpart and those that do not.

    A key may be followed by values, as in `rl: dpo` | `kto`, and then stands for these values only.
    """
    found = []
    for part in page.partition("## What is not here")[::2]:
        keys = set()
        for cell in re.findall(r"^\| (`.*?) \| ", part.replace(r"\|", "/"), re.MULTILINE):
            for several in cell.split(", "):
                first, *others = re.findall(r"`([^`]+)`", several) or [several]
                key = first.partition(": ")[0]
                keys |= {first, *(f"{key}: {value}" for value in others)}
        found.append(keys)
    return found[0], found[1]


def count(program: str, configs: dict[str, dict[str, Any]]) -> None:
    """Print what the page of a program has."""
    has, has_not = tables((ROOT / f"docs/coming-from/{program}.md").read_text(encoding="utf-8"))
    known = {name.partition(": ")[0] for name in has | has_not}
    counts, gaps, missing = (collections.Counter[str]() for _ in range(3))
    for config in configs.values():
        pairs = {f"{key}: {value}": key for key, value in asked(config)}
        refused = {key for pair, key in pairs.items() if pair in has_not or (key in has_not and pair not in has)}
        unknown = set(pairs.values()) - known
        counts["unknown" if unknown else "partly" if refused else "whole"] += 1
        gaps.update(unknown)
        missing.update(refused)
    print(f"{program}: {len(configs)} configs, by the page: {dict(counts)}")
    print("  not here:", ", ".join(f"{key} {count}" for key, count in missing.most_common()))
    print("  not on the page:", ", ".join(f"{key} {count}" for key, count in gaps.most_common()) or "none")


def convert(program: str, configs: dict[str, dict[str, Any]], distinct: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Print what is converted, add each conversion that is not there yet, and return the outcome of each config."""
    outcomes = {}
    counts, reasons, left_out = (collections.Counter[str]() for _ in range(3))
    for name, config in configs.items():
        try:
            found = programs.convert(config)
        except PeftcoreError as error:
            counts["refused"] += 1
            key, value, instead = re.findall(r"^'(\w+): (.*)' has no counterpart .* Instead: (.*)$", str(error))[0]
            reasons[key] += 1
            shown = value if re.fullmatch(r"[\w./-]+", value) else "..."
            why = f"not here: {instead[6:]}" if instead.startswith("none: ") else f"instead: {instead}"
            outcomes[name] = f"refused for `{key}: {shown}`; {why}"
            continue
        outcomes[name] = ("without " if found.left_out else "whole") + ", ".join(f"`{key}`" for key in found.left_out)
        counts["without some keys" if found.left_out else "whole"] += 1
        left_out.update(list(found.left_out))
        if found.command != "train":
            outcomes[name] += f" (`peftcore {found.command}`)"
            continue
        options = {key: value for key, value in found.options.items() if key not in PLACES}
        packed = re.findall(
            "GPTQ|AWQ|NVFP4|AQLM", str(found.options["model"]).upper()
        )  # such bases are read in another way
        shape: list[Any] = [
            {key: None if type(value) in (int, float) else value for key, value in each.items() if key not in ALIKE}
            for each in (options, found.fields)
        ] + packed
        once = {"configs": 0, "example": f"{program}/{name}", "model": found.options["model"]}
        once |= {"options": options, "set": found.fields}
        distinct.setdefault(json.dumps(shape, sort_keys=True), once)["configs"] += 1
    print("  converted:", dict(counts))
    print("  refused for:", ", ".join(f"{key} {count}" for key, count in reasons.most_common()) or "nothing")
    print("  left out:", ", ".join(f"{key} {count}" for key, count in left_out.most_common()) or "nothing")
    return outcomes


def page(outcomes: dict[str, dict[str, str]]) -> str:
    """Return the page with a table for each program."""
    parts = [HEAD]
    for program, found in outcomes.items():
        rows = [f"| `{name.removeprefix(EXAMPLES[program])[1:]}` | {outcome} |" for name, outcome in found.items()]
        kinds = collections.Counter(outcome.partition(" ")[0] for outcome in found.values())
        counted = f"{len(found)} in `{EXAMPLES[program]}` ({DATES[program]}): {kinds['whole']} whole, "
        counted += f"{kinds['without']} without some keys, {kinds['refused']} refused."
        parts.append(
            f"## {NAMES[program]}\n\n{counted}\n\n| config | `convert-config` |\n|---|---|\n" + "\n".join(rows)
        )
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkouts", type=Path)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--page", action="store_true")
    given = parser.parse_args()
    distinct: dict[str, dict[str, Any]] = {}
    outcomes = {}
    for program, folder in EXAMPLES.items():
        root = given.checkouts / program
        read = {
            file: yaml.safe_load(file.read_text(encoding="utf-8")) for file in sorted((root / folder).rglob("*.y*ml"))
        }
        configs = {
            str(file.relative_to(root)): config
            for file, config in read.items()
            if isinstance(config, dict) and is_adapter(config)
        }
        count(program, configs)
        outcomes[program] = convert(program, configs, distinct)
    print(f"{len(distinct)} distinct conversions, numbers apart")
    if given.page:
        (ROOT / "docs/coming-from/examples.md").write_text(page(outcomes), encoding="utf-8")
    if given.write:
        lines = ",\n".join(json.dumps(each) for each in distinct.values())
        given.write.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
