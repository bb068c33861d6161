"""Encoders turn activations into coordinates and back; one kind a file.

Every file of this folder is imported. So a new file with a subclass of `Encoder` is a kind that banks can hold, and one that
`fit` can train if it has an `objective`, without an edit elsewhere.
"""

from importlib import import_module
from pkgutil import iter_modules

from .base import KINDS as KINDS
from .base import Encoder as Encoder
from .base import Rows as Rows
from .batchtopk import BatchTopK as BatchTopK
from .codebook import Codebook as Codebook
from .context import Context as Context
from .directions import Directions as Directions
from .gated import Gated as Gated
from .jumprelu import JumpReLU as JumpReLU
from .matryoshka import Matryoshka as Matryoshka
from .relu import ReLU as ReLU
from .sparse import Sparse as Sparse
from .topk import TopK as TopK
from .transcoder import Transcoder as Transcoder

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")
