"""A bank taken elsewhere: to files of other libraries, and to other checkpoints.

What writes files and what measures a model lies in rooms above this one, and is loaded when it is asked for.
"""

from collections.abc import Iterable, Sequence
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from ..errors import WrongModel
from ..hosts import digest_of, host_for
from . import matching, wording
from .editing import Edited
from .manifest import BaseModel

B = TypeVar("B", bound="Portable")
PACKAGE = __name__.partition(".")[0]


class Portable(Edited):
    """What takes a bank elsewhere; `ConceptBank` sets the attributes."""

    def export(
        self,
        path: str | PathLike[str],
        concepts: Iterable[str] | None = None,
        *,
        format: str | None = None,
        lossy: bool = False,
    ) -> list[Path]:
        """Write concepts as another library does: control vectors for llama.cpp and repeng, or encoders for SAELens.

        What `sl.read_bank` reads from the files does the same at every token, by the same amounts.

        Args:
            path: `name.gguf` for one concept, called `name` there; else a folder: of vectors a file for each concept, of
                latents their whole encoders, with names and units of those that are asked for.
            concepts: which ones (default: all).
            format: `repeng` or `saelens` (default: as the path and the concepts are).
            lossy: write what a format has no place for (a gate, `match_norm`, a window, a part at another site, the floor of
                a latent at 0) without it; a warning and the file say what is lost.

        Returns the files or folders that were written. Raises `BadBank` where something would be lost, `UnknownFormat`.

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sl.read_bank(*bank.export(f"{folder}/calm.gguf", ["a"]), base=model).keys()
        dict_keys(['calm'])
        """
        readers: Any = import_module(f"{PACKAGE}.readers")
        return readers.export(self, path, concepts, format, lossy)

    def compare(self, model: object, concepts: Sequence[str] | None = None, **how: Any) -> Any:
        """What of the bank still holds on another checkpoint: of each concept `cosine`, `unit`, `effect` and `damage`, as they
        are stored and as they are here.

        The cosine is that of the bank's directions and those that the contrast data which it carries gives here; sites where
        all are chance are named, in `rotated`: the residual stream has another basis. Without such data, sites of text are,
        where readings are no nearer to those that were measured than in random bases; `untold` names those of which the bank
        has neither.

        Args:
            model: the other checkpoint, or pipeline.
            concepts: which ones (default: all that are no gates).
            how: `prompts`, `judge`, `tokenizer`, `texts`, `new_tokens`, `seed` and those of drawing, as for `sl.calibrate`.
                Without a judge, and a scorer of the bank's recipe, effects on answers are not measured.

        Returns a dict by concept, shown as a table. Raises `WrongModel` where no concept fits.

        >>> found = bank.compare(model2, ["polite"], tokenizer=tok)                                      # doctest: +SKIP
        """
        comparing: Any = import_module(f"{PACKAGE}.training.calibrate.comparing")
        return comparing.compare(self, model, concepts, **how)

    def adapt(self: B, model: object) -> B:
        """The bank for another checkpoint, whose sites have the same names and widths: its base is the new one.

        Nothing is changed and nothing measured: what is stored of concepts is of the old model, and is said to be so when they
        are steered, until `sl.calibrate` measures them here. `compare` tells what holds.

        Raises `WrongModel` where a site is missing or of another width.

        >>> bank.adapt(model).fits(model)["layers.0"]
        'same weights'
        """
        host, how = host_for(model), self.fits(model)
        if misfits := [f"{site} ({fit})" for site, fit in how.items() if fit in matching.MISFITS]:
            raise WrongModel(
                f"bank {self.name!r} does not fit this model at {', '.join(misfits[:3])}; keep what fits by select or drop"
            )
        was = {"base": self.base.id, "weights": self.base.weights, "calibrated": self.provenance.get("calibrated", {})}
        provenance = {key: value for key, value in self.provenance.items() if key != "calibrated"}
        base = BaseModel(id=host.name(), fingerprint=host.fingerprint(), weights=digest_of(host))
        said = f"this bank was made for {self.base.id or 'another model'} and serves another now; the figures below are older"
        card = wording.noted(self.card, said) if self.card else ""
        make: Any = type(self)
        return make(**{**self.contents(), "base": base, "card": card, "provenance": {**provenance, "adapted": was}})
