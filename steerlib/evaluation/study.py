"""Latents of an autoencoder, or concepts of any bank, studied by intervention: what each does, through which of them a change
of the input acts, and a page that shows it."""

import json
import sys
from base64 import b64encode
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from html import escape
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..bank.autoencoders import autoencoder_of, posterior
from ..bank.concept_bank import ConceptBank
from ..bank.concepts import Concept
from ..errors import BadEdit, MissingExtra, UnsupportedTarget
from ..hosts import load
from ..steering.interventions import Set
from ..text import progress
from .circuits import ANY, busiest, changed, circuit, pairs
from .coordinates import Coordinates, coordinates, said, spread_of
from .datasets import Data
from .decoders import decoding, reconstructing
from .disentanglement import disentanglement
from .interventions import Decoder, by_swap
from .pictures import sheet

ROWS, TOLD, STEPS = 48, 2000, 7
"""Inputs on which coordinates are moved, those that disentanglement is measured on, and pictures of a traversal."""
CODES, TOLD_WAYS = 6, 3
"""Codes of a quantiser that are swapped, and shares that a cell of the page's table tells."""


class Study(NamedTuple):
    """What was found: a bank where one was made, the figures as JSON values, and pictures as PNG by file name."""

    bank: ConceptBank | None
    figures: dict[str, Any]
    pictures: dict[str, bytes]


# -- what is studied ---------------------------------------------------------------------------------------------------


def opened(source: str) -> Any:
    """A pipeline or an autoencoder of diffusers in a folder, or what `module:name` gives of a module of your own; a function is
    called. Raises `UnsupportedTarget`."""
    module, colon, name = source.partition(":")
    if colon and not Path(source).exists():
        sys.path.insert(0, str(Path.cwd()))
        found = getattr(import_module(module), name)
        return found if isinstance(found, nn.Module) else found()
    config = Path(source) / "config.json"
    if not config.is_file():
        return load(source)[0]
    try:
        import diffusers
    except ImportError:
        raise MissingExtra("autoencoders of diffusers need diffusers: pip install 'steerlib[diffusers]'") from None
    kind = json.loads(config.read_text(encoding="utf-8")).get("_class_name", "")
    if not hasattr(diffusers, kind):
        raise UnsupportedTarget(f"{config} names no class of diffusers, got {kind!r}; give a folder that save_pretrained wrote")
    return getattr(diffusers, kind).from_pretrained(source).eval()


# -- the study -----------------------------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """An autoencoder's bank, latents of all inputs, the decoder with the few latents that were moved, and what was found."""

    bank: ConceptBank
    z: Tensor
    decoder: Decoder
    few: Tensor
    found: Coordinates
    figures: dict[str, Any]


def studied(target: Any, data: Data, *, hidden: str | None = None, seed: int = 0) -> Study:
    """Every figure of an autoencoder, or of that of a pipeline (`measured`), and of the same one untrained as a control; and
    what a change of its input does, factor by factor. `hidden` is the site of units whose modularity is measured, and whose
    channels are patched, by default in the middle of the decoder."""
    inside, _ = autoencoder_of(target)
    rng, x = np.random.default_rng(seed), data.inputs
    if type(inside).__module__.startswith("diffusers.") and float(x.min()) >= 0:
        x = 2 * x - 1  # as its image processor does
    chosen = np.sort(rng.permutation(len(x))[:TOLD])
    known = Data(x[chosen], {name: [values[k] for k in chosen] for name, values in data.factors.items()})
    own, site = measured(inside, known, hidden=hidden, seed=seed), hidden or middle(inside)
    whole = Decoder(inside, reconstructing(inside), own.bank)
    dealt = pairs(data.factors, len(x), most=ROWS, seed=seed).items()
    changes = {name: (x[others], x[rows], None) for name, (rows, others) in dealt}
    found = _complete(own.figures, own.found, (own.decoder, own.few), (whole, changes), site, seed)
    moves = {one.name: {key: value for key, value in asdict(one).items() if key != "name"} for one in own.found.each}
    concepts = [replace(concept, effects=moves.get(name, {})) for name, concept in own.bank.concepts.items()]
    return found._replace(bank=own.bank.with_concepts(concepts))


def of_bank(
    studied: Decoder,
    inputs: Sequence[Any] | Tensor,
    names: Sequence[str] | None = None,
    *,
    hidden: str | None = None,
    seed: int = 0,
) -> Study:
    """The same of some concepts of any bank (None: all but gates), on anything that is run alike every time: a pipeline from
    fixed noise, a language model's next token. `inputs` are prompts, or token ids of one length; each is also changed into the
    next one.

    Raises `BadEdit` for fewer than three inputs.
    """
    if len(inputs) < 3:
        raise BadEdit(f"expected three inputs or more, since each is compared with two others, got {len(inputs)}")
    bank = studied.bank
    names = [name for name, concept in bank.concepts.items() if concept.present is None] if names is None else list(names)
    found = coordinates(studied, inputs, names, hidden=hidden, seed=seed)
    figures = {"coordinates": found.to_dict(), "inputs": len(inputs), "moved": len(inputs)}
    figures["labels"] = {name: bank[name].label for name in names}
    turned = [[inputs[(k + by) % len(inputs)] for k in range(len(inputs))] for by in (1, 2)]
    value, control = (torch.stack(some) if isinstance(inputs, Tensor) else some for some in turned)
    return _complete(figures, found, (studied, inputs), (studied, {ANY: (value, inputs, control)}), hidden, seed)


def _complete(
    figures: dict[str, Any],
    found: Coordinates,
    moved: tuple[Decoder, Any],
    dealt: tuple[Decoder, Mapping[str, tuple[Any, Any, Any]]],
    hidden: str | None,
    seed: int,
) -> Study:
    """With pictures of what was `moved`, and what changes of the input do, each `dealt` as value, reference and control."""
    names, (whole, changes) = list(figures["labels"]), dealt
    how: dict[str, Any] = {"spread": found.spread, "hidden": hidden, "channels": busiest(found), "seed": seed}
    figures["changes"] = {
        name: changed(whole, value, reference, names, control=control, **how)
        for name, (value, reference, control) in progress(changes.items(), "changing inputs")
    }
    pictures = {"circuit.png": circuit(figures["changes"], found, names)}
    if (drawn := traversals(*moved, names)) is not None:
        pictures["traversals.png"] = drawn
    return Study(None, figures, pictures)


def measured(
    autoencoder: Any, data: Data, *, hidden: str | None = None, moved: int = ROWS, boosted: bool = True, seed: int = 0
) -> Measured:
    """Coordinates of an autoencoder, disentanglement where factors are known, and swaps of codes where it is a quantiser; as
    controls, disentanglement with factors shuffled, and all of the same autoencoder untrained. `moved` inputs are those on
    which coordinates are moved; `boosted` as in `disentanglement`."""
    how: dict[str, Any] = {"hidden": hidden, "moved": moved, "boosted": boosted, "seed": seed}
    own = _measured(autoencoder, data, **how)
    if data.factors:
        mixed = np.random.default_rng(seed).permutation(len(data.inputs))
        shuffled = {name: [values[k] for k in mixed] for name, values in data.factors.items()}
        own.figures["shuffled factors"] = disentanglement(_flat(own.z), shuffled, boosted=boosted, seed=seed)._asdict()
    if (control := untrained(autoencoder, seed)) is not None:
        own.figures["untrained"] = _measured(control, data, least=0.0, **how).figures
    return own


def _measured(
    autoencoder: Any, data: Data, *, hidden: str | None, moved: int, boosted: bool, seed: int, least: float = 0.01
) -> Measured:
    """Without controls; `least` as in `from_autoencoder`."""
    x, factors = data
    bank = ConceptBank.from_autoencoder(autoencoder, x, factors=factors, least=least, seed=seed)
    with torch.no_grad():
        z = posterior(autoencoder.encode(x)).mean
    few = z[torch.as_tensor(np.random.default_rng(seed).permutation(len(z))[:moved])]
    latents = [name for name, concept in bank.concepts.items() if "#" not in concept.encoder]
    decoder = Decoder(autoencoder, decoding(autoencoder), bank)
    found = coordinates(decoder, few, latents, hidden=hidden or middle(autoencoder), seed=seed)
    figures = {"coordinates": found.to_dict(), "passive": bank.provenance["passive"], "inputs": len(x), "moved": len(few)}
    figures["labels"] = {name: bank[name].label for name in latents}
    codes = [name for name in bank.concepts if name not in latents][:CODES]
    if len(codes) > 1:
        figures["codes"] = {code: swapped(decoder, few, code, [o for o in codes if o != code], seed) for code in codes}
    if factors:
        figures["disentanglement"] = disentanglement(_flat(z), factors, boosted=boosted, seed=seed)._asdict()
    return Measured(bank, z, decoder, few, found, figures)


def untrained(autoencoder: nn.Module, seed: int = 0) -> nn.Module | None:
    """A copy with weights drawn anew, as a control; None where a module that has weights does not say how they are drawn."""
    copy = deepcopy(autoencoder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for module in copy.modules():
            if next(module.parameters(recurse=False), None) is None:
                continue
            draw: Any = getattr(module, "reset_parameters", None)
            if draw is None:
                return None
            draw()
    return copy


def _flat(z: Tensor) -> NDArray[Any]:
    """Latents `[B, n]`, of maps the means."""
    return (z.flatten(2).mean(-1) if z.ndim > 2 else z).float().cpu().numpy()


def middle(autoencoder: Any) -> str | None:
    """A site in the middle of the decoder; None where nothing shows one."""
    decoder = getattr(autoencoder, "decoder", None)
    if isinstance(getattr(decoder, "mid_block", None), nn.Module):
        return "decoder.mid_block:BDN"
    return f"decoder.{(len(decoder) - 1) // 2}:BDN" if isinstance(decoder, nn.Sequential) and len(decoder) > 1 else None


def swapped(decoder: Decoder, inputs: Tensor, code: str, others: list[str], seed: int) -> dict[str, float]:
    """What putting other codes in the place of one does, over the spread of outcomes, and its control."""
    effect, spread = by_swap(decoder, inputs, code, others, seed=seed), spread_of(decoder(inputs)) or 1.0
    return {"length": effect.strength, "relative": effect.strength / spread, "control": effect.by_chance.mean / spread}


# -- to look at ------------------------------------------------------------------------------------------------------------


def traversals(decoder: Decoder, inputs: Any, names: list[str]) -> bytes | None:
    """A row for each coordinate: one picture as it goes from one end of its values to the other (`ends_of`), and where pictures
    change; None where no pictures come out."""
    plain = decoder(inputs)
    if plain.ndim != 4 or plain.shape[1] not in (1, 3) or not names:
        return None
    low, high = (float(torch.quantile(plain.flatten()[: 1 << 20], q)) for q in (0.001, 0.999))

    def seen(x: Tensor) -> NDArray[np.uint8]:
        scaled = ((x - low) / max(high - low, 1e-9)).clamp(0, 1).permute(1, 2, 0)
        return (scaled.expand(*scaled.shape[:2], 3).numpy() * 255).round().astype(np.uint8)

    cells: dict[str, dict[str, NDArray[np.uint8]]] = {}
    for name in progress(names, "drawing coordinates"):
        concept = decoder.bank[name]
        made = [decoder(inputs, {name: Set(float(value))}) for value in np.linspace(*ends_of(concept), STEPS)]
        change = (made[-1] - made[0]).abs().mean((0, 1))[None]
        row = {f"{k}": seen(one[0]) for k, one in enumerate(made, 1)}
        shown = name if concept.label in ("", name) else f"{name}\n{concept.label}"
        cells[shown] = row | {"where": seen(low + (high - low) * change / change.max().clamp(min=1e-9))}
    with BytesIO() as file:
        sheet(cells).save(file, format="png", optimize=True)
        return file.getvalue()


def ends_of(concept: Concept) -> tuple[float, float]:
    """Between which values a coordinate is shown, in its units: where 99 % of what it reads lie, or its safe range, or one unit
    each way."""
    if concept.natural is None:
        return concept.range or (-1.0, 1.0)
    low, high = concept.natural
    return low / concept.unit, high / concept.unit


COLUMNS = {
    "name": "coordinate", "ces": "CES", "relative": "relative effect", "low": "from", "high": "to", "control": "control",
    "specificity": "specificity", "focus": "focus",
}  # fmt: skip
LEGEND = """Pictures: one input, with a coordinate set from one end of its values to the other (99 % of what it reads lie
between them; where that was not measured, its safe range), and where this changes the pictures of all inputs. CES and
specificity as published (arXiv 2505.03530). Relative effect: with a coordinate as it is in another input, the change of the
outcome over the spread of outcomes, with its 95 % interval over inputs (from, to); control: a random direction at the same site
treated alike. Focus: 0 where all outputs change alike, 1 where one alone does."""
CHANGES = {"pairs": "pairs", "relative": "relative effect", "low": "from", "high": "to", "control": "control"}
WAYS = ("through coordinates", "all together", "along channels")
WAYS_LEGEND = """Two inputs that differ in one factor alone, or any two. Relative effect as above; control: the same change of
the input with its numbers in a random order, or, of prompts, into a third one. Shares are of the whole change of the outcome,
in brackets those of a control. Through a coordinate: its indirect effect (mediation), beside a random direction. Along a
channel: what comes out when that hidden channel alone is taken from the other input, beside another channel. In the picture a
line is as thick as such a share is large, or as a coordinate moves a channel beside the one that it moves most; from 5 % on."""


def lines(figures: Mapping[str, Any]) -> list[str]:
    """What was found, as sentences."""
    whole = figures["coordinates"]
    passive = f"; passive: {', '.join(figures['passive']) or 'none'}" if "passive" in figures else ""
    found = [f"Coordinates: {len(whole['each'])}{passive}; dead, moving nothing: {', '.join(whole['dead']) or 'none'}."]
    best = sorted(whole["each"], key=lambda one: -(one["relative"] or 0.0))[:TOLD_WAYS]
    moved = [f"{one['name']} {_shown(one['relative'])} ({_shown(one['control'])})" for one in best]
    found.append(f"Largest relative effects (in brackets, controls): {', '.join(moved) or 'none'}.")
    if whole["modularity"] is not None:
        found.append(f"Modularity {said(whole['modularity'])} (as published {said(whole['published_modularity'])}).")
    if "untrained" in figures:
        plain = figures["untrained"]["coordinates"]
        mean = np.mean([one["relative"] or 0.0 for one in plain["each"]] or [0.0])
        found.append(f"Untrained: mean relative effect {mean:.3f}, modularity {said(plain['modularity'])}.")
    if "codes" in figures:
        swaps = np.mean([code["relative"] for code in figures["codes"].values()])
        moves = np.mean([one["relative"] or 0.0 for one in whole["each"]])
        found.append(f"Relative effect of a swap of codes {swaps:.3f}, of a continuous coordinate {moves:.3f}, on average.")
    ways = {name: _ways(own["through"]).partition(",")[0] for name, own in figures["changes"].items()}
    through = "; ".join(f"{name}: {way}" for name, way in ways.items() if way)
    found.append(f"Changes of the input act most through (in brackets, controls): {through or 'nothing'}.")
    return found


NAMES = {
    "dci_disentanglement": "DCI disentanglement", "dci_completeness": "completeness", "dci_informativeness": "tells factors",
    "mig": "MIG", "sap": "SAP", "factor_vae": "FactorVAE score", "infom": "InfoM", "infoc": "InfoC", "infoe": "InfoE",
}  # fmt: skip


def disentangled(figures: Mapping[str, Any]) -> dict[str, Mapping[str, float | None]]:
    """Figures of disentanglement and those of both controls, by what they are of; nothing where no factors are known."""
    held = {"latents": figures, "factors shuffled": {"disentanglement": figures.get("shuffled factors")}}
    held["untrained"] = figures.get("untrained", {})
    return {name: found for name, own in held.items() if (found := own.get("disentanglement"))}


Table = tuple[list[str], list[list[str]]]
"""Head and rows."""


def moves(figures: Mapping[str, Any]) -> Table:
    """What moving each coordinate does."""
    each = figures["coordinates"]["each"]
    rows = [[*(_shown(one[key]) for key in COLUMNS), figures["labels"][one["name"]]] for one in each]
    return [*COLUMNS.values(), "label"], rows


def changes(figures: Mapping[str, Any]) -> Table:
    """What each change of the input does, and by which way."""
    rows = [
        [name, *(_shown(own[key]) for key in CHANGES), _ways(own["through"]), _way(own["together"]), _ways(own["along"])]
        for name, own in figures["changes"].items()
    ]
    head = ["change of the input", *CHANGES.values(), *WAYS]
    shown = len(head) - (not any(row[-1] for row in rows))  # without a hidden site there are no channels
    return head[:shown], [row[:shown] for row in rows]


def told(figures: Mapping[str, Any]) -> Table:
    """How far latents stand for factors, beside both controls; no rows where no factors are known."""
    rows = [[name, *(said(own[key]) for key in NAMES)] for name, own in disentangled(figures).items()]
    return ["", *NAMES.values()], rows


def page(study: Study, title: str) -> str:
    """One HTML file that needs no network."""
    known = told(study.figures)
    parts = [
        *(f"<p>{escape(line)}</p>" for line in lines(study.figures)),
        *(["<h2>How far latents stand for factors</h2>", _table(*known)] if known[1] else ()),
        "<h2>What moving a coordinate does</h2>",
        _image(study, "traversals.png"),
        _table(*moves(study.figures)),
        f"<p class=legend>{escape(LEGEND)}</p>",
        "<h2>What changing the input does, and by which way</h2>",
        _table(*changes(study.figures)),
        f"<p class=legend>{escape(WAYS_LEGEND)}</p>",
        _image(study, "circuit.png"),
    ]
    return (
        f"<!doctype html><meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}</style>"
        f"<h1>{escape(title)}</h1>{''.join(parts)}\n"
    )


STYLE = """body{font:15px/1.45 sans-serif;margin:2em auto;max-width:70em;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}
td,th{padding:.25em .7em;text-align:left;border-bottom:1px solid #ddd;vertical-align:top}
img{max-width:100%}.legend{color:#555;font-size:13px}.wide{overflow-x:auto}"""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [("th", head), *(("td", row) for row in rows)]
    body = "".join(f"<tr>{''.join(f'<{kind}>{escape(text)}</{kind}>' for text in row)}</tr>" for kind, row in cells)
    return f"<div class=wide><table>{body}</table></div>"


def _image(study: Study, name: str) -> str:
    if name not in study.pictures:
        return ""
    return f'<img alt="{escape(name)}" src="data:image/png;base64,{b64encode(study.pictures[name]).decode()}">'


def _shown(value: Any) -> str:
    return "undefined" if value is None else value if isinstance(value, str) else f"{value:.3g}"


def _way(shares: tuple[float | None, float | None] | None) -> str:
    """A share and that of its control."""
    own, control = shares or (None, None)
    return "undefined" if own is None else f"{own:.0%}" + ("" if control is None else f" ({control:.0%})")


def _ways(shares: Mapping[str, tuple[float | None, float | None]]) -> str:
    """The largest ones, by name."""
    best = sorted(shares, key=lambda name: -abs(shares[name][0] or 0))[:TOLD_WAYS]
    return ", ".join(f"{name} {_way(shares[name])}" for name in best)


def write(study: Study, out: Path, title: str) -> Path:
    """Write page, figures, pictures and the bank, if one was made, to a folder; returns the page."""
    out.mkdir(parents=True, exist_ok=True)
    for name, png in study.pictures.items():
        (out / name).write_bytes(png)
    (out / "study.json").write_text(
        json.dumps(study.figures, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8"
    )
    if study.bank is not None:
        study.bank.save_pretrained(out / "bank")
    (out / "index.html").write_text(page(study, title), encoding="utf-8")
    return out / "index.html"
