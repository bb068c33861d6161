"""`python -m steerlib`."""

from .cli import main

main()
