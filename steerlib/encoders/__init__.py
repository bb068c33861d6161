"""Encoders: activation <-> coordinates, one kind a file."""

from .base import KINDS as KINDS
from .base import Encoder as Encoder
from .base import Rows as Rows
from .directions import Directions as Directions

__all__ = ["KINDS", "Directions", "Encoder", "Rows"]
