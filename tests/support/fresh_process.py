"""Code in a process that has imported PyTorch, and of peftcore, transformers and PEFT nothing.

`run(code)` is `python -W ignore -c code` without the seconds of the import: a fork of a server, which is started once.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import subprocess
import sys
import tempfile
import traceback
from functools import cache
from types import ModuleType
from typing import IO, Any


def run(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` with `arguments` in `sys.argv` and return its exit status and output, as `subprocess.run` does.

    Variables that PyTorch reads when it is imported have no effect.
    """
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    request = {"code": code, "argv": ["-c", *arguments], "environment": {**os.environ, **environment}}
    server.stdin.write(f"{json.dumps(request)}\n")
    server.stdin.flush()
    return subprocess.CompletedProcess(args=["-c", *arguments], **json.loads(server.stdout.readline()))


@cache
def _server() -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", __file__]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)  # the end of its input ends it
    return server


def _serve() -> None:
    del sys.path[0]  # this folder, which a new process does not have
    sys.path.insert(0, "")
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import bitsandbytes  # noqa: F401
    import torch.distributed.fsdp  # noqa: F401

    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
            child = os.fork()
            if child == 0:
                os._exit(_child(json.loads(line), out, error))
            _, status = os.waitpid(child, 0)
            found = {"returncode": os.waitstatus_to_exitcode(status)}
            for name, file in (("stdout", out), ("stderr", error)):
                file.seek(0)
                found[name] = file.read()
        replies.write(f"{json.dumps(found)}\n")
        replies.flush()


def _child(request: dict[str, Any], out: IO[str], error: IO[str]) -> int:
    os.dup2(out.fileno(), 1)
    os.dup2(error.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv[:] = request["argv"]
    main = sys.modules["__main__"] = ModuleType("__main__")
    status = 0
    try:
        exec(compile(request["code"], "<string>", "exec"), vars(main))
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    _serve()
