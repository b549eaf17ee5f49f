"""When the command began: imported before everything that takes seconds to import."""

import time

STARTED = time.perf_counter()
