"""Adapter files in PEFT's format: reading, writing, and checking that they fit a model.

`peftcore` exports `save`, `load`, `inspect`, `state_dict` and `set_state_dict`. This package also exports what training
programs need: additions to the model card, the config of an adapter before it is loaded, and its vocabulary size.
"""

from peftcore.files.model_card import add_to_card as add_to_card, code_span as code_span
from peftcore.files.reading import config_of_folder as config_of_folder, vocabulary_rows as vocabulary_rows
