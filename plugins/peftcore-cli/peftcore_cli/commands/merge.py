"""`peftcore merge`: merge an adapter and write a plain transformers folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from peftcore.errors import PeftcoreError
from peftcore_cli import options
from peftcore_cli.console import say

EXAMPLES = ("peftcore merge run -o merged",)


def merge(
    adapter: options.Adapter,
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder to write the merged model to.")],
    model: options.BaseModel = None,
    trust_remote_code: options.TrustRemoteCode = False,  # `app` reads this option
    labels: options.Labels = None,
    shard_size: Annotated[str, typer.Option(help="Maximum size of each weight file, such as 5GB.")] = "5GB",
    untie: Annotated[bool, typer.Option("--untie", help="Untie an adapted embedding from the output head.")] = False,
    quantize: options.Quantize = None,
    dtype: options.WrittenDtype = "auto",
    device: options.Device = "auto",
) -> None:
    """Merge an adapter into its base and write a folder that transformers loads without peftcore.

    If the adapter was saved with a tokenizer, that tokenizer is written instead of the base's.

    With --quantize, the adapter is merged into the dequantized 4-bit weights.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise PeftcoreError(f"'{output}' exists already. Pass a new folder: --output FOLDER")
    if not re.fullmatch(r"\d+(\.\d+)?\s*[KMGT]B", shard_size.strip().upper()):
        raise PeftcoreError(
            f"--shard-size must be a number with a unit (KB, MB, GB, TB), such as 5GB, found '{shard_size}'"
        )
    from peftcore_cli.bases import adapter_folders, base_and_adapter, base_quantization, models
    from peftcore_cli.tasks import conversations, registered, text_generation

    task, base = adapter_folders.adapter_task(adapter, labels), adapter_folders.base_of(adapter, model)
    tokenizer = registered.find(task.task).load_processor(base, adapter)
    conversations.set_template(tokenizer, None, task.chat_template)
    base_as = base_quantization.of_adapter(quantize, adapter, task)
    loaded_model = models.load_model(base, task.task, dtype=dtype, device=device, labels=task.labels, quantize=base_as)
    base_and_adapter.load_adapter(loaded_model, adapter)
    base_and_adapter.merge_adapter(loaded_model, untie=untie, quantize=base_as, dtype=dtype, device=device)
    if (
        adapter_folders.has_tokenizer(adapter) and loaded_model.can_generate()
    ):  # the adapter's answers may end with a token of its own
        loaded_model.generation_config.eos_token_id = text_generation.end_tokens(
            loaded_model, conversations.tokenizer_of(tokenizer)
        )
    try:
        loaded_model.save_pretrained(output, max_shard_size=shard_size)
        tokenizer.save_pretrained(output)
        registered.find(task.task).write_merged(output, loaded_model, task, base)
    except OSError as error:
        raise PeftcoreError(
            f"cannot save the merged model to '{output}': {error.strerror or error}. Pass another folder: --output "
            "FOLDER"
        ) from error
    size = sum(file.stat().st_size for file in output.iterdir())
    say(f"{output} ({size / 1e6:.1f} MB): {type(loaded_model).__name__} with the adapter merged in")
