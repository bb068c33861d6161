"""One's own vectors as the encoders and concepts of a bank: at one site, at several, or one a site."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..encoders import Directions, Encoder
from ..errors import BadBank, WrongWidth
from ..hosts import digest_of, host_for
from .concepts import Concept, Part
from .manifest import BaseModel, SiteFacts

Where = str | int | Sequence[str | int] | None
"""A site by its name; a number L means `layers.L`, the residual stream after block L. Several: one concept at all."""
Vectors = Mapping[str, Any]
"""By name of concept a vector `[D]` (a tensor, an array, a list of numbers), or vectors by site."""


def site_name(site: object) -> str:
    """The name of a site, from a name or the number of a block."""
    if isinstance(site, str) and site:
        return site
    if isinstance(site, int | np.integer) and not isinstance(site, bool) and site >= 0:
        return f"layers.{site}"
    raise BadBank(f"expected the name of a site, such as 'layers.15', or the number of a block from 0 on, got {site!r:.80}")


def gathered(directions: Vectors, where: Where) -> tuple[dict[str, Directions], list[Concept]]:
    """An encoder for each site, and a concept for each name with a part at every further site."""
    if not isinstance(directions, Mapping) or not directions:
        raise BadBank(f"expected vectors by name of concept, at least one, got {directions!r:.80}")
    rows: dict[str, list[Tensor]] = {}
    concepts = []
    for name, given in directions.items():
        places = []
        for site, vector in _by_site(name, given, where).items():
            rows.setdefault(site, []).append(vector)
            places.append(Part(encoder=site, index=len(rows[site]) - 1, unit=1.0))
        first, *parts = places
        concepts.append(Concept(name=name, encoder=first.encoder, index=first.index, parts=tuple(parts)))
    return {site: Directions(_together(site, some)) for site, some in rows.items()}, concepts


def _by_site(name: object, given: object, where: Where) -> dict[str, Tensor]:
    """The vectors of one concept, by name of site."""
    if not isinstance(name, str) or not name:
        raise BadBank(
            f"expected names of concepts, got {name!r:.80}; one concept at several sites is {{'name': {{3: one, 5: other}}}}"
        )
    if isinstance(given, Mapping):
        if where is not None or not given:
            raise BadBank(f"expected vectors by site for {name!r} and no site=, got {len(given)} and site={where!r:.80}")
        return {site_name(site): _vector(name, vector) for site, vector in given.items()}
    if where is None:
        raise BadBank(f"expected site= for {name!r}, such as 'layers.15', or its vectors by site, {{{name!r}: {{3: vector}}}}")
    sites = [where] if isinstance(where, str | int | np.integer) else list(where)
    found = dict.fromkeys(map(site_name, sites), _vector(name, given))
    if not sites or len(found) < len(sites):
        raise BadBank(f"expected each site once, got {where!r:.200}")
    return found


def _vector(name: str, given: Any) -> Tensor:
    try:
        vector = given if isinstance(given, Tensor) else torch.as_tensor(np.asarray(given, dtype=np.float32))
    except (TypeError, ValueError) as error:
        raise BadBank(f"expected {name!r} as a vector of numbers, got {given!r:.80}: {error}") from None
    if vector.ndim != 1 or vector.is_complex():
        raise WrongWidth(f"expected vectors of one axis, got {tuple(vector.shape)} of {vector.dtype} for {name!r}")
    return vector if vector.requires_grad else vector.float().cpu()  # one that learns is looked at in every pass


def _together(site: str, rows: Sequence[Tensor]) -> Tensor | Sequence[Tensor]:
    if len({row.shape for row in rows}) > 1:
        raise WrongWidth(f"expected vectors of equal width at {site!r}, got widths {sorted({len(row) for row in rows})}")
    return rows if any(row.requires_grad for row in rows) else torch.stack(list(rows))


def placed_in(
    encoders: Mapping[str, Encoder], reads: Mapping[str, str], base: object, norm: float | Mapping[str, float] | None
) -> dict[str, Any]:
    """Arguments of `ConceptBank` that say where in a model encoders of one's own belong, by name of site."""
    host, places = host_for(base), [*encoders, *reads.values()]
    norms = norm if isinstance(norm, Mapping) else dict.fromkeys(encoders, norm)
    if len(encoders) > 1 and norm is not None and norm is not norms or norms.keys() - {*places}:
        raise BadBank(f"expected norm= by name of the sites {', '.join(places)}, got {norm!r:.80}")
    widths: dict[str, int] = {}
    for site, encoder in encoders.items():
        rows = encoder.rows([0])
        for at, width in ((site, rows.write.shape[-1]), (reads.get(site, site), rows.read.shape[-1])):
            if widths.setdefault(at, width) != width or host.width(host.site(at)) not in (None, width):
                raise WrongWidth(f"site {at!r} has width {host.width(host.site(at))}, got vectors of width {width}")
    return {
        "base": BaseModel(id=host.name(), fingerprint=host.fingerprint(), weights=digest_of(host)),
        "sites": {at: SiteFacts(width=width, norm=norms.get(at)) for at, width in widths.items()},
        "where": {site: site for site in encoders},
        "reads": reads,
    }
