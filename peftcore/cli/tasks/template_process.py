"""Untrusted chat templates, rendered in a separate process with limits of time, memory and output.

A template is a program: nested loops, `'x' * 10**10` or `'%1000000000d' % 1` never end or take all memory, and nothing
in Python can stop them within a process. The other process imports transformers' renderer, not torch, and answers one
line of JSON with one. It starts with the first conversation that needs it (0.6 s) and serves all that follow (0.2 ms
more than in this process).

Templates given by the user, and the base's own, are rendered in this process.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import subprocess
import sys
import threading
import weakref
from typing import Any

from peftcore.errors import PeftcoreError

SECONDS = 10.0  # for one conversation; usual templates take a millisecond
MEGABYTES = 512  # beyond what the process has at its start
TEMPLATE = 1_000_000  # characters; the longest known have 30,000
OUTPUT = 20_000_000  # characters
_STARTING = 120.0  # seconds, on a busy machine
_ADVICE = "Pass another: --chat-template chatml, or a file"

_foreign: weakref.WeakSet[Any] = weakref.WeakSet()

# Program of the other process. Its first line prevents imports from the folder it is started in.
_PROGRAM = """
import sys; sys.path[:] = sys.argv[4].split(chr(10))
import json, os
answers = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)
from transformers.utils.chat_template_utils import render_jinja_template
seconds, megabytes, longest = map(int, sys.argv[1:4])
try:
    import resource
except ImportError:
    resource = None

def limit(what, more):
    try:
        resource.setrlimit(what, (more, resource.getrlimit(what)[1]))
    except (AttributeError, ValueError, OSError):
        pass

try:
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    limit(resource.RLIMIT_AS, taken + (megabytes << 20))
except (AttributeError, OSError):
    pass
if resource is not None:
    limit(resource.RLIMIT_FSIZE, 0)
    limit(resource.RLIMIT_CORE, 0)

def answer(request):
    try:
        text = render_jinja_template(**request)[0][0]
        return {"long": len(text)} if len(text) > longest else {"text": text}
    except MemoryError:
        return {"memory": True}
    except RecursionError:
        return {"nested": True}
    except BaseException as error:
        return {"error": f"{type(error).__name__}: {str(error)[:400]}"}

answers.write(b"{}" + os.linesep.encode())
answers.flush()
for line in sys.stdin.buffer:
    if resource is not None:  # also where nobody is left to end it
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 2 * seconds + 1)
    answers.write(json.dumps(answer(json.loads(line))).encode() + b"\\n")
    answers.flush()
"""


def mark(tokenizer: Any, foreign: bool) -> None:
    """Record whether the tokenizer's chat template came with an adapter."""
    (_foreign.add if foreign else _foreign.discard)(tokenizer)


def is_foreign(tokenizer: Any) -> bool:
    """Return whether the tokenizer's chat template came with an adapter."""
    return tokenizer in _foreign


def render(tokenizer: Any, messages: list[dict[str, Any]], tools: Any, begins_answer: bool) -> str:
    """Return the result of `tokenizer.apply_chat_template`, for a template that may never end.

    Raises:
        PeftcoreError: the template rejects the conversation, or takes too much time or memory.
    """
    template = tokenizer.get_chat_template(None, tools)
    if not isinstance(template, str) or len(template) > TEMPLATE:
        what = f"has {len(template):,} characters" if isinstance(template, str) else f"is a {type(template).__name__}"
        raise PeftcoreError(f"the chat template {what}, expected text of at most {TEMPLATE:,} characters. {_ADVICE}")
    request = {
        **tokenizer.special_tokens_map,
        "conversations": [messages],
        "tools": tools,
        "chat_template": template,
        "add_generation_prompt": begins_answer,
        "documents": None,
        "continue_final_message": False,  # by name, so that no special token is mistaken for it
        "return_assistant_tokens_mask": False,
    }
    answer = _process().ask(json.dumps(request, default=lambda value: f"<{type(value).__name__}>").encode())
    if "text" in answer:
        if _is_text(answer["text"]):
            return str(answer["text"])
        why = "produces half a surrogate pair, which is not text"
    elif "memory" in answer:
        why = f"takes more than {MEGABYTES} MB of memory for one conversation"
    elif "nested" in answer:
        why = "is nested too deeply"
    elif "long" in answer:
        why = f"produces a text of {answer['long']:,} characters for one conversation; at most {OUTPUT:,} are read"
    else:
        why = f"rejects the conversation: {answer['error']}"
    raise PeftcoreError(f"the chat template {why}. {_ADVICE}")


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Ended(Exception):
    """Raised if the process gave no answer."""


class _Process:
    """The rendering process, and a thread that reads its answers so that waiting can time out."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.lock = threading.Lock()
        self.answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        limits = [str(int(max(SECONDS, 1))), str(MEGABYTES), str(OUTPUT)]
        self.child = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, *limits, "\n".join(filter(None, sys.path))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self._answer(_STARTING)
        except _Ended as error:
            raise PeftcoreError(f"the process that renders chat templates did not start: {error}") from None

    def _read(self) -> None:
        assert self.child.stdout is not None
        while line := self.child.stdout.readline():
            self.answers.put(line)
        self.answers.put(b"")

    def ask(self, request: bytes) -> dict[str, Any]:
        """Return the answer to a request."""
        assert self.child.stdin is not None
        with self.lock:
            try:
                self.child.stdin.write(request + b"\n")
                self.child.stdin.flush()
            except OSError:  # it has ended; the missing answer reports that
                pass
            try:
                return self._answer(SECONDS)
            except _Ended as error:
                raise PeftcoreError(f"the chat template {error}. {_ADVICE}") from None

    def _answer(self, seconds: float) -> dict[str, Any]:
        try:
            line = self.answers.get(timeout=seconds)
        except queue.Empty:
            self.end()
            raise _Ended(f"took more than {seconds:g} s for one conversation, and was stopped") from None
        except BaseException:  # after Ctrl-C, the pending answer belongs to an abandoned request
            self.end()
            raise
        if not line:
            self.end()
            raise _Ended(f"ended the process that renders it ({self.child.returncode})")
        return json.loads(line)

    @property
    def is_alive(self) -> bool:
        return self.owner == os.getpid() and self.child.poll() is None

    def end(self) -> None:
        if self.owner == os.getpid():
            self.child.kill()
            self.child.wait()
            for pipe in (self.child.stdin, self.child.stdout):
                if pipe is not None:
                    pipe.close()


_running: _Process | None = None
_starting = threading.Lock()


def _process() -> _Process:
    global _running
    with _starting:
        if _running is None or not _running.is_alive:
            _running = _Process()
            atexit.register(_running.end)
        return _running


def process_id() -> int:
    """Return the id of the process that renders, which is started if there is none."""
    return _process().child.pid
