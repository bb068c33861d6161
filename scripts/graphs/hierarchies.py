"""Generators whose concepts and edges are known, to measure what discovery finds.

`Layers`     levels of sparse latents, gated rectified mechanisms, groups that fire together; hidden common causes on request
`Selection`  wholes that are selected by all of their parts
`Imperfect`  any of these, read by a dictionary that mixes and misses
`Encoded`    any of these in superposition, read and moved through encoders that were learned
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from torch import Tensor

from steerlib.encoders import Sparse
from steerlib.errors import Unanswerable
from steerlib.training.discover.systems import Around, Codes, Contexts, Do, Reading, System, csr, entries

SLOPES = (0.5, 1.5)
"""Between which the effects of parents are drawn."""
DEAF = 0.3
"""What superposition lets through, and later levels do not read."""
Truth = Mapping[tuple[str, str], Codes]
"""For two levels, the effect of each latent of one on each of the other: change of the mean per unit of change."""


class Layers(System):
    """`z_c = relu(sum_p g_pc w_pc z_p + s_c)`: gates `g` open by chance at every unit and edge, `s` fires by itself.

    Latents of the first level fire in groups, at `rate` in all, `together` of it when their group does. A share `fed` of the
    latents of later levels has parents. Each of the `hidden` causes makes some latents of every level fire.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        contexts: int,
        *,
        parents: tuple[int, int] = (1, 3),
        negative: float = 0.0,
        skips: float = 0.0,
        dropout: float = 0.0,
        group: int = 8,
        together: float = 0.5,
        rate: float = 0.01,
        spontaneous: float = 0.002,
        fed: float = 0.5,
        hidden: int = 0,
        reach: int = 3,
        seed: int = 0,
    ):
        """`negative`: share of edges that inhibit; `skips`: share that come from two levels before; `dropout`: how often a gate
        is shut; `reach`: latents of a level that a hidden cause moves, each four times out of five."""
        random = np.random.default_rng(seed)
        self._names = {f"level{k}": size for k, size in enumerate(sizes)}
        self._contexts, self.dropout, self.seed, self.group = contexts, dropout, np.uint64(seed), group
        self._edges: dict[tuple[int, int], Codes] = {}
        for k in range(1, len(sizes)):
            self._join(k, sizes, parents, negative, skips, fed, random)
        own = [_in_groups(contexts, sizes[0], group, together, rate, random)]
        own += [_alone(contexts, size, spontaneous, random) for size in sizes[1:]]
        for k, moved in enumerate(_moved_by_hidden(contexts, sizes, hidden, reach, rate, random)):
            own[k] = csr(own[k] + moved)
        self._own = own

    def _join(
        self,
        k: int,
        sizes: Sequence[int],
        parents: tuple[int, int],
        negative: float,
        skips: float,
        fed: float,
        random: np.random.Generator,
    ) -> None:
        """Draw the parents of a level."""
        children = np.flatnonzero(random.random(sizes[k]) < fed)
        children = np.repeat(children, random.integers(parents[0], parents[1] + 1, len(children)))
        back = 1 + ((random.random(len(children)) < skips) & (k > 1))
        w = random.uniform(*SLOPES, len(children)) * np.where(random.random(len(children)) < negative, -1, 1)
        for step in np.unique(back):
            chosen, size = back == step, sizes[k - step]
            place = random.integers(size, size=chosen.sum()), children[chosen]
            drawn = coo_matrix((w[chosen].astype(np.float32), place), shape=(size, sizes[k])).tocsr()
            self._edges[k - int(step), k] = drawn

    @property
    def levels(self) -> Mapping[str, int]:
        return self._names

    def __len__(self) -> int:
        return self._contexts

    @property
    def truth(self) -> Truth:
        """Direct effects, exact where no edge inhibits."""
        names = list(self._names)
        return {(names[j], names[k]): csr(w * (1 - self.dropout)) for (j, k), w in self._edges.items()}

    def run(self, contexts: Contexts, do: Mapping[str, Do] | None = None) -> Mapping[str, Reading]:
        flows: list[Codes] = []
        found: dict[str, Reading] = {}
        for k, name in enumerate(self._names):
            z = self._own[k][contexts]
            for j in range(k):
                if (j, k) in self._edges:
                    z = z + self._gated(flows[j], (j, k), contexts)
            z = csr(z)
            natural = entries(z, np.maximum(z.data, 0))
            found[name] = Reading(natural, do[name](natural) if do and name in do else natural)
            flows.append(found[name].flows)
        return found

    def _gated(self, z: Codes, pair: tuple[int, int], contexts: Contexts) -> Codes:
        """What arrives through the gates that are open."""
        w = self._edges[pair]
        if not self.dropout:
            return csr(z @ w)
        unit = np.repeat(np.arange(z.shape[0]), np.diff(z.indptr))
        fan = np.diff(w.indptr)[z.indices]
        edge = np.repeat(w.indptr[z.indices], fan) + np.arange(fan.sum()) - np.repeat(fan.cumsum() - fan, fan)
        unit, amount = np.repeat(unit, fan), np.repeat(z.data, fan) * w.data[edge]
        key = np.uint64(contexts[unit]) * np.uint64(1 << 32) + np.uint64(edge) + np.uint64(7 * pair[0] + pair[1] << 58)
        is_open = chance(key, self.seed) >= self.dropout
        place = unit[is_open], w.indices[edge[is_open]]
        return coo_matrix((amount[is_open], place), shape=(z.shape[0], w.shape[1])).tocsr()


def chance(key: Any, seed: np.uint64) -> NDArray[Any]:
    """A number from 0 to 1 that depends on a key alone (splitmix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        x = key + (seed + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


def _alone(n: int, size: int, rate: float | NDArray[Any], random: np.random.Generator) -> Codes:
    """Latents that fire each by itself, amounts from 0.5 to 1.5."""
    count = random.binomial(n, rate, size)
    place = random.integers(n, size=count.sum()), np.repeat(np.arange(size), count)
    return _readings(place, (n, size), random)


def _in_groups(n: int, size: int, group: int, together: float, rate: float, random: np.random.Generator) -> Codes:
    """Latents of which neighbours fire together."""
    events = _alone(n, -(-size // group), rate, random).tocoo()
    member = (events.col[:, None] * group + np.arange(group)).ravel()
    row = np.repeat(events.row, group)
    fires = (random.random(len(member)) < together) & (member < size)
    return csr(_readings((row[fires], member[fires]), (n, size), random) + _alone(n, size, rate * (1 - together), random))


def _readings(place: tuple[NDArray[Any], NDArray[Any]], shape: tuple[int, int], random: np.random.Generator) -> Codes:
    amounts = random.uniform(0.5, 1.5, len(place[0])).astype(np.float32)
    return coo_matrix((amounts, place), shape=shape).tocsr()


def _moved_by_hidden(
    n: int, sizes: Sequence[int], hidden: int, reach: int, rate: float, random: np.random.Generator
) -> list[Codes]:
    """What hidden causes add to each level."""
    causes = _alone(n, hidden, rate, random)
    made = []
    for size in sizes:
        place = np.repeat(np.arange(hidden), reach), random.integers(size, size=hidden * reach)
        moved = csr(causes @ coo_matrix((np.ones(hidden * reach, np.float32), place), shape=(hidden, size)).tocsr())
        made.append(entries(moved, np.where(random.random(moved.nnz) < 0.8, moved.data, 0)))
    return made


ASKED, BY_ITSELF = 0.004, 0.01
"""How often the parts of a whole come together, and how often each part comes by itself."""
NEIGHBOUR = 0.7
"""How often a part brings its neighbour, which is none of the whole's."""
LEAK, MISSED = 0.002, 0.2
"""How often a whole fires without its parts, and how often it does not with them."""


class Selection(System):
    """Wholes that fire where all of their two or three parts do, but for `LEAK` and `MISSED`: data, not a mechanism.

    In order of generation the wholes come first; they are caused by none and select their parts.
    """

    def __init__(self, wholes: int, parts: int, contexts: int, *, seed: int = 0):
        random = np.random.default_rng(seed)
        count = random.integers(2, 4, wholes)
        member = np.concatenate([random.choice(parts, k, replace=False) for k in count])
        place = member, np.repeat(np.arange(wholes), count)
        self._joined = coo_matrix((np.ones(len(member), np.float32), place), shape=(parts, wholes)).tocsr()
        scenes = _alone(contexts, wholes, ASKED, random)
        shown = csr(scenes @ self._joined.T + _alone(contexts, parts, BY_ITSELF, random))
        brought = shown[:, np.minimum(np.arange(parts) ^ 1, parts - 1)]
        low = csr(shown + entries(brought, np.where(random.random(brought.nnz) < NEIGHBOUR, brought.data, 0)))
        low = entries(low, random.uniform(0.5, 1.5, low.nnz))
        present = csr(entries(low, np.ones(low.nnz)) @ self._joined)
        whole = present.data >= count[present.indices]
        high = entries(present, np.where(whole & (random.random(present.nnz) >= MISSED), 1.0, 0.0))
        high = csr(high + _alone(contexts, wholes, LEAK, random))
        self._levels = {"wholes": high, "parts": low}

    @property
    def levels(self) -> Mapping[str, int]:
        return {name: z.shape[1] for name, z in self._levels.items()}

    def __len__(self) -> int:
        return self._levels["parts"].shape[0]

    @property
    def truth(self) -> Truth:
        """Which part belongs to which whole."""
        return {("parts", "wholes"): self._joined}

    def run(self, contexts: Contexts, do: Mapping[str, Do] | None = None) -> Mapping[str, Reading]:
        if do:
            raise Unanswerable("wholes are selected by their parts, in data: there is no mechanism to intervene on")
        return {name: Reading(z[contexts], z[contexts]) for name, z in self._levels.items()}


class Imperfect(Around):
    """A system read by a dictionary: each latent has a share of its neighbour mixed in, and misses some of its firings.

    What is done to a latent is done to the true one, by the difference: what was missed cannot be taken away.
    """

    def __init__(self, inner: System, *, mixing: float = 0.0, miss: float = 0.0, seed: int = 0):
        super().__init__(inner)
        self.mixing, self.miss, self.seed = mixing, miss, np.uint64(seed + 1_000_003)

    def run(self, contexts: Contexts, do: Mapping[str, Do] | None = None) -> Mapping[str, Reading]:
        seen: dict[str, Reading] = {}

        def through(k: int, name: str) -> Do:
            def act(z: Codes) -> Codes:
                read = self._read(z, k, contexts)
                after = do[name](read) if do and name in do else read
                seen[name] = Reading(read, after)
                if after is read:
                    return z
                moved = csr(z + (after - read))
                return entries(moved, np.maximum(moved.data, 0))

            return act

        self.inner.run(contexts, {name: through(k, name) for k, name in enumerate(self.levels)})
        return seen

    def _read(self, z: Codes, level: int, contexts: Contexts) -> Codes:
        """Neighbours come in pairs."""
        neighbour = np.minimum(np.arange(z.shape[1]) ^ 1, z.shape[1] - 1)
        mixed = csr(z + self.mixing * z[:, neighbour]) if self.mixing else z
        unit = np.repeat(np.arange(z.shape[0]), np.diff(mixed.indptr))
        key = np.uint64(contexts[unit]) * np.uint64(1 << 32) + np.uint64(mixed.indices) + np.uint64(level << 60)
        return entries(mixed, np.where(chance(key, self.seed) < self.miss, 0, mixed.data))


class Encoded(System):
    """A system whose latents lie in superposition, `x = z D`, and are read and moved through encoders that were learned.

    What is done to a latent moves `x` along its decoder row; later levels read of that what lies along a true row `D_i` by more
    than `DEAF`, the rest being within what superposition lets through.
    """

    def __init__(self, inner: System, dictionaries: Mapping[str, Tensor], encoders: Mapping[str, Sparse]):
        self.inner, self.dictionaries, self.encoders = inner, dictionaries, encoders

    @property
    def levels(self) -> Mapping[str, int]:
        return {name: len(encoder.decoder) for name, encoder in self.encoders.items()}

    def __len__(self) -> int:
        return len(self.inner)

    def run(self, contexts: Contexts, do: Mapping[str, Do] | None = None) -> Mapping[str, Reading]:
        seen: dict[str, Reading] = {}

        def through(name: str) -> Do:
            def act(z: Codes) -> Codes:
                dictionary, encoder = self.dictionaries[name], self.encoders[name]
                read = csr(encoder.encode(torch.from_numpy(z.toarray()) @ dictionary).numpy())
                after = do[name](read) if do and name in do else read
                seen[name] = Reading(read, after)
                along = torch.from_numpy((after - read).toarray()) @ encoder.decoder @ dictionary.T
                moved = torch.from_numpy(z.toarray()) + along * (along.abs() > DEAF)
                return csr(moved.clamp(min=0).numpy())

            return act

        self.inner.run(contexts, {name: through(name) for name in self.levels})
        return seen
