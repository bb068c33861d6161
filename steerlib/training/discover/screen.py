"""Which latents may act on which: pairs that fire together more than by chance, and pairs whose weights point at each other.

n_p, n_c, n_pc   units on which a parent, a child, both fire     N   units
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import vstack
from torch import Tensor

from ...text import progress
from .systems import Codes, csr, entries

CHUNK = 512
"""Children looked at together: of all pairs, only these are ever in memory."""


def chunks(size: int) -> list[slice]:
    """The children, some at a time."""
    return [slice(start, min(start + CHUNK, size)) for start in range(0, size, CHUNK)]


def in_threads(work: Any, items: Any, what: str) -> Iterator[Any]:
    """Results in order, by all cores (sparse products let go of Python's lock), with a progress bar."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from progress(pool.map(work, items), what, total=len(items), disable=len(items) < 4)


def firing_together(parents: Codes, children: Codes, *, most: int = 64, least: int = 20, lift: float = 5.0) -> Codes:
    """Candidates `[children, parents]`, by their lift `(n_pc - n_p n_c / N) / sqrt(n_p n_c / N + 1)`.

    For each child at most `most`, with `n_pc >= least` and more than `lift`: three standard deviations of a Poisson count and
    some to spare.
    """
    parents, children = (entries(z, np.ones(z.nnz, np.float32)) for z in (parents, children))
    often = np.asarray(parents.sum(0)).ravel(), np.asarray(children.sum(0)).ravel()
    columns = children.tocsc()

    def chunk(of: slice) -> Codes:
        both = csr(columns[:, of].T.tocsr() @ parents)
        child = np.repeat(np.arange(both.shape[0]), np.diff(both.indptr))
        enough = both.data >= least
        child, parent, count = child[enough], both.indices[enough], both.data[enough]
        expected = often[0][parent] * often[1][of][child] / parents.shape[0]
        score = (count - expected) / np.sqrt(expected + 1)
        return largest(child[score > lift], parent[score > lift], score[score > lift], both.shape, most)

    return stacked(in_threads(chunk, chunks(children.shape[1]), "firing together"), parents.shape[1])


def pointing(weights: tuple[Tensor, Tensor], *, most: int = 16) -> Codes:
    """Candidates `[children, parents]` by virtual weight `|<d_p, e_c>|`: effects too rare to be seen together."""
    decoder, encoder = (w.float() for w in weights)

    def chunk(of: slice) -> Codes:
        score, parent = (encoder[of] @ decoder.T).abs().topk(min(most, len(decoder)))
        child = np.repeat(np.arange(len(score)), score.shape[1])
        return largest(child, parent.flatten().numpy(), score.flatten().numpy(), (len(score), len(decoder)), most)

    return stacked((chunk(of) for of in chunks(len(encoder))), len(decoder))


def largest(child: NDArray[Any], parent: NDArray[Any], score: NDArray[Any], shape: tuple[int, int], most: int) -> Codes:
    """The candidates of each child with the highest scores."""
    order = np.lexsort((parent, -score, child))
    child, parent = child[order], parent[order]
    rank = np.arange(len(child)) - np.searchsorted(child, child)
    kept = rank < most
    return csr((np.ones(kept.sum(), bool), (child[kept], parent[kept])), shape=shape)


def stacked(parts: Any, width: int) -> Codes:
    """Chunks of children, one below the other."""
    found = list(parts)
    return csr(vstack(found)) if found else csr((0, width), dtype=bool)
