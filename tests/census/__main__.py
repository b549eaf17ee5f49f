"""Every model class of transformers under every method: `make census`, or `python -m census --help` from tests/."""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import transformers

from census import report
from census.check import FIELDS
from census.instances import classes
from census.worker import Worker

ROOT = Path(__file__).parent.parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(prog="census", description=__doc__)
    parser.add_argument("--only", help="regular expression of class names")
    parser.add_argument("--sample", type=int, help="so many classes, drawn by --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", default=",".join(FIELDS))
    parser.add_argument("--rows", type=Path, default=ROOT / ".census" / "rows.jsonl", help="kept here; a run goes on")
    parser.add_argument("--fresh", action="store_true", help="forget earlier rows")
    parser.add_argument("--again", help="also those whose row matches this regular expression, such as crash|wrong")
    parser.add_argument("--seconds", type=float, default=120, help="for one class")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--write", type=Path, help="write this page and known.json, once every class has a row")
    args = parser.parse_args()
    types = classes()
    names = [name for name in types if not args.only or re.search(args.only, name)]
    if args.sample:
        names = random.Random(args.seed).sample(names, min(args.sample, len(names)))
    args.rows.parent.mkdir(exist_ok=True, parents=True)
    if args.fresh:
        args.rows.unlink(missing_ok=True)
    done = {row["class"] for row in read(args.rows) if not (args.again and re.search(args.again, json.dumps(row)))}
    todo = [name for name in names if name not in done]
    began = time.monotonic()
    worker = Worker([m for m in args.methods.split(",") if m], args.seconds)
    made_with = {"commit": commit(), "transformers": transformers.__version__}
    for i, name in enumerate(ordered(todo, types), 1):
        row = worker.examine(name) | made_with
        with args.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if args.verbose:
            print(json.dumps(row, indent=1))
        left = (time.monotonic() - began) / i * (len(todo) - i)
        print(
            f"{i + len(names) - len(todo)}/{len(names)} {name}: {summary(row)} ({left / 60:.0f} min left)", flush=True
        )

    worker.close()
    if args.write:
        write(args.write, [row for row in read(args.rows) if row["class"] in types], len(types))


def write(page: Path, rows: list[dict], listed: int) -> None:
    """Write the page and known.json, unless rows of a part alone would replace those of all classes."""
    if len(rows) < listed:
        print(f"{page} stays as it is: {len(rows)} of {listed} classes have rows. `make census` examines the others.")
        return
    page.parent.mkdir(exist_ok=True, parents=True)
    page.write_text(report.markdown(rows))
    report.write_known(rows)


def commit() -> str:
    """Return the examined commit as git describes it, with -dirty if there are uncommitted changes."""
    described = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return described.stdout.strip() or "no commit"


def ordered(names: list[str], types: dict[str, str]) -> list[str]:
    """Two classes of each model type first, then two more of each, so that a run that is cut short has seen all."""
    seen: Counter[str] = Counter()
    ranks = {}
    for name in names:
        ranks[name] = seen[types[name]] // 2
        seen[types[name]] += 1
    return sorted(names, key=lambda name: (ranks[name], types[name]))


def read(path: Path) -> list[dict]:
    """The rows of earlier runs, the last one of each class."""
    lines = path.read_text().splitlines() if path.exists() else []
    return list({row["class"]: row for row in map(json.loads, lines)}.values())


def summary(row: dict) -> str:
    if "none" in row:
        return f"no instance, {row['none'][:100]}"
    kinds = [f"{method} {outcome['kind']}" for method, outcome in row["outcomes"].items()]
    return f"{', '.join(kinds)} in {row['seconds']} s"


if __name__ == "__main__":
    sys.exit(main())
