"""Rows of a stage that builds a model for each: one that fails is a row, too, and the rest is measured."""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from card_stages.results import MEASURED, SKIPPED, Results


def options_of_stage() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True)
    return parser.parse_args()


def add_rows(
    stage: str, group: str, rows: Mapping[str, Callable[[], dict[str, float]]], results: Results, until: float
) -> None:
    """Measure the rows that `results` does not have, as long as it is not later than `until`."""
    known = results.names(stage)
    for name, measure in rows.items():
        if name in known or time.time() > until:
            continue
        began = time.time()
        try:
            values = measure()
        except torch.AcceleratorError:
            raise  # the card is unusable for this process
        except Exception as error:
            detail = f"{type(error).__name__}: {error}"[:500]
            results.add(stage, name, SKIPPED, time.time() - began, detail=detail, group=group)
        else:
            results.add(stage, name, MEASURED, time.time() - began, values=values, group=group)
        gc.collect()
        torch.cuda.empty_cache()
