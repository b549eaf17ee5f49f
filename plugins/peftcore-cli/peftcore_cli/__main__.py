"""`python -m peftcore_cli` runs the command `peftcore`."""

from peftcore_cli import main

main()
