"""A model whose latents can be read and changed while it runs: a language model, an image pipeline, or one with known edges.

Readings are sparse and never negative: one row a unit (a token, a part of an image), one column a latent. A context is a
prompt or a seed; its units stand together.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csc_matrix, csr_matrix

from ...errors import UnknownConcept
from ...graph.causal_graph import CausalGraph

if TYPE_CHECKING:  # scipy says little of its types
    Codes: TypeAlias = Any
    Columns: TypeAlias = Any
else:
    Codes, Columns = csr_matrix, csc_matrix  # sparse readings, by row and by column
Contexts = NDArray[np.int64]
Do = Callable[[Codes], Codes]
"""From what a level would read to what it is to read: Pearl's do."""
NONE = -1
"""In place of a latent: nothing is ablated at this unit."""


class Reading(NamedTuple):
    """A level in one run."""

    natural: Codes
    """What it read, given all that was done before it."""
    flows: Codes
    """What went on from there: the same, unless something was done here."""


class System(ABC):
    """Runs are repeatable: same context, same random numbers, so that two runs differ only by the intervention."""

    batch: int = 2048
    """Contexts that one run is best given."""
    rates: tuple[float, float] = (1e-5, 0.1)
    """How often a latent has to fire, and may at most, to take part in discovery."""

    @property
    @abstractmethod
    def levels(self) -> Mapping[str, int]:
        """Latents of each level, in order of generation."""

    @abstractmethod
    def __len__(self) -> int:
        """Contexts there are."""

    @abstractmethod
    def run(self, contexts: Contexts, do: Mapping[str, Do] | None = None) -> Mapping[str, Reading]:
        """Read every level, doing something at some."""

    def owners(self, contexts: Contexts) -> NDArray[Any]:
        """Which of these contexts each unit of a run belongs to, by place; here a unit is a context."""
        return np.arange(len(contexts))

    @property
    def routes(self) -> Sequence[str]:
        """Ways from a unit to those it can act on; `same` is to itself."""
        return ("same",)

    def carried(self, route: str, z: Codes, contexts: Contexts) -> Codes:  # noqa: ARG002
        """Readings as they arrive by a route, for example the mean of the tokens before. Must be linear."""
        return z

    def weights(self, src: str, dst: str) -> tuple[Any, Any] | None:  # noqa: ARG002
        """Decoder rows of one level and encoder rows of a later one, where both are rows of one stream."""
        return None

    def place(self, name: str) -> tuple[str, int, float]:
        """Level and column of what is called so, and the unit that its effects are told in; here `level/index`, as it reads."""
        level, _, index = name.rpartition("/")
        if not index.isdecimal() or int(index) >= self.levels.get(level, 0):
            raise UnknownConcept(f"expected a latent by level/index, of {dict(self.levels)}, got {name!r}")
        return level, int(index), 1.0


def ablated(latents: NDArray[Any]) -> Do:
    """At each unit, one latent reads 0."""
    return lambda z: entries(z, np.where(z.indices == np.repeat(latents, np.diff(z.indptr)), 0, z.data))


def fixed(latents: NDArray[Any], values: NDArray[Any]) -> Do:
    """At each unit, one latent reads a value."""

    def do(z: Codes) -> Codes:
        own = csr((values.astype(z.dtype), latents, np.arange(z.shape[0] + 1)), shape=z.shape)
        return csr_matrix(ablated(latents)(z) + own)

    return do


def held(z: Codes) -> Do:
    """All latents read what they read in another run."""
    return lambda _: z


def thinned(share: float, random: np.random.Generator) -> Do:
    """A share of all latents that fire, drawn anew at every unit, reads 0."""
    return lambda z: entries(z, np.where(random.random(z.nnz) < share, 0, z.data))


def csr(*made: Any, **how: Any) -> Codes:
    """Sparse by row."""
    return csr_matrix(*made, **how)


def entries(z: Codes, values: NDArray[Any]) -> Codes:
    """The same places with other values; those that are 0 now are left out."""
    made = csr((values.astype(z.dtype), z.indices.copy(), z.indptr.copy()), shape=z.shape)
    made.eliminate_zeros()
    return made


class Around(System):
    """Another system with the same levels and contexts, seen or run in a way of one's own."""

    def __init__(self, inner: System):
        self.inner, self.batch, self.rates = inner, inner.batch, inner.rates

    @property
    def levels(self) -> Mapping[str, int]:
        return self.inner.levels

    def __len__(self) -> int:
        return len(self.inner)

    def owners(self, contexts: Contexts) -> NDArray[Any]:
        return self.inner.owners(contexts)

    @property
    def routes(self) -> Sequence[str]:
        return self.inner.routes

    def carried(self, route: str, z: Codes, contexts: Contexts) -> Codes:
        return self.inner.carried(route, z, contexts)

    def weights(self, src: str, dst: str) -> tuple[Any, Any] | None:
        return self.inner.weights(src, dst)

    def place(self, name: str) -> tuple[str, int, float]:
        return self.inner.place(name)


class Outcomes(Around):
    """Another system with a last level of outcomes, of which each context has one value, of either sign: a logit difference, a
    score, what a judge says. It stands at the context's last unit.

    Args:
        measures: by name, what gives the values `[C]` of some contexts while some is done at levels.

    >>> lengths = Outcomes(system, {"length": lambda contexts, do: texts(contexts, do)})  # doctest: +SKIP
    >>> verify_edges(lengths, [("layers.7/3", "length")])  # doctest: +SKIP
    """

    LEVEL = "outcome"

    def __init__(self, inner: System, measures: Mapping[str, Callable[[Contexts, Mapping[str, Do]], Any]]):
        super().__init__(inner)
        self.measures = dict(measures)

    @property
    def levels(self) -> Mapping[str, int]:
        return {**self.inner.levels, self.LEVEL: len(self.measures)}

    def run(self, contexts: Contexts, do: Mapping[str, Do] | None = None) -> Mapping[str, Reading]:
        """Outcomes are measured with levels set to what they read here: what is done by chance is done once."""
        done = {level: own for level, own in (do or {}).items() if level != self.LEVEL}
        found = self.inner.run(contexts, done)
        again = {level: held(found[level].flows) for level in done}
        values = np.stack([np.asarray(measure(contexts, again), np.float32) for measure in self.measures.values()], 1)
        owners, columns = self.owners(contexts), np.arange(len(self.measures))
        last = np.searchsorted(owners, np.arange(len(contexts)), side="right") - 1
        place = np.repeat(last, len(columns)), np.tile(columns, len(last))
        z = csr((values.ravel(), place), shape=(len(owners), len(columns)))
        return {**found, self.LEVEL: Reading(z, z)}

    def weights(self, src: str, dst: str) -> tuple[Any, Any] | None:
        return None if dst == self.LEVEL else self.inner.weights(src, dst)

    def place(self, name: str) -> tuple[str, int, float]:
        return (self.LEVEL, [*self.measures].index(name), 1.0) if name in self.measures else self.inner.place(name)


class Shuffled(Around):
    """The null: later levels are those of another context, in which the same was done with its own chance. No edge is true."""

    def __init__(self, inner: System, seed: int = 0):
        super().__init__(inner)
        order = np.random.default_rng(seed).permutation(len(inner))
        self._other = np.empty_like(order)
        self._other[order] = np.roll(order, 1)

    def run(self, contexts: Contexts, do: Mapping[str, Do] | None = None) -> Mapping[str, Reading]:
        first = next(iter(self.levels))
        own = self.inner.run(contexts)[first]
        done = (do or {}).get(first, lambda z: z)(own.natural)
        others = self.inner.run(self._other[contexts], do)
        return {**others, first: Reading(own.natural, done)}


def matrix(graph: CausalGraph, src: str, dst: str, shape: tuple[int, int], value: str = "weight") -> Codes:
    """Edges between latents of two levels, `[parents, children]`, with one of their figures."""
    found: dict[tuple[int, int], float] = {}
    for edge in graph.edges:
        (one, i), (other, j) = (name.rsplit("/", 1) for name in (edge.src, edge.dst))
        if (one, other) == (src, dst):
            found[int(i), int(j)] = getattr(edge, value) or 0.0
    rows, columns = np.array(list(found), int).reshape(-1, 2).T
    return csr((np.array(list(found.values()), np.float64), (rows, columns)), shape=shape)
