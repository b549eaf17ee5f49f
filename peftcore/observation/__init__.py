"""Facts about a model, read from it or observed in a forward pass with small example inputs."""

from peftcore.observation.batches import gradients_of, inputs_of, run
from peftcore.observation.bypass import asked_for_dtype, bypassed, rewritten
from peftcore.observation.detecting import detect
from peftcore.observation.inputs import example_inputs
from peftcore.observation.tracing import Trace, known_as, left_as_it_is, observe, once_a_model, trace

__all__ = [
    "Trace",
    "asked_for_dtype",
    "bypassed",
    "detect",
    "example_inputs",
    "gradients_of",
    "inputs_of",
    "known_as",
    "left_as_it_is",
    "observe",
    "once_a_model",
    "rewritten",
    "run",
    "trace",
]
