"""Where a base is: a folder, a .gguf file or a hub id; and reading it by transformers."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from peftcore.errors import PeftcoreError
from peftcore_cli.bases import gguf_file
from peftcore_cli.bases.adapter_folders import adapter_folder
from peftcore_cli.console import require

_trusts = False  # --trust-remote-code of the command that runs


def trust_remote_code(wanted: bool) -> None:
    """Run the code of models' repositories from now on, or do not."""
    global _trusts
    _trusts = wanted


def remote_code() -> dict[str, Any]:
    """Return the argument of transformers' loaders with which they run code, if `--trust-remote-code` was given."""
    return {"trust_remote_code": True} if _trusts else {}


def resolve(model: str) -> str:
    """Return a path as an absolute one, so that an adapter finds its base from anywhere; a hub id unchanged.

    Raises:
        PeftcoreError: it is a path that does not exist, or a folder without a model.
    """
    path = Path(os.path.expanduser(model))
    if os.path.isdir(path) and not os.path.exists(path / "config.json"):
        _refuse_folder(path, model)
    if os.path.exists(path):
        return str(path.resolve())
    if model.startswith((".", "/", "~")) or path.suffix == ".gguf" or model.count("/") > 1:
        raise PeftcoreError(f"the path '{model}' does not exist. A hub id has the form NAME or OWNER/NAME")
    return model


def _refuse_folder(path: Path, model: str) -> None:
    """Raise a PeftcoreError that says what a folder without a model's config has instead."""
    if os.path.exists(adapter_folder(path) / "adapter_config.json"):
        raise PeftcoreError(
            f"--model '{model}' is an adapter, not a base. Pass the base it was trained on; the adapter is "
            "--adapter of train, and the argument of other commands"
        )
    names = sorted(os.listdir(path))
    found = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") or "nothing"
    raise PeftcoreError(
        f"'{model}' has no model: config.json is missing, found {found}. Pass a folder that save_pretrained wrote, "
        "a hub id, or a .gguf file"
    )


def quiet_transformers() -> None:
    """Import transformers without its progress bars and notices; the commands print their own.

    Raises:
        PeftcoreError: it is not installed.
    """
    require("transformers")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    from transformers import dynamic_module_utils

    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # an error, not a question at the terminal that runs code on "y"


def _check_reachable(model: str) -> None:
    """Ask the hub once for the config of a model that is not in the hub's cache.

    transformers would retry for a minute, and print a line for each request.

    Raises:
        PeftcoreError: the hub does not answer.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        if try_to_load_from_cache(model, "config.json") is None:
            get_hf_file_metadata(hf_hub_url(model, "config.json"))
    except (HfHubHTTPError, HFValidationError):
        return  # an answer, such as that there is no such model, and a wrong id: transformers' errors are clear
    except Exception as error:  # of the hub's HTTP library, which differs by release
        raise PeftcoreError(
            f"'{model}' is not a folder and not in the hub's cache, and the hub cannot be reached: "
            f"{str(error).rstrip('.')}. Pass the folder of a model, or connect to the network"
        ) from error


def pretrained(loader: Any, model: str, what: str, **options: Any) -> Any:
    """Return what a `from_pretrained` of transformers loads.

    Args:
        loader: the function.
        model: folder, hub id, or .gguf file.
        what: what is loaded, for messages, such as `tokenizer`.
        options: arguments of the function.

    Raises:
        PeftcoreError: it cannot be loaded; the message has transformers' reason.
    """
    if not os.path.exists(model):
        _check_reachable(model)
    where, options = model, {**options, **remote_code()}
    reading: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if model.endswith(".gguf"):
        require("gguf")
        where, options["gguf_file"] = str(Path(model).parent), Path(model).name
        reading = gguf_file.reading()
    from huggingface_hub.errors import StrictDataclassError

    try:
        with reading:
            return loader(where, **options)
    except Exception as error:
        # GGUF readers may raise anything on invalid bytes
        expected = (OSError, ValueError, KeyError, ImportError, StrictDataclassError)
        mismatched = isinstance(error, RuntimeError) and "ignore_mismatched_sizes" in str(error)
        if not (isinstance(error, expected) or mismatched or "gguf_file" in options):
            raise
        cause = error.__cause__ if isinstance(error, StrictDataclassError) else None  # the error of the field
        lines = [line.strip() for line in str(cause or error).strip().splitlines()] or [type(error).__name__]
        reason = " ".join(lines)[:400] if lines[0].endswith(":") else lines[0]  # a list follows a colon
        if "trust_remote_code" in str(error):
            reason = (
                "it has code of its own, which is not run by default. Read that code, and pass --trust-remote-code to "
                "run it with your rights"
            )
        reason = "its tensors and its config have different shapes" if mismatched else reason
        raise PeftcoreError(f"the {what} of '{model}' cannot be loaded: {reason}") from error
