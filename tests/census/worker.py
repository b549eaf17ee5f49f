"""A process that examines classes one after another, and is ended and replaced when one of them ends or outlasts it."""

from __future__ import annotations

import dataclasses
import os
import resource
import time
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from support import processes

MEMORY = 6 << 30  # bytes of address space beyond what is imported
RENEWED = 100  # classes after which a worker is replaced, so that nothing of one model reaches far


class Worker:
    """`examine(name)` gives the row of a class, whatever the class does to memory, time or the interpreter."""

    def __init__(self, methods: Sequence[str], seconds: float) -> None:
        self._methods, self._seconds = list(methods), seconds
        self._process: Any = None
        self._count = 0

    def examine(self, name: str) -> dict[str, Any]:
        """{class, outcomes by method, facts of the class}, or {class, none: why there is no instance that runs}.

        A process that dies or takes too long is a crash of the method at which it stood.
        """
        if self._process is None or self._count >= RENEWED:
            self.close()
            self._start()
        self._count += 1
        began = time.monotonic()
        row: dict[str, Any] = {"class": name, "outcomes": {}}
        at = "instance"
        try:
            self._pipe.send(name)
            while True:
                if not self._pipe.poll(max(0.0, began + self._seconds - time.monotonic())):
                    raise TimeoutError(f"not done after {self._seconds:.0f} s")
                message = self._pipe.recv()
                if message is None:
                    break
                if isinstance(message, str):
                    at = message
                else:
                    row["outcomes"].update(message.pop("outcomes", {}))
                    row.update(message)
        except (TimeoutError, EOFError, OSError) as error:
            why = str(error) if type(error) is TimeoutError else "the process died"
            if at.removesuffix(", images") in self._methods:
                row["outcomes"][at] = {"kind": "crash", "at": "process", "why": why, "notes": ()}
            else:
                row.setdefault("none", f"{at}: {why}")
            self.close()
        row["seconds"] = round(time.monotonic() - began, 2)
        return row

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None

    def _start(self) -> None:
        processes.start_server()
        self._pipe, there = processes.CONTEXT.Pipe()
        self._process = processes.CONTEXT.Process(target=_work, args=(there, self._methods), daemon=True)
        self._process.start()
        there.close()
        self._count = 0


def _work(pipe: Any, methods: list[str]) -> None:
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    with open(os.devnull, "w") as nothing:  # what libraries print
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    while True:
        name = pipe.recv()
        for message in _messages(name, methods):
            pipe.send(message)
        pipe.send(None)


def _messages(name: str, methods: list[str]) -> Any:
    """Strings say what is begun, dicts are parts of the row."""
    from census import check, instances, peer
    from census.case import Case
    from census.images import with_images

    yield "instance"
    try:
        model = instances.build(name)
        case = Case.of(model)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        yield {"none": f"{type(error).__name__}: {error} ({last.filename.rpartition('/')[2]}:{last.lineno})"[:400]}
        return
    yield {**check.layers(model), "type": instances.classes()[name], "inputs": sorted(case.inputs)}
    for method in methods:
        yield method
        yield {"outcomes": {method: dataclasses.asdict(check.check(case, method))}}
    for method in check.PROMPTS:
        if method in methods:
            yield f"peft {method}"
            yield {f"peft {method}": peer.served_by_peft(case, method)}
    case = with_images(model) if set(check.PROMPTS) & set(methods) else None
    for method in check.PROMPTS if case is not None else ():
        if method in methods:
            yield f"{method}{check.IMAGES}"
            yield {"outcomes": {f"{method}{check.IMAGES}": dataclasses.asdict(check.check(case, method))}}
