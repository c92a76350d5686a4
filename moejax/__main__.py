"""`python -m moejax`."""

from moejax.cli import main

main()
