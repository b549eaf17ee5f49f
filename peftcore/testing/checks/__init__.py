"""The checks, in the order in which they run."""

from peftcore.testing.checks import acting, training, files, merging, running  # noqa: F401, I001  # each module registers its checks
from peftcore.testing.checks.register import CHECKS as CHECKS, Check as Check, name_of

# names of checks that methods are often excused from
IDENTITY = name_of(acting.identity)
MERGE = name_of(merging.merging)
COMPILE = name_of(running.compiling)
PEFT_READS = name_of(files.read_by_peft)
PEFT_WRITES = name_of(files.written_by_peft)
