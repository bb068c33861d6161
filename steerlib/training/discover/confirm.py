"""Edges put to the test: one latent is ablated alone, in contexts that nothing was fitted to.

p -> c  an edge     z  readings, without and with do(z_p = 0)     M  contexts     U  their units     C  children of p
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.stats import t as student

from .rows import Folder
from .systems import NONE, Codes, Columns, Contexts, Do, System, ablated, csr, fixed, held

CONFIRMED = 64
"""Contexts in which each parent is ablated: an edge of slope 0.5, its gate half open, is always found (measured)."""
FEWEST = 16
"""With fewer to be had, an edge stays untested."""
LEAST_EFFECT = 0.05
"""Share of the child's 90 % reading that a parent at its own has to make, or more …"""
NEEDED = 0.5
"""… unless without it the child loses this share of what it reads: one of several that all have to be there."""
RESAMPLED = 2000
FDR = 0.05
"""Share of accepted edges that may be false."""


class Confirmation(NamedTuple):
    """Edges between two levels that could be tested, an entry each."""

    parent: NDArray[Any]
    child: NDArray[Any]
    tau: NDArray[Any]
    """`E[z_c - z_c | do(z_p = 0)] / E[z_p]` over contexts with p; levels in between are held."""
    low: NDArray[Any]
    high: NDArray[Any]
    p: NDArray[Any]
    """That it is 0, by Student's t of `d - tau z_p`."""
    necessity: NDArray[Any]
    """NaN where the two never fire at one unit."""
    sufficiency: NDArray[Any]
    contexts: NDArray[Any]
    matters: NDArray[Any]
    """Whether `|tau| q90_p >= 0.05 q90_c`, or the child needs it."""

    def holds(self, q: NDArray[Any]) -> NDArray[Any]:
        """Which edges pass, given their p-values adjusted for all that were tested."""
        return (q <= FDR) & self.matters & ((self.low > 0) | (self.high < 0))

    def facts(self, i: int, q: float) -> dict[str, Any]:
        """What an `Edge` says of the i-th, in the units of the readings."""
        figures = {"tau": self.tau, "tau_lo": self.low, "tau_hi": self.high, "sufficiency": self.sufficiency}
        needed = None if np.isnan(self.necessity[i]) else float(self.necessity[i])
        found = {name: float(values[i]) for name, values in figures.items()}
        return {**found, "necessity": needed, "n_verify": int(self.contexts[i]), "p_adj": q, "evidence": "verified"}


class Trials(NamedTuple):
    """One parent in its contexts, without and with what was done to it."""

    before: Float[NDArray, "U C"]
    after: Float[NDArray, "U C"]
    z: Float[NDArray, " U"]
    """What the parent reads before, where something is done to it."""
    owner: Int[NDArray, " U"]
    """The context of each unit."""

    def sums(self, values: NDArray[Any]) -> NDArray[Any]:
        """Added up over the units of each context."""
        total = np.zeros((int(self.owner.max(initial=-1)) + 1, *values.shape[1:]))
        np.add.at(total, self.owner, values)
        return total


@dataclass(frozen=True)
class Pair:
    """Two levels, the edges proposed between them, and what all levels read in contexts kept for tests."""

    system: System
    contexts: Contexts
    seen: Mapping[str, Codes]
    src: str
    dst: str
    edges: Codes
    """`[parents, children]`."""
    whole: bool = False
    """Whether levels in between go on with what reaches them, so that effects are total; else they keep their readings."""

    @cached_property
    def columns(self) -> tuple[Columns, Columns]:
        return self.seen[self.src].tocsc(), self.seen[self.dst].tocsc()

    @cached_property
    def high(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """The 90 % quantile of what each latent of either level reads where it fires."""
        return ninety(self.columns[0]), ninety(self.columns[1])

    @cached_property
    def owners(self) -> NDArray[Any]:
        return self.system.owners(self.contexts)

    def firing(self, parent: int) -> NDArray[Any]:
        """Contexts in which a parent fires, by place."""
        z = self.columns[0]
        return np.unique(self.owners[z.indices[z.indptr[parent] : z.indptr[parent + 1]]])

    def children(self, parent: int) -> NDArray[Any]:
        return self.edges.indices[self.edges.indptr[parent] : self.edges.indptr[parent + 1]].astype(np.int64)

    def trials(
        self,
        parents: Sequence[int],
        places: Sequence[NDArray[Any]],
        do: Callable[[NDArray[Any]], Do],
        *,
        once: np.random.Generator | None = None,
    ) -> list[Trials]:
        """Do something to each parent in its own contexts, all in one run; `once`: at one unit of each where it fires."""
        chosen = np.concatenate(places)
        if not len(chosen):
            return [Trials(none := np.empty((0, len(self.children(p)))), none, np.empty(0), np.empty(0, int)) for p in parents]
        starts, ends = (np.searchsorted(self.owners, chosen, side=side) for side in ("left", "right"))
        units = np.concatenate([np.arange(a, b) for a, b in zip(starts, ends, strict=True)])
        latents = np.repeat(np.repeat(parents, [len(some) for some in places]), ends - starts)
        names, z = list(self.system.levels), np.asarray(self.seen[self.src][units, latents]).ravel()
        moved = np.ones(len(units), bool)
        if once is not None:
            fires = once.permutation(np.flatnonzero(z > 0))
            _, first = np.unique(np.repeat(np.arange(len(chosen)), ends - starts)[fires], return_index=True)
            moved = np.isin(np.arange(len(units)), fires[first])
        between = [] if self.whole else names[names.index(self.src) + 1 : names.index(self.dst)]
        kept = {name: held(csr(self.seen[name][units])) for name in between}
        done = do(np.where(moved, latents, NONE))
        run = self.system.run(self.contexts[chosen], {self.src: done, **kept})[self.dst].natural
        bounds = np.searchsorted(latents, parents, side="left"), np.searchsorted(latents, parents, side="right")
        found = []
        for p, some, first, last in zip(parents, places, *bounds, strict=True):
            own, children = units[first:last], self.children(p)
            before = self.seen[self.dst][own][:, children].toarray()
            after = run[first:last][:, children].toarray()
            read = np.where(moved, z, 0)[first:last]
            found.append(Trials(before, after, read, np.searchsorted(np.sort(some), self.owners[own])))
        return found


def ninety(z: Columns) -> NDArray[Any]:
    """90 % quantile of the size of each column where it is not 0; 0 where it always is."""
    return np.array([np.quantile(abs(part), 0.9) if len(part) else 0.0 for part in np.split(z.data, z.indptr[1:-1])])


def confirmed(pair: Pair, folder: Folder, *, seed: int = 0, only: Collection[int] | None = None) -> Confirmation:
    """Ablate each parent, or `only` some, alone where it fires, and set it to its 90 % reading where it does not."""
    parents = [p for p in np.flatnonzero(np.diff(pair.edges.indptr)).tolist() if only is None or p in only]
    parents = [p for p in parents if len(pair.firing(p)) >= FEWEST]
    each, jobs = max(1, pair.system.batch // CONFIRMED), {}
    for start in range(0, len(parents), each):
        group = parents[start : start + each]
        name = f"{'total' if pair.whole else 'verified'}-{pair.src}-{pair.dst}-{group[0]:07}".replace("/", "-")
        jobs[name] = lambda group=group: _group(pair, group, seed)._asdict()
    found = folder.all(jobs, f"verifying {pair.src} to {pair.dst}")
    return Confirmation(*(np.concatenate([np.empty(0, kind), *(part[name] for part in found)]) for name, kind in KINDS.items()))


KINDS: dict[str, Any] = dict.fromkeys(Confirmation._fields, np.float64) | {"matters": np.bool_}
KINDS |= dict.fromkeys(("parent", "child", "contexts"), np.int64)


def _group(pair: Pair, parents: Sequence[int], seed: int) -> Confirmation:
    """Some parents, all their trials in two runs."""
    random, everywhere = np.random.default_rng([seed, *parents]), np.arange(len(pair.contexts))
    on = [np.sort(random.permutation(pair.firing(p))[:CONFIRMED]) for p in parents]
    off = [np.sort(random.permutation(np.setdiff1d(everywhere, pair.firing(p)))[:CONFIRMED]) for p in parents]
    taken = pair.trials(parents, on, ablated)
    given = pair.trials(parents, off, lambda latents: fixed(latents, pair.high[0][latents]))
    parts = [_edges(pair, p, a, b) for p, a, b in zip(parents, taken, given, strict=True)]
    return Confirmation(*map(np.concatenate, zip(*parts, strict=True)))


def _edges(pair: Pair, parent: int, taken: Trials, given: Trials) -> Confirmation:
    """The effect of one parent on each child, from its trials."""
    children = pair.children(parent)
    m, z = taken.sums(taken.z), taken.z[:, None] > 0
    effect = effects(taken.sums(taken.before - taken.after), m)
    both = (taken.before > 0) & z
    without, whole = ((values * both).sum(0) for values in (taken.after, taken.before))
    necessity = np.where(whole > 0, 1 - without / np.maximum(whole, 1e-12), np.nan)
    high, own = pair.high[1][children], pair.high[0][parent]
    n = np.ones(len(children), np.int64)
    return Confirmation(
        parent * n,
        children,
        *effect,
        necessity=necessity,
        sufficiency=given.after.mean(0) / np.maximum(high, 1e-12) if len(given.after) else 0.0 * n,
        contexts=len(m) * n,
        matters=(np.abs(effect[0]) * own >= LEAST_EFFECT * high) | (necessity >= NEEDED),
    )


def effects(d: Float[NDArray, "M C"], m: Float[NDArray, " M"]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """`tau = sum d / sum m`, its 95 % interval by bootstrap over contexts, and the probability under no effect."""
    tau = d.sum(0) / m.sum()
    drawn = resamples(len(m))
    low, high = np.quantile((drawn @ d) / (drawn @ m)[:, None], (0.025, 0.975), axis=0)
    error = np.sqrt(np.square(d - tau * m[:, None]).sum(0) / (len(m) * (len(m) - 1))) / m.mean()
    with np.errstate(divide="ignore", invalid="ignore"):
        p = np.where(tau == 0, 1.0, 2 * student.sf(np.abs(tau) / error, len(m) - 1))
    return tau, low, high, p


@cache
def resamples(n: int) -> Float[NDArray, "draws n"]:
    """How often each of n contexts is drawn, in every resample."""
    return np.random.default_rng(n).multinomial(n, np.full(n, 1 / n), RESAMPLED).astype(np.float64)


def adjusted(p: NDArray[Any]) -> NDArray[Any]:
    """p-values for many tests at once: below q, at most a share q of the rejected is false (Benjamini & Hochberg 1995)."""
    order = np.argsort(-p, kind="stable")
    scaled = np.minimum.accumulate(p[order] * len(p) / np.arange(len(p), 0, -1))
    made = np.empty_like(p)
    made[order] = np.minimum(scaled, 1)
    return made
