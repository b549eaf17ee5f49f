"""`peftcore serve`: serve a base model and a folder of adapters over OpenAI's HTTP protocol."""

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

_BACKLOG = 2048  # maximum number of connections that wait to be accepted
_SHUTDOWN_SECONDS = 5  # time for running answers to end
# Fields of a generation config that the server ignores, and the values at which they have no effect.
_NEUTRAL_VALUES = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_new_tokens": None, "min_length": 0}


def serve(
    model: options.Model,
    trust_remote_code: options.TrustRemoteCode = False,  # `app` reads this option
    adapters: Annotated[
        Path | None,
        typer.Option(
            help=(
                "Folder of adapters or runs, read at every request. Each adapter is served as a model named after its "
                "folder."
            )
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on. There is no authentication.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="N", help="Port to listen on; 0 means any free port.")
    ] = 8000,
    limit: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", help="Maximum number of adapters in memory; the least recently used adapter is evicted."
        ),
    ] = 16,
    batch_size: Annotated[
        int, typer.Option(min=1, metavar="N", help="Maximum number of answers decoded in one batch.")
    ] = 16,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Maximum number of tokens per answer, if the request sets none.")
    ] = 512,
    chat_template: options.ChatTemplate = None,
    trust_adapter_templates: Annotated[
        bool,
        typer.Option(
            "--trust-adapter-templates",
            help="Render the chat templates of adapters. A template can loop forever and block the server.",
        ),
    ] = False,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="Host name, besides the server's address, that requests may be sent to. Repeatable."),
    ] = None,
    quantize: options.Quantize = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
) -> None:
    """Serve a model and a folder of adapters through OpenAI's chat and completions API.

    Requests for different adapters are decoded in one batch. The server is for local use and evaluation, because it has
    no authentication.
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
        # Listen before the address is printed, because a client may connect as soon as it reads the address.
        listening.listen(_BACKLOG)
        address, port_number = listening.getsockname()[:2]
        count = len(server.adapters())
        shown_address = f"[{address}]" if ":" in address else address
        say(f"{server.name} and {count} adapter{'' if count == 1 else 's'} at http://{shown_address}:{port_number}/v1")
        say("Ctrl-C stops the server", "dim")
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
    """Load the base model and return the server. The arguments are options of the command or arguments of `Server`.

    Raises:
        PeftcoreError: the base model cannot be loaded, or the folder of adapters cannot be read or is itself an
            adapter.
    """
    from peftcore_cli import base_files, base_quantization, dtype_choice, models, registered

    import peftcore
    from peftcore_serve import folders
    from peftcore_serve.app import Server

    folders_by_name = folders.find(adapters)
    if adapters is not None and os.path.exists(adapters / "adapter_config.json"):
        raise PeftcoreError(
            f"'{adapters}' is an adapter, not a folder of adapters. Pass the folder that contains it: --adapters "
            f"{adapters.resolve().parent}"
        )
    base = base_files.resolve(model)
    name = Path(model).name if model.startswith((".", "/", "~")) or model.endswith(".gguf") else model
    name = name or Path(base).name  # of "."
    tasks = _tasks(folders_by_name)
    any_fp32 = any(adapter_task.dtype == "fp32" for adapter_task in tasks.values())
    task = registered.default_name()
    dtype = dtype_choice.choose_for_inference(base, task, dtype, device, (), "fp32" if any_fp32 else None).report()
    base_as = base_quantization.of_adapters(quantize, tasks)
    base_model = models.load_model(base, task, dtype=dtype, device=device, quantize=base_as)
    if base_model.device.type == "cpu":
        peftcore.fuse(base_model)
    generation_config: Any = base_model.generation_config
    values = {field: getattr(generation_config, field, None) for field in _NEUTRAL_VALUES}
    ignored_fields = [
        f"{field}={value}" for field, value in values.items() if value not in (None, _NEUTRAL_VALUES[field])
    ]
    if ignored_fields:
        note(f"the server ignores these fields of the base's generation config: {', '.join(ignored_fields)}")
    server = Server(
        base_model,
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
            f"answers are generated one at a time, because {type(base_model).__name__} computes different results "
            "for prompts of different lengths in one batch"
        )
    return server


def _tasks(folders: Mapping[str, Folder]) -> dict[str, AdapterTask]:
    """Return the task of each adapter that can be read."""
    from peftcore_cli import adapter_folders

    tasks = {}
    for name, folder in folders.items():
        with contextlib.suppress(PeftcoreError, OSError):  # requests for this adapter get the error
            tasks[name] = adapter_folders.adapter_task(folder.path)
    return tasks


def listen(host: str, port: int) -> socket.socket:
    """Bind a socket before the model is loaded, so that a port in use is reported at once."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, number)
    except OSError as error:
        raise PeftcoreError(
            f"--host '{host}' is not an address of this machine: {error.strerror}. Pass one of its addresses, such "
            "as 127.0.0.1"
        ) from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        listening.close()
        raise PeftcoreError(
            f"the server cannot listen on {host}:{port}: {error.strerror}. Pass another --port, or 0 for any free port"
        ) from error
    return listening


def known_hosts(host: str, address: str, extra_names: Sequence[str]) -> set[str] | None:
    """Return the allowed host names, in the form of the Host header, or None to allow any name.

    Args:
        host: value of `--host`.
        address: address that the server is bound to.
        extra_names: names of `--allowed-host`. Without them, a server that other machines can reach allows any name.
    """
    is_loopback = ipaddress.ip_address(address.partition("%")[0]).is_loopback
    if not is_loopback and not extra_names:
        return None
    names = {host, address, *extra_names, *(("localhost", "127.0.0.1", "::1") if is_loopback else ())}
    return {(f"[{name}]" if ":" in name else name).lower() for name in names}


def run(server: Server, listening: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM, and then end running answers with an error."""
    import uvicorn

    class Uvicorn(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            server.scheduler.close(wait=False)
            super().handle_exit(sig, frame)

    Uvicorn(uvicorn_config(server)).run(sockets=[listening])


def uvicorn_config(server: Server) -> uvicorn.Config:
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
        server.app, log_config=log, log_level="warning", access_log=False, timeout_graceful_shutdown=_SHUTDOWN_SECONDS
    )
