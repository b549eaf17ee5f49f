"""`peftcore push`: upload an adapter to Hugging Face's hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from peftcore.errors import PeftcoreError
from peftcore_cli import completion, options
from peftcore_cli.console import require, say

EXAMPLES = ("peftcore push run ORG/NAME", "peftcore push run ORG/NAME --update --message 'Two more epochs'")
# Pickles, which are unsafe to load, and checkpoint files that are only used to resume training.
NOT_UPLOADED = ["*.bin", "*.pt", "*.pth", "*.pkl", "*.tmp", "checkpoint-*", "runs/*", "complete.json"]
NOT_UPLOADED += ["trainer_state.json", "reference.safetensors"]
_LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN to a token with write access"


def push(
    adapter: Annotated[
        Path,
        typer.Argument(
            help="Folder of an adapter or a run.", callback=options.in_run, autocompletion=completion.adapters
        ),
    ],
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Name of the repository on the hub.")],
    *,
    public: Annotated[bool, typer.Option("--public", help="Make the new repository public; default: private.")] = False,
    update: Annotated[bool, typer.Option("--update", help="Upload to an existing repository.")] = False,
    message: Annotated[str, typer.Option(help="Commit message.")] = "Upload of an adapter with peftcore",
) -> None:
    """Upload an adapter with its model card and tokenizer to Hugging Face's hub.

    A new repository is private. Optimizer states and pickles are not uploaded.
    """
    import peftcore

    peftcore.inspect(adapter)  # raises a CheckpointError if the folder has no adapter
    if public and update:
        raise PeftcoreError(
            "--public only works for new repositories. Change the visibility of an existing repository in its settings"
        )
    require("huggingface_hub", extra="hub")
    from huggingface_hub import HfApi

    api = HfApi()
    _call_hub(lambda: api.whoami(), repository)
    if update:
        if not _call_hub(lambda: api.repo_exists(repository), repository):
            raise PeftcoreError(f"the repository '{repository}' was not found on the hub. Remove --update to create it")
    else:
        _call_hub(lambda: api.create_repo(repository, private=not public, exist_ok=False), repository)
    commit: Any = _call_hub(
        lambda: api.upload_folder(
            repo_id=repository, folder_path=adapter, commit_message=message, ignore_patterns=NOT_UPLOADED
        ),
        repository,
        "" if update else f" The repository '{repository}' was created and is empty: continue with --update",
    )
    say(f"{getattr(commit, 'repo_url', None) or repository}{'' if public or update else ' (private)'}")
    say(f"load it: peftcore.load(model, '{repository}')")


def _call_hub(call: Any, repository: str, next_step: str = "") -> Any:
    """Call the hub's client, and convert its errors to PeftcoreErrors."""
    from huggingface_hub import errors

    try:
        return call()
    except errors.LocalTokenNotFoundError as error:
        raise PeftcoreError(f"the upload to '{repository}' failed: no token of the hub was found. {_LOG_IN}") from error
    except errors.HFValidationError as error:
        raise PeftcoreError(f"'{repository}' is not a valid repository name: {error}. Pass ORG/NAME") from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        problem = {
            401: f"the hub rejects the token. {_LOG_IN}",
            403: f"the token has no write access to the repository. {_LOG_IN}, or choose another ORG",
            409: "the repository exists already. Choose another name, or pass --update to upload to the existing one",
        }.get(status or 0, f"the hub answered {status}: {' '.join(str(error).split())[:400]}. Try again later")
        raise PeftcoreError(f"the upload to '{repository}' failed: {problem}.{next_step}") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:400]
        raise PeftcoreError(
            f"the upload to '{repository}' failed: the hub cannot be reached ({type(error).__name__}: {reason}). "
            f"Check the network, HF_ENDPOINT and HF_HUB_OFFLINE.{next_step}"
        ) from error
