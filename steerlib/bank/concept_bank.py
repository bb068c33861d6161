"""A bank: concepts of one model, their encoders, their graph, and whose they are."""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from ..encoders import Encoder
from ..errors import Unanswerable
from ..graph.causal_graph import CausalGraph
from ..hosts import host_for
from ..schedules import Window
from . import hub, layout
from .autoencoders import Derived
from .bank import by_name
from .concepts import Concept
from .editing import timed
from .manifest import BaseModel, SiteFacts
from .shelf import Shelf
from .vectors import Vectors, Where, gathered, placed_in, site_name


class ConceptBank(Derived):
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
        files: what else its folder holds, by name there: paths of files or folders, such as `{"pipeline": folder}`, or bytes
            (`steerlib.bank.trust.SUFFIXES` says of which kinds).
        extra: fields of `bank.json` that this version does not know, kept for others.

    Raises `CorruptBank` where a concept names an encoder or a gate that is not there, or a name stands twice.

    >>> bank
    ConceptBank 'directions': 2 concepts for a model, 0 edges
      a                layers.0
      b                layers.0
      ranges of 2 not measured: sl.calibrate(model, bank, ['a', …], judge=…)
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
        files: Mapping[str, str | PathLike[str] | bytes] | None = None,
        extra: Mapping[str, Any] | None = None,
    ):
        self.name, self.base, self.sites, self.levels = name, base, dict(sites), dict(levels or {})
        self.graph = CausalGraph() if graph is None else graph  # one of outcomes alone has no edges between concepts
        self.card, self.license, self.files = card, license, dict(files or {})
        self.provenance, self.pictures, self.extra = dict(provenance or {}), dict(pictures or {}), dict(extra or {})
        self._shelf = encoders if isinstance(encoders, Shelf) else Shelf.of(encoders, where, reads)
        self.concepts = by_name(concepts, self._shelf.facts)
        self._by_id = {concept.id: concept for concept in concepts}

    @classmethod
    def from_directions(
        cls,
        directions: Vectors,
        *,
        site: Where = None,
        base: object,
        name: str = "directions",
        norm: float | Mapping[str, float] | None = None,
        when: Window | Mapping[str, Window] | None = None,
    ) -> "ConceptBank":
        """A bank of one's own vectors, at one site or at several.

        Args:
            directions: vectors `[D]` by name of concept, as tensors, arrays or lists; one unit of a concept is its vector. For
                one a site: `{"royal": {"layers.3": v3, "layers.5": v5}}`. What requires gradients learns in each pass.
            site: name of the site, such as `layers.15`, or the number of a block; several: the concept moves at each of them.
            base: the model or pipeline.
            name: name of the bank.
            norm: median length of an activation at the site: additions are then capped to a share of it, or can match it.
                For several sites, lengths by name of site.
            when: the window of denoising in which its concepts are moved unless an edit says otherwise; or by name of site.

        Raises `WrongWidth` for vectors that are not as wide as the site, `UnknownSite` for a site that the model lacks, and
        `Unanswerable` for a window in a model that does not denoise.

        >>> sl.ConceptBank.from_directions({"royal": torch.ones(model.config.hidden_size)}, site="layers.0", base=model).keys()
        dict_keys(['royal'])
        """
        encoders, concepts = gathered(directions, site)
        made = cls(name, concepts, encoders, **placed_in(encoders, {}, base, norm))
        if when is not None and not host_for(base).has_progress:
            raise Unanswerable("text has no progress for when= to open on, because its end is unknown; give edits sl.Steps")
        return made if when is None else timed(made, when)

    @classmethod
    def from_encoder(
        cls,
        encoder: Encoder,
        *,
        site: str | int,
        base: object,
        reads: str | int | None = None,
        name: str = "encoder",
        concepts: Sequence[Concept] = (),
        norm: float | None = None,
    ) -> "ConceptBank":
        """A bank of one's own encoder at one site; its concepts are called `site/index`, and by the names of `concepts`.

        `reads` is the site at which a transcoder reads, which writes at `site`; the other arguments and what is raised are
        those of `from_directions`.

        >>> sl.ConceptBank.from_encoder(bank.encoder("layers.0"), site="layers.0", base=model)["layers.0/1"].index
        1
        """
        encoders, earlier = {site_name(site): encoder}, {} if reads is None else {site_name(site): site_name(reads)}
        return cls(name, concepts, encoders, **placed_in(encoders, earlier, base, norm))

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

        Raises `BadBank` where it does not open; the message says why and what to do.

        >>> len(sl.ConceptBank.from_pretrained("smollm2-135m-latents"))
        6910
        """
        options: Any = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        return cls(**layout.read(hub.home_of(name_or_folder, **options)))
