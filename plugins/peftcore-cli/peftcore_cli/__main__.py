"""`python -m peftcore` is the command `peftcore`."""

from peftcore_cli import main

main()
