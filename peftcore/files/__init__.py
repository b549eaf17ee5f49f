"""The files of adapters, in Hugging Face PEFT's format: reading, writing, and what they mean for a model.

It imports `engine` and what is below it. `peftcore` has `save`, `load`, `inspect`,
`state_dict` and `set_state_dict`.
"""

from peftcore.files.reading import vocabulary_rows as vocabulary_rows
