"""Configs of other programs as options of `peftcore train`: axolotl, LLaMA-Factory, torchtune.

A module per program has `convert`, which takes the keys that have a counterpart, and tables of other keys: `NOTHING`
for what happens anyway, `NOT_HERE` for what peftcore does not have, with what to do instead. The pages in
docs/coming-from explain them.
"""

from __future__ import annotations

from peftcore.plugin import PeftcoreError
from peftcore_convert_config import axolotl, llama_factory, torchtune
from peftcore_convert_config.reading import Reading, asks

PROGRAMS = {"axolotl": axolotl, "llama-factory": llama_factory, "torchtune": torchtune}


def program_of(config: dict[str, object]) -> str:
    """Return the name of the program that a config is for, by its keys.

    Raises:
        PeftcoreError: it is none that is known.
    """
    if isinstance(config.get("model"), dict) or isinstance(config.get("checkpointer"), dict):
        return "torchtune"
    if config.keys() & {"finetuning_type", "model_name_or_path", "peft_config"}:
        return "llama-factory"
    if "base_model" in config:
        return "axolotl"
    raise PeftcoreError(
        "the config is of no program that is known: axolotl's have 'base_model', LLaMA-Factory's 'model_name_or_path', "
        "torchtune's 'checkpointer'. Write the options by hand: peftcore train --help"
    )


def convert(config: dict[str, object]) -> Reading:
    """Return a config's options for `peftcore train`, and what they leave out.

    Raises:
        PeftcoreError: the program is not known, or the config asks for a training that peftcore does not have.
    """
    program = PROGRAMS[program_of(config)]
    reading = Reading(config)
    program.convert(reading)
    options = reading.options
    if options.get("task") == "kto" and options.get("batch_size") == 1:  # answers of a batch are compared
        options |= {"batch_size": 2, "grad_accum": max(1, options.get("grad_accum", 1) // 2)}
    for key in reading.left():
        if key in program.NOTHING:
            continue
        reading.leave_out(key, program.NOT_HERE.get(key, "not known here; look it up in the program's documentation"))
    return reading


__all__ = ["PROGRAMS", "Reading", "asks", "convert", "program_of"]
