"""Locate a base (a folder, a .gguf file or a hub id), and load it with transformers."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from peftcore.errors import PeftcoreError
from peftcore_cli.bases import gguf_file
from peftcore_cli.bases.adapter_folders import adapter_folder
from peftcore_cli.console import require

_trusts = False  # value of --trust-remote-code


def trust_remote_code(is_trusted: bool) -> None:
    """Set whether this process may run code from model repositories."""
    global _trusts
    _trusts = is_trusted


def remote_code() -> dict[str, Any]:
    """Return the argument that makes transformers' loaders run repository code, if `--trust-remote-code` was passed."""
    return {"trust_remote_code": True} if _trusts else {}


def resolve(model: str) -> str:
    """Make a path absolute, so that an adapter finds its base from any directory. Hub ids are returned unchanged.

    Raises:
        PeftcoreError: the path does not exist, or the folder has no model.
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
    """Raise the PeftcoreError for a folder without config.json."""
    if os.path.exists(adapter_folder(path) / "adapter_config.json"):
        raise PeftcoreError(
            f"--model '{model}' is an adapter. Pass its base as --model, and the adapter as --adapter (train) or as "
            "the argument of the command (others)"
        )
    names = sorted(os.listdir(path))
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") or "nothing"
    raise PeftcoreError(
        f"the folder '{model}' has no config.json, so it is not a model, found {shown}. Pass a folder that "
        "save_pretrained wrote, a hub id, or a .gguf file"
    )


def quiet_transformers() -> None:
    """Import transformers and turn off its progress bars and notices, because commands print their own messages.

    Raises:
        PeftcoreError: it is not installed.
    """
    require("transformers")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    from transformers import dynamic_module_utils

    dynamic_module_utils.TIME_OUT_REMOTE_CODE = (
        0  # raise an error instead of asking at the terminal whether to run code
    )


def _check_reachable(model: str) -> None:
    """Request the config of a model that is not in the hub's cache, without retries.

    transformers would retry for a minute, and print a line for each attempt.

    Raises:
        PeftcoreError: the hub does not answer.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        if try_to_load_from_cache(model, "config.json") is None:
            get_hf_file_metadata(hf_hub_url(model, "config.json"))
    except (HfHubHTTPError, HFValidationError):
        return  # the hub answered, or the id is invalid: transformers' own errors are clear
    except Exception as error:  # the HTTP library depends on the release of huggingface_hub
        raise PeftcoreError(
            f"'{model}' is neither a folder nor in the hub's cache, and the hub cannot be reached: "
            f"{str(error).rstrip('.')}. Pass the folder of a model, or connect to the network"
        ) from error


def load_pretrained(loader: Any, model: str, label: str, **options: Any) -> Any:
    """Call a `from_pretrained` of transformers.

    Args:
        loader: the function.
        model: folder, hub id, or .gguf file.
        label: name of what is loaded, for messages, such as `tokenizer`.
        options: arguments of the function.

    Raises:
        PeftcoreError: loading fails. The message contains transformers' reason.
    """
    if not os.path.exists(model):
        _check_reachable(model)
    source, options = model, {**options, **remote_code()}
    reading: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if model.endswith(".gguf"):
        require("gguf")
        source, options["gguf_file"] = str(Path(model).parent), Path(model).name
        reading = gguf_file.reading()
    from huggingface_hub.errors import StrictDataclassError

    try:
        with reading:
            return loader(source, **options)
    except Exception as error:
        # Readers of GGUF raise any kind of error on invalid bytes.
        loading_errors = (OSError, ValueError, KeyError, ImportError, StrictDataclassError)
        has_mismatched_sizes = isinstance(error, RuntimeError) and "ignore_mismatched_sizes" in str(error)
        if not (isinstance(error, loading_errors) or has_mismatched_sizes or "gguf_file" in options):
            raise
        cause = error.__cause__ if isinstance(error, StrictDataclassError) else None  # the error of the field
        lines = [line.strip() for line in str(cause or error).strip().splitlines()] or [type(error).__name__]
        reason = " ".join(lines)[:400] if lines[0].endswith(":") else lines[0]  # a list follows a colon
        if "trust_remote_code" in str(error):
            reason = (
                "the model's repository has its own code, which is not run by default. Read the code, and pass "
                "--trust-remote-code to run it with your permissions"
            )
        reason = "its tensors and its config have different shapes" if has_mismatched_sizes else reason
        raise PeftcoreError(f"cannot load the {label} of '{model}': {reason}") from error
