"""An autoencoder studied by intervention: its latents as concepts, what each of them does, and a page that shows it."""

import json
import sys
from base64 import b64encode
from collections.abc import Mapping
from copy import deepcopy
from html import escape
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..bank.autoencoders import autoencoder_of, explained, posterior
from ..bank.concept_bank import ConceptBank
from ..errors import MissingExtra, UnsupportedTarget
from ..hosts import load
from ..steering.interventions import Set
from .coordinates import Coordinates, coordinates, said, spread_of
from .datasets import Data
from .decoders import decoding
from .disentanglement import disentanglement
from .interventions import Decoder, by_swap
from .pictures import grid

ROWS, TOLD, STEPS = 48, 2000, 7
"""Inputs on which coordinates are moved, those that disentanglement is measured on, and pictures of a traversal."""
CODES, SHOWN = 6, 8
"""Codes of a quantiser that are swapped, and hidden channels that the circuit shows."""


class Study(NamedTuple):
    """What was found: the bank, the figures as JSON values, and pictures as PNG by file name."""

    bank: ConceptBank
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
    """Every figure of an autoencoder, or of that of a pipeline (`measured`), and of the same one untrained as a control.
    `hidden` is the site of units whose modularity is measured, by default in the middle of the decoder."""
    inside, _ = autoencoder_of(target)
    rng, x = np.random.default_rng(seed), data.inputs
    if type(inside).__module__.startswith("diffusers.") and float(x.min()) >= 0:
        x = 2 * x - 1  # as its image processor does
    chosen = np.sort(rng.permutation(len(x))[:TOLD])
    known = Data(x[chosen], {name: [values[k] for k in chosen] for name, values in data.factors.items()})
    own = measured(inside, known, hidden=hidden, seed=seed)
    latents = list(own.figures["labels"])
    shares = {name: {f: explained(_of(own.z, own.bank[name].index), v) for f, v in known.factors.items()} for name in latents}
    pictures = {"circuit.png": circuit(own.found, latents, shares)}
    if (drawn := traversals(own.decoder, own.few, latents)) is not None:
        pictures["traversals.png"] = drawn
    return Study(own.bank, own.figures, pictures)


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


def _of(z: Tensor, index: int) -> Tensor:
    """One latent of every input, the mean of its map."""
    return z[:, index].float().flatten(1).mean(1) if z.ndim > 2 else z[:, index].float()


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


def traversals(decoder: Decoder, inputs: Tensor, names: list[str]) -> bytes | None:
    """A row for each coordinate: one picture as it goes from one end of its values to the other, and where pictures change;
    None where no pictures come out."""
    plain = decoder(inputs)
    if plain.ndim != 4 or plain.shape[1] not in (1, 3) or not names:
        return None
    low, high = (float(torch.quantile(plain.flatten()[: 1 << 20], q)) for q in (0.001, 0.999))

    def seen(x: Tensor) -> NDArray[np.uint8]:
        scaled = ((x - low) / max(high - low, 1e-9)).clamp(0, 1).permute(0, 2, 3, 1)
        return (scaled.expand(*scaled.shape[:3], 3).numpy() * 255).round().astype(np.uint8)

    cells: dict[str, dict[str, NDArray[np.uint8]]] = {}
    for name in names:
        ends = decoder.bank[name].natural or (-1.0, 1.0)
        made = [decoder(inputs, {name: Set(float(value), unit="raw")}) for value in np.linspace(*ends, STEPS)]
        change = (made[-1] - made[0]).abs().mean((0, 1), keepdim=True)
        row = {f"{k + 1}": seen(one[:1]) for k, one in enumerate(made)}
        cells[name] = row | {"where": seen(low + (high - low) * change / change.max().clamp(min=1e-9))}
    return grid(cells, title="from the lowest 0.5 % of a coordinate's values to the highest, and where pictures change")


def circuit(found: Coordinates, names: list[str], shares: Mapping[str, Mapping[str, float]]) -> bytes:
    """Known factors, coordinates and hidden channels as a graph: how much of a coordinate's variance a factor explains, and
    which channels it moves most."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("pictures need matplotlib: pip install 'steerlib[eval]'") from None
    factors = list(next(iter(shares.values()), {}))
    moved = found.channels / found.channels.amax(-1, keepdim=True).clamp(min=1e-12) if found.channels.numel() else None
    busy = [] if moved is None else moved.sum(0).topk(min(SHOWN, moved.shape[1])).indices.sort().values.tolist()
    columns = [factors, names, [f"channel {k}" for k in busy]]
    at = {text: (x, -(k + 0.5) / len(column)) for x, column in enumerate(columns) for k, text in enumerate(column)}
    lines = [(factor, name, share) for name, own in shares.items() for factor, share in own.items()]
    if moved is not None:
        lines += [(n, f"channel {k}", float(moved[i, k])) for i, n in enumerate(names) for k in busy]
    figure = Figure(figsize=(8, 1 + 0.3 * max(map(len, columns))), layout="constrained")
    axis = figure.subplots()
    for start, end, weight in lines:
        (x, y), (x2, y2) = at[start], at[end]
        axis.plot([x, x2], [y, y2], color="C0" if x == 0 else "C1", linewidth=3 * weight, alpha=min(1.0, weight))
    for text, (x, y) in at.items():
        axis.text(x, y, text, ha="center", va="center", fontsize=8, bbox={"facecolor": "white", "edgecolor": "0.7"})
    axis.set(xlim=(-0.4, 2.4), ylim=(-1.05, 0.05), title="factors explain coordinates, coordinates move channels")
    axis.axis("off")
    with BytesIO() as file:
        figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
        return file.getvalue()


COLUMNS = {
    "name": "coordinate", "ces": "CES", "relative": "relative effect", "low": "from", "high": "to", "control": "control",
    "specificity": "specificity", "focus": "focus",
}  # fmt: skip
LEGEND = """CES and specificity as published (arXiv 2505.03530). Relative effect: with a coordinate as it is in another input,
the change of the outcome over the spread of outcomes, with its 95 % interval over inputs (from, to); control: a random
direction of the latents treated alike. Focus: 0 where all outputs change alike, 1 where one alone does."""


def lines(figures: Mapping[str, Any]) -> list[str]:
    """What was found, as sentences."""
    whole = figures["coordinates"]
    found = [
        f"{len(whole['each'])} active coordinates; passive: {', '.join(figures['passive']) or 'none'}; dead, moving nothing: "
        f"{', '.join(whole['dead']) or 'none'}.",
        f"Modularity {said(whole['modularity'])} (as published {said(whole['published_modularity'])}).",
    ]
    for name in ("disentanglement", "shuffled factors"):
        if name in figures:
            found.append(f"{name}: {', '.join(f'{key} {said(value)}' for key, value in figures[name].items())}.".capitalize())
    if "untrained" in figures:
        plain = figures["untrained"]
        moved = np.mean([one["relative"] or 0.0 for one in plain["coordinates"]["each"]] or [0.0])
        known = {key: value for key, value in plain.get("disentanglement", {}).items() if key.startswith("dci")}
        told = "".join(f", {key} {said(value)}" for key, value in known.items())
        found.append(f"Untrained: relative effect {moved:.3f}, modularity {said(plain['coordinates']['modularity'])}{told}.")
    if "codes" in figures:
        swaps = np.mean([code["relative"] for code in figures["codes"].values()])
        moves = np.mean([one["relative"] or 0.0 for one in whole["each"]])
        found.append(f"Relative effect of a swap of codes {swaps:.3f}, of a continuous coordinate {moves:.3f}, on average.")
    return found


def page(study: Study, title: str) -> str:
    """One HTML file that needs no network."""
    rows = [[_shown(one[key]) for key in COLUMNS] for one in study.figures["coordinates"]["each"]]
    rows = [[*row, study.figures["labels"][row[0]]] for row in rows]
    head = "".join(f"<th>{escape(text)}</th>" for text in (*COLUMNS.values(), "label"))
    body = "".join(f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>" for row in rows)
    images = "".join(
        f'<h2>{escape(name.removesuffix(".png"))}</h2><img src="data:image/png;base64,{b64encode(png).decode()}">'
        for name, png in sorted(study.pictures.items(), reverse=True)
    )
    told = "".join(f"<p>{escape(line)}</p>" for line in lines(study.figures))
    style = "body{font:15px sans-serif;margin:2em;max-width:70em}td,th{padding:.2em .6em;text-align:left}img{max-width:100%}"
    return (
        f"<!doctype html><meta charset=utf-8><title>{escape(title)}</title><style>{style}</style><h1>{escape(title)}</h1>{told}"
        f"<table><tr>{head}</tr>{body}</table><p>{escape(LEGEND)}</p>{images}\n"
    )


def _shown(value: Any) -> str:
    return "undefined" if value is None else value if isinstance(value, str) else f"{value:.3g}"


def write(study: Study, out: Path, title: str) -> Path:
    """Write page, figures, pictures and bank to a folder; returns the page."""
    out.mkdir(parents=True, exist_ok=True)
    for name, png in study.pictures.items():
        (out / name).write_bytes(png)
    (out / "study.json").write_text(
        json.dumps(study.figures, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8"
    )
    study.bank.save_pretrained(out / "bank")
    (out / "index.html").write_text(page(study, title), encoding="utf-8")
    return out / "index.html"
