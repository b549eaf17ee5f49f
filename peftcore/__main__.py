"""`python -m peftcore` is the command `peftcore`."""

from peftcore.cli import main

main()
