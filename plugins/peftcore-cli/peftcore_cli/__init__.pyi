"""The public names for type checkers; programs read the table in `__init__.py`."""

from peftcore_cli import (
    amounts as amounts,
    completion as completion,
    config_file as config_file,
    console as console,
    options as options,
    settings as settings,
)
from peftcore_cli.bases import (
    adapter_folders as adapter_folders,
    base_and_adapter as base_and_adapter,
    base_files as base_files,
    base_quantization as base_quantization,
    device_choice as device_choice,
    dtype_choice as dtype_choice,
    models as models,
)
from peftcore_cli.bases.adapter_folders import AdapterTask as AdapterTask, Quantization as Quantization
from peftcore_cli.data import data_files as data_files, row_reading as row_reading
from peftcore_cli.data.row import Messages as Messages, Row as Row
from peftcore_cli.tasks import (
    conversations as conversations,
    metrics as metrics,
    registered as registered,
    text_generation as text_generation,
)
from peftcore_cli.tasks.encoded_examples import Encoded as Encoded, Example as Example
from peftcore_cli.tasks.metrics import Metrics as Metrics
from peftcore_cli.tasks.task import Evaluation as Evaluation, Task as Task
from peftcore_cli.training import (
    chart as chart,
    run_result as run_result,
    training_data as training_data,
    training_run as training_run,
)

def main() -> None: ...
