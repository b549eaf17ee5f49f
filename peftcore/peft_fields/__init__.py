"""Fields of an `adapter_config.json` in Hugging Face PEFT's format: which method reads them, and its config."""

from peftcore.peft_fields.defaults import defaults, peft_version, says_something
from peftcore.peft_fields.method_choice import method_of_fields, refuse_not_its_own, why_unknown
from peftcore.peft_fields.method_config import COMMON, config_of, config_of_fields, guarded, with_own
from peftcore.peft_fields.objects import config_of_peft, ends_within_a_name, is_of_peft

__all__ = [
    "COMMON",
    "config_of",
    "config_of_fields",
    "config_of_peft",
    "defaults",
    "ends_within_a_name",
    "guarded",
    "is_of_peft",
    "method_of_fields",
    "peft_version",
    "refuse_not_its_own",
    "says_something",
    "why_unknown",
    "with_own",
]
