"""The files of adapters, in Hugging Face PEFT's format: reading, writing, and what they mean for a model.

It imports `engine` and what is below it. `peftcore` has `save`, `load`, `inspect`, `state_dict` and
`set_state_dict`; this package has what programs that train need besides: the model card, the config of an adapter
before it is loaded, and the size of a vocabulary.
"""

from peftcore.files.model_card import add_to_card as add_to_card, code_span as code_span
from peftcore.files.reading import config_of_folder as config_of_folder, vocabulary_rows as vocabulary_rows
