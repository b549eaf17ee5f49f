"""How many example configs of another program have a counterpart, by the tables of docs/coming-from.

    python benchmarks/coming_from.py PROGRAM CHECKOUT

PROGRAM is axolotl, llama-factory or torchtune, CHECKOUT a folder with its repository. A config that trains an adapter
is *whole* if the page's first tables have each of its keys that asks for something; *partly* if some are in the table
"What is not here", which says what to do instead; else *unknown*, which is a gap of the page.
"""

import collections
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = {"axolotl": "examples", "llama-factory": "examples", "torchtune": "recipes/configs"}
OPENED = ("datasets", "test_datasets", "peft_config", "quant_config", "model", "tokenizer", "checkpointer", "dataset")
OPENED += ("dataset_val", "loss", "optimizer", "lr_scheduler")  # tables whose keys are options, too
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


def main(program: str, checkout: Path) -> None:
    has, has_not = tables((ROOT / f"docs/coming-from/{program}.md").read_text(encoding="utf-8"))
    known = {name.partition(": ")[0] for name in has | has_not}
    counts, gaps, missing = (collections.Counter[str]() for _ in range(3))
    for file in sorted((checkout / EXAMPLES[program]).rglob("*.y*ml")):
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict) or not is_adapter(config):
            continue
        pairs = {f"{key}: {value}": key for key, value in asked(config)}
        refused = {key for pair, key in pairs.items() if pair in has_not or (key in has_not and pair not in has)}
        unknown = set(pairs.values()) - known
        counts["unknown" if unknown else "partly" if refused else "whole"] += 1
        gaps.update(unknown)
        missing.update(refused)
    print(f"{sum(counts.values())} configs: {dict(counts)}")
    print("not here:", ", ".join(f"{key} {count}" for key, count in missing.most_common()))
    print("not on the page:", ", ".join(f"{key} {count}" for key, count in gaps.most_common()) or "none")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
