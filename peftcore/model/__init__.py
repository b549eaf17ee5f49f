"""Facts about a model, read from its modules and config or observed in a forward pass on small example inputs."""

from peftcore.model.batches import gradients_of as gradients_of, inputs_of as inputs_of, run as run
from peftcore.model.bypass import (
    bypassed_layers as bypassed_layers,
    describe_reader as describe_reader,
    external_reads as external_reads,
    layers_read_for_dtype as layers_read_for_dtype,
    modules_without_gradients as modules_without_gradients,
    rewritten_layers as rewritten_layers,
)
from peftcore.model.detecting import detect as detect
from peftcore.model.inputs import example_inputs as example_inputs
from peftcore.model.tracing import (
    assuming_unchanged as assuming_unchanged,
    cached_by_model as cached_by_model,
    observe as observe,
    share_cache as share_cache,
)
