"""`python -m steerlib`, and the command `steerlib`.

It exits with 0; with 1 where steerlib refuses; with 2 where the command or an option is misspelt; with 3 where a bank cannot be
trusted; with 130 where it is interrupted.
"""

import sys

from .errors import CorruptBank, MissingExtra, SteerlibError, UnknownFormat


def main() -> None:
    """Run the command line; what steerlib refuses is one line, not a traceback."""
    try:
        from .cli import app, state
    except MissingExtra as error:
        sys.exit(f"MissingExtra: {error}")
    try:
        app()
    except (SteerlibError, OSError) as error:
        if state["traceback"]:
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(3 if isinstance(error, (CorruptBank, UnknownFormat)) else 1)


if __name__ == "__main__":
    main()
