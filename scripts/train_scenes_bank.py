"""Make the bank of the scenes model: `python scripts/train_scenes_bank.py out/scenes/pipeline`. Run it again to go on.

Activations and encoders stay in --work. The bank gets the pipeline, the effect of every lever, and a card with pictures.
"""

import json
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from scenes import bank as scene_bank
from scenes import card, effects, judges
from scenes.bank import SceneRecipe
from scenes.experiment import TESTED, Experiment
from scenes.graph import with_followers
from scenes.graph_use import guided, holding
from scenes.measures import Cause
from scenes.methods import TRIED, Comparison, off_distribution
from tqdm.auto import tqdm

from steerlib import BaseModel, ConceptBank, load
from steerlib.training.store import recorded

DESCRIPTION = """Levers and latents of a small text-to-image model of scenes whose every cause is known (`pipeline/`, trained by
`scripts/train_scenes.py`), at the noise levels 899, 500 and 100 of arXiv 2512.10720. Everything here is measured against the
truth: on scenes that nothing was made from, read by judges that never saw the model."""


def with_levers(
    experiment: Experiment, causes: list[Cause], work: Path, *, dev: int, test: int, only: list[str]
) -> ConceptBank:
    """The bank with the effect of every lever, when it acts, and what edits of nothing leave."""
    bank = effects.measured(experiment, dev=dev, test=test, work=work, only=only)
    measured = experiment.of(bank)
    windows = {cause.factor: effects.by_window(measured, cause, test) for cause in causes}
    laws = {cause.factor: effects.laws(measured, cause, dev) for cause in causes}
    bank.provenance |= {"windows": windows, "laws": laws, "recipe": "scenes-32"}
    return bank


def with_comparison(
    experiment: Experiment, causes: list[Cause], recipe: SceneRecipe, work: Path, *, dev: int, test: int, tried: int
) -> dict[str, Comparison]:
    """Measure what the graph is good for, other methods and mediation; all of it goes into the bank's provenance."""
    found = experiment.bank.provenance
    found |= {"holding": holding(experiment, dev=test, test=2 * test), "guided": guided(experiment, dev=dev, test=test)}
    compared = {cause.factor: Comparison(experiment, cause, dev=dev, test=test, tried=tried) for cause in causes}
    found["methods"] = {name: comparison.run() for name, comparison in tqdm(compared.items(), desc="methods")}
    seen = recorded(work / "seen.safetensors", lambda: scene_bank.seen_by(experiment.pipe, recipe))
    found["off"] = off_distribution(compared, seen)
    found["mediation"] = {cause.factor: effects.mediated(experiment, cause, dev) for cause in causes}
    return compared


def ship(bank: ConceptBank, pipeline: Path, out: Path) -> None:
    """Write the bank with its pipeline beside it, the denoiser in half precision: as such it is what the bank belongs to."""
    with TemporaryDirectory() as place:
        pipe = load(str(pipeline))[0]
        pipe.unet.half()
        pipe.save_pretrained(place)
        for path in Path(place).rglob("*.json"):  # without the folder that it was loaded from
            values = json.loads(path.read_text())
            if values.pop("_name_or_path", None) is not None:
                path.write_text(json.dumps(values, indent=2) + "\n")
        bank.base = BaseModel.of(load(place)[0], id=bank.base.id)
        bank.files = {"pipeline": place}
        bank.save_pretrained(out)


def main(
    pipeline: Annotated[Path, typer.Argument(help="folder of the trained pipeline")],
    out: Annotated[Path, typer.Option(help="folder of the bank")] = Path("out/scenes-32"),
    work: Annotated[Path, typer.Option(help="where stages keep their results")] = Path("out/scenes-bank"),
    pictures: Annotated[int, typer.Option(help="true renders to learn from")] = SceneRecipe.pictures,
    drawn: Annotated[int, typer.Option(help="pictures of its own to learn from")] = SceneRecipe.drawn,
    latents: Annotated[int, typer.Option(help="of each encoder")] = SceneRecipe.latents,
    epochs: Annotated[int, typer.Option(help="times that encoders see the pictures")] = SceneRecipe.epochs,
    seeds: Annotated[int, typer.Option(help="from how many seeds encoders are trained")] = SceneRecipe.seeds,
    seed: Annotated[int, typer.Option(help="of everything")] = 0,
    dev: Annotated[int, typer.Option(help="scenes on which an edit is chosen")] = 16,
    test: Annotated[int, typer.Option(help="scenes on which it is measured")] = 32,
    steps: Annotated[int, typer.Option(help="scheduler steps of a picture")] = 10,
    tried: Annotated[int, typer.Option(help="latents, and places, of which one is compared")] = TRIED,
    factor: Annotated[list[str], typer.Option(help="measure levers of these alone; may be repeated")] = [],  # noqa: B006
    again: Annotated[Path | None, typer.Option(help="a bank made before: only compare methods on it anew")] = None,
    threads: Annotated[int, typer.Option(help="processor cores")] = 1,
) -> None:
    """Train, measure, compare, and write it all down."""
    given = locals()
    torch.set_num_threads(threads)
    pipe = load(str(pipeline))[0].to(torch.bfloat16)
    recipe = SceneRecipe(**{field.name: given[field.name] for field in fields(SceneRecipe) if field.name in given})
    causes = [Cause(name, value) for name, value in TESTED.items() if name in (factor or TESTED)]
    bank = ConceptBank.from_pretrained(again) if again else scene_bank.train_scene_bank(pipe, recipe, work)
    experiment = Experiment(pipe, bank, judges.load("scenes"), steps=steps, seed=seed)
    if again is None:
        experiment = experiment.of(with_levers(experiment, causes, work, dev=dev, test=test, only=factor))
    experiment = experiment.of(with_followers(experiment, 2 * test))
    compared = with_comparison(experiment, causes, recipe, work, dev=dev, test=test, tried=tried)
    finish(experiment, compared, causes[-1], pipeline.parent / "examined.json")
    ship(experiment.bank, pipeline, out)
    print(json.dumps({"held": card.held(experiment.bank), "off": experiment.bank.provenance["off"]}, indent=1))
    print(card.levers_table(card.levers(experiment.bank)), end="\n\n")
    print(card.methods_table(experiment.bank.provenance["methods"]))


def finish(experiment: Experiment, compared: dict[str, Comparison], cause: Cause, examined: Path) -> None:
    """Give the bank its licence, its pictures and its card, and say how often the model draws what it is asked for."""
    bank = experiment.bank
    if examined.is_file():
        bank.provenance["examined"] = json.loads(examined.read_text())
    bank.license = "apache-2.0"
    shown = {"methods.png": card.methods_picture(compared), "windows.png": card.windows_picture(experiment, cause)}
    bank.pictures = shown | card.thumbnails(experiment)
    bank.card = card.scene_card(bank, DESCRIPTION)


if __name__ == "__main__":
    typer.run(main)
