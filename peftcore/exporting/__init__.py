"""Export models and adapters to other programs: vLLM and SGLang, PEFT, ONNX, and formats added by plugins.

It imports `files`, `quantization` and what is below them. Public names: `peftcore.export`, and `adapter_products` for
plugins. `formats`, `find`, `options_of` and `model_file` describe the installed formats to the command line.
"""

from peftcore.exporting.export import (
    export as export,
    find as find,
    formats as formats,
    model_file as model_file,
    options_of as options_of,
)
from peftcore.exporting.one_product import adapter_products as adapter_products
