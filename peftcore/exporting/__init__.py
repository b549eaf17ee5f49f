"""Models and adapters for other programs: vLLM and SGLang, PEFT, ONNX, and the formats of plugins.

It imports `files`, `quantization` and what is below them. Public names: `peftcore.export`; for plugins
`adapter_products`; and for the command line `find` and `options_of`.
"""

from peftcore.exporting.export import export as export, find as find, options_of as options_of
from peftcore.exporting.one_product import adapter_products as adapter_products
