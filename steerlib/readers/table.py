"""What each setting of a format means to a reading. A setting that nobody listed is refused, never ignored."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UnknownFormat
from .foreign import refuse

UNSET = (None, False, 0, "", "none", [], {})
"""Values of a setting by which it does nothing."""


class Table:
    """The settings that the writers of a format may set.

    Args:
        read: names of those that the reader takes into account.
        aside: names of those that no reading depends on: how it was trained, on what, on which device.
        only: those that readings depend on, and the values that the reader computes; all others are refused.
    """

    def __init__(self, *, read: str = "", aside: str = "", only: Mapping[str, Sequence[Any]] | None = None):
        self.read, self.aside, self.only = frozenset(read.split()), frozenset(aside.split()), dict(only or {})

    def check(self, path: Path, values: Mapping[str, Any], ignore: Iterable[str] = (), what: str = "the setting") -> None:
        """Raise `UnknownFormat` for a value that the reader does not compute, or a setting that is none of these."""
        for key, value in values.items():
            if key in self.only and value not in self.only[key]:
                known = ", ".join(dict.fromkeys(repr(each) for each in self.only[key]))
                refuse(path, f"of {key}={value!r:.80}", f"the reader computes {known}")
            if key not in self.read | self.aside | self.only.keys() | {*ignore} and value not in UNSET:
                raise UnknownFormat(
                    f"{path.name} has {what} {key}={value!r:.80}, of which this reader does not know whether readings depend "
                    f"on it; if they do not, give ignore=[{key!r}]"
                )

    def check_tensors(self, path: Path, tensors: Iterable[str], ignore: Iterable[str] = ()) -> None:
        """Raise `UnknownFormat` for tensors that the reader has no place for."""
        if others := sorted({*map(str, tensors)} - self.read - self.aside - {*ignore}):
            raise UnknownFormat(
                f"{path.name} has tensors {', '.join(others)!s:.200}, which its kind does not have and no encoder here would "
                f"use; if readings do not depend on them, give ignore={others}"
            )
