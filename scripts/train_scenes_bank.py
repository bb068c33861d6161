"""Make the bank of the scenes model: `python scripts/train_scenes_bank.py out/scenes/pipeline`. Run it again to go on.

Activations and encoders stay in --work. The bank gets the pipeline, the effect of every lever, and a card with pictures.
"""

import json
import shutil
from dataclasses import fields
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from scenes import card as scene_card
from scenes import effects as scene_effects
from scenes import judges
from scenes.bank import SceneRecipe, activations, train_scene_bank, truth
from scenes.do import guided, holding
from scenes.graph import with_followers
from scenes.image import Do
from tqdm.auto import tqdm

from steerlib import BaseModel, ConceptBank, load
from steerlib.training.store import recorded

DESCRIPTION = """Levers and latents of a small text-to-image model of scenes whose every cause is known (`pipeline/`, trained by
`scripts/train_scenes.py`), at the noise levels 899, 500 and 100 of arXiv 2512.10720. Everything here is measured against the
truth: on scenes that nothing was made from, read by judges that never saw the model."""


def ship(bank: ConceptBank, pipeline: Path, out: Path) -> None:
    """The bank with its pipeline beside it, the denoiser in half precision: as such it is what the bank belongs to."""
    with TemporaryDirectory() as place:
        pipe = load(str(pipeline))[0]
        pipe.unet.half()
        pipe.save_pretrained(place)
        for path in Path(place).rglob("*.json"):  # where it was loaded from is nobody's business
            values = json.loads(path.read_text())
            if values.pop("_name_or_path", None) is not None:
                path.write_text(json.dumps(values, indent=2) + "\n")
        bank.base = BaseModel.of(load(place)[0], id=bank.base.id)
        shutil.copytree(place, bank.save_pretrained(out) / "pipeline")


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
    factor: Annotated[list[str], typer.Option(help="measure levers of these alone; may be repeated")] = [],  # noqa: B006
    again: Annotated[Path | None, typer.Option(help="a bank made before: only compare methods on it anew")] = None,
    threads: Annotated[int, typer.Option(help="processor cores")] = 1,
) -> None:
    """Train, measure, compare, and write it all down."""
    given = locals()
    torch.set_num_threads(threads)
    pipe = load(str(pipeline))[0].to(torch.bfloat16)
    recipe = SceneRecipe(**{field.name: given[field.name] for field in fields(SceneRecipe) if field.name in given})
    ready = partial(scene_effects.Studio, pipe, judge=judges.load("scenes"), seed=seed)
    dos = [Do(name, value) for name, value in scene_effects.TESTED.items() if name in (factor or scene_effects.TESTED)]
    if again is None:
        bank = train_scene_bank(pipe, recipe, work)
        bank = scene_effects.measured(ready(bank=bank), dev=dev, test=test, work=work, only=factor)
        studio = ready(bank=bank)
        bank.provenance |= {"windows": {do.factor: scene_effects.by_window(studio, do, test) for do in dos}}
        bank.provenance |= {"laws": {do.factor: scene_effects.laws(studio, do, dev) for do in dos}, "recipe": "scenes-32"}
    else:
        bank = ConceptBank.from_pretrained(again)
        studio = ready(bank=bank)
    bank = with_followers(studio, 2 * test)
    studio = ready(bank=bank)
    bank.provenance |= {"holding": holding(studio, dev=test, test=2 * test), "guided": guided(studio, dev=dev, test=test)}
    compared = {do.factor: scene_effects.Comparison(studio, do, dev=dev, test=test) for do in dos}
    methods = {name: comparison.run() for name, comparison in tqdm(compared.items(), desc="methods")}
    off = scene_effects.off_distribution(
        compared, recorded(work / "seen.safetensors", lambda: activations(pipe, recipe, truth(recipe)))
    )
    bank.provenance |= {"methods": methods, "off": off}
    bank.provenance["mediation"] = {do.factor: scene_effects.mediated(studio, do, dev) for do in dos}
    if (examined := pipeline.parent / "examined.json").is_file():
        bank.provenance["examined"] = json.loads(examined.read_text())
    bank.license = "apache-2.0"
    bank.pictures = {
        "methods.png": scene_card.methods_picture(compared),
        "windows.png": scene_card.windows_picture(studio, dos[-1]),
    } | scene_card.thumbnails(studio)
    bank.card = scene_card.scene_card(bank, DESCRIPTION)
    ship(bank, pipeline, out)
    print(json.dumps({"held": scene_card.held(bank), "off": off}, indent=1))
    print(scene_card.levers_table(scene_card.levers(bank)), scene_card.methods_table(methods), sep="\n\n")


if __name__ == "__main__":
    typer.run(main)
