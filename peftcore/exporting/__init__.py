"""Models and adapters for other programs: vLLM and SGLang, PEFT, ONNX, and the formats of plugins.

It imports `files`, `quantization` and what is below them. Public names: `peftcore.export`; for plugins
`adapter_products`; `formats`, `find`, `options_of` and `model_file`: what installed formats have.
"""

from peftcore.exporting.export import (
    export as export,
    find as find,
    formats as formats,
    model_file as model_file,
    options_of as options_of,
)
from peftcore.exporting.one_product import adapter_products as adapter_products
