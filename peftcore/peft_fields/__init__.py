"""The fields of an `adapter_config.json`, in Hugging Face PEFT's format: which method reads them, and what it reads."""

from peftcore.peft_fields.choosing import method_of_fields
from peftcore.peft_fields.config import COMMON, config_of_fields, guarded, with_own
from peftcore.peft_fields.defaults import defaults, peft_version, says_something

__all__ = [
    "COMMON",
    "config_of_fields",
    "defaults",
    "guarded",
    "method_of_fields",
    "peft_version",
    "says_something",
    "with_own",
]
