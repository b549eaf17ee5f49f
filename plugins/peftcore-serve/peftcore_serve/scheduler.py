"""The thread that runs the model: sequences wait, join the batch between steps, and leave it when they end."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from peftcore import PeftcoreError
from peftcore_serve.adapters import Adapters, LoadedAdapter
from peftcore_serve.decoding import Batch, generate_alone, prompt_logits
from peftcore_serve.folders import Folder
from peftcore_serve.sequence import Sequence, error_message

ENDING = "the server is shutting down"
_WAITING = 4096


class Busy(Exception):
    """Too many sequences are waiting."""


class Scheduler:
    """Runs sequences on a model, batching sequences with different adapters.

    Args:
        model: the base, without adapters. Only the scheduler's thread calls the model.
        find: (name) -> adapter on disk, or None.
        limit: maximum number of adapters in memory.
        batch_size: maximum number of sequences in a batch.
    """

    def __init__(self, model: nn.Module, find: Callable[[str], Folder | None], limit: int, batch_size: int) -> None:
        self.adapters = Adapters(model, limit)
        self.batch_size, self._find = batch_size, find
        self._batch = Batch(model)
        self._waiting: deque[Sequence] = deque()
        self._condition = threading.Condition()
        self._is_closed = False
        self.steps = 0
        self._thread = threading.Thread(target=self._run, name="peftcore-serve", daemon=True)
        self._thread.start()

    def submit(self, sequences: Iterable[Sequence]) -> None:
        """Queue sequences.

        Raises:
            Busy: too many sequences are waiting.
        """
        new_sequences = list(sequences)
        with self._condition:
            if self._is_closed:
                raise Busy(ENDING)
            if len(self._waiting) + len(new_sequences) > _WAITING:
                raise Busy(
                    f"the queue is full ({len(self._waiting):,} of at most {_WAITING:,} sequences). Try again later"
                )
            self._waiting.extend(new_sequences)
            self._condition.notify_all()

    @property
    def is_busy(self) -> bool:
        """Whether sequences are running or waiting."""
        with self._condition:
            return bool(self._waiting or self._batch.sequences)

    def close(self, wait: bool = True) -> None:
        """End all sequences with an error after the current step, and stop the thread."""
        with self._condition:
            self._is_closed = True
            self._condition.notify_all()
        if wait:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._condition:
                while not (self._waiting or self._batch.sequences or self._is_closed):
                    self._condition.wait()
                if self._is_closed:
                    for sequence in (*self._batch.sequences, *self._waiting):
                        sequence.fail(ENDING)
                    return
            try:
                self._admit()
                self._step()
            except Exception as error:  # the thread must survive, to serve other requests
                for sequence in self._batch.sequences:
                    sequence.fail(error_message(error))
                self._batch = Batch(self.adapters.model)

    def _admit(self) -> None:
        """Start waiting sequences, in order, while the batch has room."""
        while len(self._batch.sequences) < self.batch_size and not self._is_closed:
            with self._condition:
                if not self._waiting:
                    return
                sequence = self._waiting[0]
            try:
                if not sequence.is_done and not self._start(sequence):
                    return  # wait until an adapter in use is free; later sequences do not overtake
            except Exception as error:  # the error concerns only this sequence
                sequence.fail(error_message(error), is_users=isinstance(error, PeftcoreError))
            if self._is_closed:
                return
            with self._condition:
                self._waiting.popleft()

    def _start(self, sequence: Sequence) -> bool:
        """Run the prompt of a sequence, or return False if its adapter cannot be loaded yet."""
        adapter: LoadedAdapter | None = None
        if sequence.adapter is not None:
            folder = self._find(sequence.adapter)
            if folder is None:
                raise PeftcoreError(
                    f"the folder of the adapter '{sequence.adapter}' no longer exists. See GET /v1/models"
                )
            names_in_use = {running.adapter for running in self._batch.sequences if running.adapter}
            adapter = self.adapters.ensure_loaded(folder, names_in_use)
            if adapter is None:
                return False
        key = None if adapter is None else adapter.key
        if not (self.adapters.batches if adapter is None else adapter.by_sample):
            self._run_alone(sequence, key)
            return True
        self.adapters.activate([key])
        scores_prompt = sequence.scores_prompt
        logits, cache = self._batch.prefill(sequence.prompt, whole=scores_prompt)
        sequence.begin(logits if scores_prompt else None)
        sequence.extend(logits[-1] if scores_prompt else logits)
        if not sequence.is_done:
            self._batch.join(sequence, cache)
        return True

    def _run_alone(self, sequence: Sequence, key: str | None) -> None:
        self.adapters.activate_alone(key)
        model = self.adapters.model
        sequence.begin(prompt_logits(model, sequence.prompt) if sequence.scores_prompt else None)
        if sequence.is_done:
            return
        generate_alone(model, sequence, lambda: self._is_closed)

    def _step(self) -> None:
        """Extend all sequences of the batch by one token."""
        batch = self._batch
        batch.drop_done()
        if not batch.sequences:
            return
        try:
            self.adapters.activate([self._key(sequence) for sequence in batch.sequences])
            logits: Any = batch.step()
        except Exception:
            self._run_separately()
        else:
            self.steps += 1
            for sequence, row in zip(batch.sequences, logits, strict=True):
                try:
                    sequence.extend(row)
                except Exception as error:  # such as a tokenizer that cannot decode a token
                    sequence.fail(error_message(error))
        batch.drop_done()

    def _run_separately(self) -> None:
        """Finish the sequences of a failed batch one at a time, so that only the cause of the error fails."""
        for sequence in self._batch.sequences:
            try:
                self._run_alone(sequence, self._key(sequence))
            except Exception as error:
                sequence.fail(error_message(error))

    def _key(self, sequence: Sequence) -> str | None:
        return None if sequence.adapter is None else self.adapters.by_name[sequence.adapter].key
