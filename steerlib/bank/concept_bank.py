"""A bank: concepts of one model, their encoders, their graph, and whose they are."""

from collections.abc import Mapping, Sequence
from os import PathLike
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..encoders import Directions, Encoder
from ..errors import BadBank, WrongWidth
from ..graph.causal_graph import CausalGraph
from ..hosts import host_for
from ..schedules import Window
from . import hub, layout
from .bank import Stored, by_name
from .concepts import Concept
from .manifest import BaseModel, SiteFacts
from .shelf import Shelf


class ConceptBank(Stored):
    """Concepts by name, ready to steer with. Opening a bank reads no weights; steering reads the rows it needs.

    `from_pretrained` opens one, `from_directions` and `from_encoder` make one of your own tensors, `sl.train` trains one.

    Args:
        name: its name.
        concepts: those of which more is known; every other row of an encoder is a concept `encoder/index`.
        encoders: encoders by id, `site[@level][#kind]`.
        base: the model it was made for.
        sites: width and norm of each site, by name.
        where: site of each encoder by its id (default: the id up to `@` or `#`).
        reads: of transcoders, the site at which they read, by id.
        levels: when concepts of a noise level, which follows `@` in ids, are moved by default.
        graph: which concept moves which.
        card: its README, in Markdown.
        license: SPDX name of its license.
        provenance: JSON values on how it was made.
        pictures: PNG files that the card shows, by file name.
        files: other files that belong to it, by name (`steerlib.bank.trust.SUFFIXES` says of which kinds).
        extra: fields of `bank.json` that this version does not know, kept for others.

    Raises `CorruptBank` where a concept names an encoder or a gate that is not there, or a name stands twice.

    >>> bank
    ConceptBank 'directions': 2 concepts for a model, 0 edges
      a                layers.0
      b                layers.0
    >>> list(bank), bank.site_of(bank["a"])
    (['a', 'b'], 'layers.0')
    """

    def __init__(
        self,
        name: str,
        concepts: Sequence[Concept],
        encoders: Mapping[str, Encoder] | Shelf,
        *,
        base: BaseModel,
        sites: Mapping[str, SiteFacts],
        where: Mapping[str, str] | None = None,
        reads: Mapping[str, str] | None = None,
        levels: Mapping[str, Window] | None = None,
        graph: CausalGraph | None = None,
        card: str = "",
        license: str = "",
        provenance: Mapping[str, Any] | None = None,
        pictures: Mapping[str, bytes] | None = None,
        files: Mapping[str, bytes] = MappingProxyType({}),
        extra: Mapping[str, Any] | None = None,
    ):
        self.name, self.base, self.sites, self.levels, self.files = name, base, dict(sites), dict(levels or {}), files
        self.graph, self.card, self.license = graph or CausalGraph(), card, license
        self.provenance, self.pictures, self.extra = dict(provenance or {}), dict(pictures or {}), dict(extra or {})
        self._shelf = encoders if isinstance(encoders, Shelf) else Shelf.of(encoders, where, reads)
        self.concepts = by_name(concepts, self._shelf.facts)
        self._by_id = {concept.id: concept for concept in concepts}

    def with_concepts(self, concepts: Sequence[Concept] | None = None, **changes: Any) -> "ConceptBank":
        """A copy with other concepts, its encoders in memory; `changes` are arguments of `ConceptBank` in place of its own.

        `encoders` may be some of them, in place of those of the same id.

        >>> bank.with_concepts([bank["a"]], card="# Mine").keys()
        dict_keys(['a'])
        """
        own = self.contents() | ({} if concepts is None else {"concepts": concepts})
        return ConceptBank(**{**own, **changes, "encoders": self._shelf.whole(changes.get("encoders", {}))})

    @classmethod
    def from_directions(
        cls, directions: Mapping[str, Tensor], *, site: str, base: object, name: str = "directions", norm: float | None = None
    ) -> "ConceptBank":
        """A bank of one's own vectors at one site.

        Args:
            directions: vectors `[D]` by name of concept; one unit of a concept is its vector.
            site: name of the site, such as `layers.15`.
            base: the model or pipeline.
            name: name of the bank.
            norm: median length of an activation at the site: additions are then capped to a share of it, or can match it.

        Raises:
            WrongWidth, UnknownSite: the vectors are not as wide as the site; the model has no such site.

        >>> sl.ConceptBank.from_directions({"royal": torch.ones(model.config.hidden_size)}, site="layers.0", base=model).keys()
        dict_keys(['royal'])
        """
        if not directions:
            raise BadBank("expected at least one direction, got none")
        vectors = {key: vector.detach().float().cpu() for key, vector in directions.items()}
        for key, vector in vectors.items():
            if vector.ndim != 1 or vector.shape != next(iter(vectors.values())).shape:
                raise WrongWidth(f"expected vectors of one axis and equal width, got {tuple(vector.shape)} for {key!r}")
        concepts = [Concept(name=key, encoder=site, index=i) for i, key in enumerate(vectors)]
        made = Directions(torch.stack(list(vectors.values())))
        return cls.from_encoder(made, site=site, base=base, name=name, concepts=concepts, norm=norm)

    @classmethod
    def from_encoder(
        cls,
        encoder: Encoder,
        *,
        site: str,
        base: object,
        name: str = "encoder",
        concepts: Sequence[Concept] = (),
        norm: float | None = None,
    ) -> "ConceptBank":
        """A bank of one's own encoder at one site; its concepts are called `site/index`, and by the names of `concepts`.

        The rest is as in `from_directions`.

        >>> sl.ConceptBank.from_encoder(bank.encoder("layers.0"), site="layers.0", base=model)["layers.0/1"].index
        1
        """
        host = host_for(base)
        width, expected = encoder.rows([0]).write.shape[-1], host.width(host.site(site))
        if expected is not None and expected != width:
            raise WrongWidth(f"site {site!r} has width {expected}, got vectors of width {width}")
        identity, sites = BaseModel(fingerprint=host.fingerprint()), {site: SiteFacts(width=width, norm=norm)}
        return cls(name, concepts, {site: encoder}, base=identity, sites=sites, where={site: site})

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> "ConceptBank":
        """Open a bank; reads no weights.

        Args:
            name_or_folder: a folder, the name of a bank shipped with steerlib, or an id `org/name` on the Hub.
            revision: branch, tag or commit on the Hub; all files are read at the commit it names now.
            token: access token of the Hub (default: that of `hf auth login`).
            cache_dir: where files of the Hub are kept (default: the cache of huggingface_hub).
            local_files_only: use only what is in the cache.

        Raises:
            BadBank: it does not open.

        >>> len(sl.ConceptBank.from_pretrained("smollm2-135m-latents"))
        6910
        """
        options: Any = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        return cls(**layout.read(hub.home_of(name_or_folder, **options)))
