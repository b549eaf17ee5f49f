"""Count the Python calls of `apply`, a forward pass, `save`, `load` and `merge`, with Hugging Face PEFT's next to them.

    python benchmarks/trace.py [--by file|function] [--of load] [--ours]

A two-layer Llama with LoRA on all linear layers, warm: each action has run before in this process, and the forward
pass on this model. Counted are calls of functions that the package under test defines (peftcore and its plugins, or
peft), the files in which they are, and the largest number of them that are on the stack together. The counts are the
same in every run. `--by` lists where the calls of one action are. The script fails if a count exceeds its limit.

Of the forward's stack, four frames are the lock's: one for each module that contains adapted ones (the model, its
backbone, a layer, its attention), since each of them may be called alone. The other five are as many as PEFT's: the
layer, the link of its chain, the adapter, the operator, and a check of the operator's. Its eight files are these, the
lock itself, and the output head. `apply` and `load` enter files of more than 10,000 and 14,000 lines, so that fewer
than 27 and 36 files would be longer than 400.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import peftcore

logging.disable(logging.WARNING)
warnings.simplefilter("ignore")
TOKENS = torch.tensor([[5, 17, 3, 60]])
TARGETS = "all-linear"
# Limits: calls, files, depth of the stack.
LIMITS = {
    "apply": (4_000, 49, 16),
    "forward": (150, 8, 9),
    "save": (1_500, None, None),
    "load": (4_500, 65, 20),
    "merge": (2_000, None, None),
}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=96, **sizes)).eval()


class Trace:
    """Calls of functions in files whose path has one of `parts`."""

    def __init__(self, *parts: str) -> None:
        self.parts = parts
        self.calls: Counter[tuple[str, str]] = Counter()
        self.depth = 0
        self.deepest = 0

    def is_ours(self, frame: FrameType) -> bool:
        return any(part in frame.f_code.co_filename for part in self.parts)

    def follow(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and self.is_ours(frame):
            self.calls[frame.f_code.co_filename, frame.f_code.co_qualname] += 1
            self.depth += 1
            self.deepest = max(self.deepest, self.depth)
        elif event == "return" and self.is_ours(frame):
            self.depth -= 1

    def of(self, act: Callable[[], Any]) -> Trace:
        sys.setprofile(self.follow)
        try:
            act()
        finally:
            sys.setprofile(None)
        return self

    def counts(self) -> tuple[int, int, int]:
        return self.calls.total(), len({file for file, _ in self.calls}), self.deepest


def traced(actions: dict[str, Callable[[], Any]], *parts: str) -> dict[str, Trace]:
    found = {}
    for name, act in actions.items():
        if name == "forward":
            act()  # modules make what they need at their first call
        found[name] = Trace(*parts).of(act)
    return found


def of_peftcore(folder: Path) -> dict[str, Trace]:
    model, other = llama(), llama()
    actions = {
        "apply": lambda: peftcore.apply(model, "lora", target_modules=TARGETS),
        "forward": lambda: model(TOKENS),
        "save": lambda: peftcore.save(model, folder),
        "load": lambda: peftcore.load(other, folder),
        "merge": lambda: peftcore.merge(other),
    }
    return traced(actions, "/peftcore/", "/peftcore_lora/")


def of_peft(folder: Path) -> dict[str, Trace]:
    base, other = llama(), llama()
    made: list[Any] = []
    config = peft.LoraConfig(target_modules=TARGETS)
    actions = {
        "apply": lambda: made.append(peft.get_peft_model(base, config).eval()),
        "forward": lambda: made[0](TOKENS),
        "save": lambda: made[0].save_pretrained(folder),
        "load": lambda: made.append(peft.PeftModel.from_pretrained(other, folder)),
        "merge": lambda: made[1].merge_adapter(),
    }
    return traced(actions, "/peft/")


def excess(traces: dict[str, Trace]) -> list[str]:
    """Return a line for each count above its limit."""
    units = ("calls", "files", "levels of the stack")
    counts = [
        (action, *each)
        for action, trace in traces.items()
        for each in zip(trace.counts(), LIMITS[action], units, strict=True)
    ]
    return [
        f"{action}: {count:,} {unit}, more than the limit of {limit:,}"
        for action, count, limit, unit in counts
        if limit is not None and count > limit
    ]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--by", choices=["file", "function"])
    parser.add_argument("--of", choices=list(LIMITS), default="load")
    parser.add_argument("--most", type=int, default=40)
    parser.add_argument("--ours", action="store_true", help="without PEFT's calls")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(2):  # the second time is warm
            ours = of_peftcore(Path(folder) / f"ours {number}")
            theirs = {} if options.ours else of_peft(Path(folder) / f"theirs {number}")
    print(f"{'':8} {'calls':>7} {'files':>6} {'depth':>6}   peft: calls files depth   limits")
    for action, trace in ours.items():
        calls, files, depth = trace.counts()
        wanted = " ".join("-" if limit is None else f"{limit:,}" for limit in LIMITS[action])
        peers = "{:11,} {:5} {:5}".format(*theirs[action].counts()) if theirs else f"{'':23}"
        print(f"{action:8} {calls:7,} {files:6} {depth:6}   {peers}   {wanted}")
    if options.by:
        found: Counter[str] = Counter()
        for (file, function), count in ours[options.of].calls.items():
            path = file.rpartition("/site-packages/")[2].split("/peftcore/", 1)[-1]
            found[path if options.by == "file" else f"{path}: {function}"] += count
        print(f"\n{options.of}:")
        for where, count in found.most_common(options.most):
            print(f"{count:7,}  {where}")
    if above := excess(ours):
        sys.exit("\n".join(above))


if __name__ == "__main__":
    main()
