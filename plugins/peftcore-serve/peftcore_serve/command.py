"""`peftcore serve`: a base and a folder of adapters behind OpenAI's HTTP protocol."""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import os
import socket
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from peftcore_cli import options
from peftcore_cli.console import LogFormatter, note, say

from peftcore import PeftcoreError

if TYPE_CHECKING:
    import uvicorn
    from peftcore_cli import AdapterTask

    from peftcore_serve.app import Server
    from peftcore_serve.folders import Folder

EXAMPLES = (
    "peftcore serve -m MODEL --adapters runs",
    "peftcore serve -m MODEL --adapters runs --port 8080 --limit 64 --batch-size 32",
)

_BACKLOG = 2048  # connections that wait to be accepted
_CLOSING = 5  # seconds for answers under way
# Fields of a generation config that this server leaves to the request, or does not have, and their neutral values.
_IGNORED = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_new_tokens": None, "min_length": 0}


def serve(
    model: options.Model,
    trust_remote_code: options.TrustRemoteCode = False,  # the application reads it
    adapters: Annotated[
        Path | None,
        typer.Option(help="Folder of folders of adapters or runs, each a model of its name; read at every request."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at. There is no authentication.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="Port; 0: a free one.")] = 8000,
    limit: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Maximum number of adapters in memory; the least recently used leave."),
    ] = 16,
    batch_size: Annotated[
        int, typer.Option(min=1, metavar="N", help="Maximum number of answers decoded together.")
    ] = 16,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Maximum number of tokens of an answer if the request has none.")
    ] = 512,
    chat_template: options.ChatTemplate = None,
    trust_adapter_templates: Annotated[
        bool,
        typer.Option(
            "--trust-adapter-templates",
            help="Render chat templates that came with adapters. A template may loop "
            "for ever, and keep the server busy.",
        ),
    ] = False,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="Host name under which clients reach this server, besides its address. Repeatable."),
    ] = None,
    quantize: options.Quantize = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
) -> None:
    """Answer OpenAI's chat and completion requests with a model and the adapters in a folder.

    Requests for different adapters are decoded in one batch. For local use and evaluation: there is no authentication.
    """
    listening = listen(host, port)
    with listening:
        say(f"loading {model}", "dim")
        server = make(
            model,
            adapters,
            limit=limit,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            chat_template=chat_template,
            trust_templates=trust_adapter_templates,
            hosts=known_hosts(host, listening.getsockname()[0], allowed_host or []),
            quantize=quantize,
            dtype=dtype,
            device=device,
        )
        listening.listen(_BACKLOG)  # a client may connect as soon as it reads the address
        where, number = listening.getsockname()[:2]
        count = len(server.adapters())
        shown = f"[{where}]" if ":" in where else where
        say(f"{server.name} and {count} adapter{'' if count == 1 else 's'} at http://{shown}:{number}/v1")
        say("Ctrl-C ends", "dim")
        run(server, listening)


def make(
    model: str,
    adapters: Path | None = None,
    *,
    limit: int = 16,
    batch_size: int = 16,
    max_new_tokens: int = 512,
    chat_template: str | None = None,
    trust_templates: bool = False,
    hosts: Collection[str] | None = None,
    quantize: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
) -> Server:
    """Load the base and return the server; the arguments are the command's options, and those of `Server`.

    Raises:
        PeftcoreError: the base cannot be loaded, or the folder of adapters cannot be read or is itself an adapter.
    """
    from peftcore_cli import base_files, base_quantization, dtype_choice, models, registered

    import peftcore
    from peftcore_serve import folders
    from peftcore_serve.app import Server

    there = folders.find(adapters)
    if adapters is not None and os.path.exists(adapters / "adapter_config.json"):
        raise PeftcoreError(
            f"'{adapters}' is an adapter, not a folder of adapters. Pass the folder in which it is: --adapters "
            f"{adapters.resolve().parent}"
        )
    base = base_files.resolve(model)
    name = Path(model).name if model.startswith((".", "/", "~")) or model.endswith(".gguf") else model
    name = name or Path(base).name  # of "."
    tasks = _tasks(there)
    wide = any(each.dtype == "fp32" for each in tasks.values())
    task = registered.without_a_name()
    dtype = dtype_choice.of_base(base, task, dtype, device, (), "fp32" if wide else None).say()
    base_as = base_quantization.of_adapters(quantize, tasks)
    loaded = models.load_model(base, task, dtype=dtype, device=device, quantize=base_as)
    peftcore.fuse(loaded)
    own: Any = loaded.generation_config
    found = {field: getattr(own, field, None) for field in _IGNORED}
    ignored = [f"{field}={value}" for field, value in found.items() if value not in (None, _IGNORED[field])]
    if ignored:
        note(f"the base's generation config has {', '.join(ignored)}, which answers here are made without")
    server = Server(
        loaded,
        base,
        name,
        adapters,
        limit=limit,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        chat_template=chat_template,
        trust_templates=trust_templates,
        hosts=hosts,
        refuse=functools.partial(base_quantization.refuse_late, quantize, base_as),
    )
    if not server.scheduler.adapters.batches:
        note(
            f"answers are written one after the other: {type(loaded).__name__} does not decode prompts of different "
            "lengths in one batch as it decodes each by itself"
        )
    return server


def _tasks(found: Mapping[str, Folder]) -> dict[str, AdapterTask]:
    """Return what each adapter that can be read was trained for."""
    from peftcore_cli import adapter_folders

    tasks = {}
    for name, folder in found.items():
        with contextlib.suppress(PeftcoreError, OSError):  # its requests get the error
            tasks[name] = adapter_folders.adapter_task(folder.path)
    return tasks


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound, before the model is loaded."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, number)
    except OSError as error:
        raise PeftcoreError(f"--host '{host}' is not an address of this machine: {error.strerror}") from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        listening.close()
        raise PeftcoreError(
            f"the server cannot listen at {host}:{port}: {error.strerror}. Pass another --port, or 0 for a free one"
        ) from error
    return listening


def known_hosts(host: str, address: str, allowed: Sequence[str]) -> set[str] | None:
    """Return the host names that requests may be sent to, as the Host header has them; None for any.

    Args:
        host: the option `--host`.
        address: what the server is bound to.
        allowed: names of `--allowed-host`. Without them, a server that others than this machine reach takes any name.
    """
    is_loopback = ipaddress.ip_address(address.partition("%")[0]).is_loopback
    if not is_loopback and not allowed:
        return None
    names = {host, address, *allowed, *(("localhost", "127.0.0.1", "::1") if is_loopback else ())}
    return {(f"[{name}]" if ":" in name else name).lower() for name in names}


def run(server: Server, listening: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM, then end running answers with an error."""
    import uvicorn

    class Uvicorn(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            server.scheduler.close(wait=False)
            super().handle_exit(sig, frame)

    Uvicorn(configured(server)).run(sockets=[listening])


def configured(server: Server) -> uvicorn.Config:
    """Return uvicorn's configuration."""
    import uvicorn

    log = {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"escaped": {"()": LogFormatter, "fmt": "%(levelname)s: %(message)s"}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "escaped"}},
        "loggers": {"uvicorn": {"handlers": ["stderr"], "propagate": False}},
    }
    return uvicorn.Config(
        server.app, log_config=log, log_level="warning", access_log=False, timeout_graceful_shutdown=_CLOSING
    )
