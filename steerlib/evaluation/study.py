"""An autoencoder studied by intervention: its latents as concepts, what each of them does, and a page that shows it."""

import json
import sys
from base64 import b64encode
from collections.abc import Mapping
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
from ..errors import BadEdit, MissingExtra, UnsupportedTarget
from ..hosts import load
from ..steering.interventions import Set
from .coordinates import Coordinates, coordinates, said, spread_of
from .decoders import decoding
from .disentanglement import disentanglement
from .interventions import Decoder, by_swap
from .pictures import grid

ROWS, TOLD, STEPS = 48, 2000, 7
"""Inputs on which coordinates are moved, those that disentanglement is measured on, and pictures of a traversal."""
CODES, SHOWN = 6, 8
"""Codes of a quantiser that are swapped, and hidden channels that the circuit shows."""
PICTURES, FACTORS = ("imgs", "images"), ("latents_classes", "factors", "labels")
"""What files of known layouts call pictures, and a table of factors."""


class Data(NamedTuple):
    """Inputs `[B, ...]`, and what is known of each, by name of factor."""

    inputs: Tensor
    factors: dict[str, list[Any]]


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


def read(path: Path) -> Data:
    """Pictures in a folder, or an `.npz` file with `imgs` or `images` and a table of factors or a row of each by name.

    Bytes become 0 to 1, and channels come first; numbers with a point stay as they are. Nothing in the file is run.
    """
    if path.is_dir():
        from PIL import Image

        files = sorted(file for file in path.iterdir() if file.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
        if not files:
            raise BadEdit(f"expected pictures in {path}, PNG, JPEG or WebP, got none")
        return Data(_as_inputs(np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])), {})
    with np.load(path, allow_pickle=False) as file:
        held = next((name for name in PICTURES if name in file), None)
        if held is None:
            raise BadEdit(f"expected an array {' or '.join(PICTURES)} in {path}, got {', '.join(file.files)}")
        inputs, factors = _as_inputs(file[held]), {}
        for name in (n for n in file.files if n not in (held, "metadata")):  # of dSprites the latter is a pickle
            values = file[name]
            if len(values) == len(inputs) and (values.ndim == 1 or name in FACTORS):
                table = values.reshape(len(inputs), -1).T.tolist()
                factors |= {name: table[0]} if values.ndim == 1 else {f"factor {k}": row for k, row in enumerate(table)}
    return Data(inputs, {name: values for name, values in factors.items() if len({*values}) > 1})


def _as_inputs(values: NDArray[Any]) -> Tensor:
    x = torch.as_tensor(values)
    x = x.float() / 255 if x.dtype == torch.uint8 and int(x.max()) > 1 else x.float()
    if x.ndim == 3:
        return x[:, None]
    return x.permute(0, 3, 1, 2).contiguous() if x.ndim == 4 and x.shape[-1] in (1, 3) else x


# -- the study -----------------------------------------------------------------------------------------------------------


def studied(target: Any, data: Data, *, hidden: str | None = None, seed: int = 0) -> Study:
    """Every figure of an autoencoder, or of that of a pipeline: its coordinates, disentanglement where factors are known (and
    with them shuffled, as a control), and swaps of codes where it is a quantiser. `hidden` is the site of units whose
    modularity is measured, by default in the middle of the decoder."""
    inside, _ = autoencoder_of(target)
    rng = np.random.default_rng(seed)
    x = data.inputs
    if type(inside).__module__.startswith("diffusers.") and float(x.min()) >= 0:
        x = 2 * x - 1  # as its image processor does
    chosen = np.sort(rng.permutation(len(x))[:TOLD])
    x, factors = x[chosen], {name: [values[k] for k in chosen] for name, values in data.factors.items()}
    bank = ConceptBank.from_autoencoder(inside, x, factors=factors, seed=seed)
    with torch.no_grad():
        z = posterior(inside.encode(x)).mean
    few = z[torch.as_tensor(rng.permutation(len(z))[:ROWS])]
    latents = [name for name, concept in bank.concepts.items() if "#" not in concept.encoder]
    decoder = Decoder(inside, decoding(inside), bank)
    found = coordinates(decoder, few, latents, hidden=hidden or middle(inside), seed=seed)
    figures = {"coordinates": found.to_dict(), "passive": bank.provenance["passive"], "inputs": len(x), "moved": len(few)}
    figures["labels"] = {name: bank[name].label for name in latents}
    codes = [name for name in bank.concepts if name not in latents][:CODES]
    if len(codes) > 1:
        figures["codes"] = {code: swapped(decoder, few, code, [o for o in codes if o != code], seed) for code in codes}
    if factors:
        flat, mixed = z.float().flatten(2).mean(-1).numpy() if z.ndim > 2 else z.float().numpy(), rng.permutation(len(x))
        shuffled = {name: [values[k] for k in mixed] for name, values in factors.items()}
        for name, known in (("disentanglement", factors), ("shuffled factors", shuffled)):
            figures[name] = disentanglement(flat, known, seed=seed)._asdict()
    shares = {name: {f: explained(_of(z, bank[name].index), v) for f, v in factors.items()} for name in latents}
    pictures = {"circuit.png": circuit(found, latents, shares)}
    if (drawn := traversals(decoder, few, latents)) is not None:
        pictures["traversals.png"] = drawn
    return Study(bank, figures, pictures)


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
