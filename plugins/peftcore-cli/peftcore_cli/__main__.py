"""`python -m peftcore_cli` is the command `peftcore`."""

from peftcore_cli import main

main()
