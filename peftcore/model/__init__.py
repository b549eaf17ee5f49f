"""Facts about a model, read from it or observed in a forward pass with small example inputs.

It imports `plugin` and `ops`.
"""

from peftcore.model.batches import gradients_of as gradients_of, inputs_of as inputs_of, run as run
from peftcore.model.bypass import (
    asked_for_dtype as asked_for_dtype,
    bypassed as bypassed,
    read_by_others as read_by_others,
    reader_named as reader_named,
    rewritten as rewritten,
    without_gradients as without_gradients,
)
from peftcore.model.detecting import detect as detect
from peftcore.model.inputs import example_inputs as example_inputs
from peftcore.model.tracing import (
    assumed_unchanged as assumed_unchanged,
    cached_by_model as cached_by_model,
    observe as observe,
    share_facts as share_facts,
)
