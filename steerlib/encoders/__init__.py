"""Encoders: activation <-> coordinates, one kind a file."""

from .base import KINDS as KINDS
from .base import Encoder as Encoder
from .base import Rows as Rows
from .batchtopk import BatchTopK as BatchTopK
from .directions import Directions as Directions
from .gated import Gated as Gated
from .jumprelu import JumpReLU as JumpReLU
from .matryoshka import Matryoshka as Matryoshka
from .relu import ReLU as ReLU
from .sparse import Sparse as Sparse
from .topk import TopK as TopK
from .transcoder import Transcoder as Transcoder

__all__ = [
    "KINDS",
    "BatchTopK",
    "Directions",
    "Encoder",
    "Gated",
    "JumpReLU",
    "Matryoshka",
    "ReLU",
    "Rows",
    "Sparse",
    "TopK",
    "Transcoder",
]
