"""Train the text-to-image model of scenes, or of figures: `python scripts/train_scenes.py out/scenes`. Run it again to go on.

On processor cores hours, on a GPU minutes; on several with `accelerate launch scripts/train_scenes.py`. Stops when pictures
show what captions ask for, as the judges of `scripts/train_judges.py` read them, and of figures the nearest render
(`scripts/figures/reading.py`). Watch `samples/` and `curve.png`.
"""

import json
from dataclasses import fields
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import Accelerator
from diffusers.models.attention_processor import AttnProcessor
from figures.subject import figures
from scenes import judges
from scenes.painting import PaintingRecipe, Subject, paint
from scenes.pipeline import pipeline
from scenes.subject import scenes
from scenes.wording import APART


class Known(StrEnum):
    """What can be learned."""

    SCENES = "scenes"
    FIGURES = "figures"

    @property
    def subject(self) -> Subject:
        """All that training needs."""
        return figures() if self is Known.FIGURES else scenes(judges.load("scenes"))


def plot(folder: Path, bold: tuple[str, ...]) -> None:
    """The share of each factor drawn as asked, over the pictures learned from."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name in [key for key in lines[0] if key not in ("images", "loss", "images_per_second")]:
        axes.plot([line["images"] for line in lines], [line[name] for line in lines], label=name, lw=2 if name in bold else 1)
    axes.set(xlabel="pictures learned from", ylabel="drawn as asked", ylim=(0, 1))
    axes.legend(ncols=2, fontsize="small")
    figure.savefig(folder / "curve.png", dpi=120)
    pyplot.close(figure)


def main(
    folder: Annotated[Path, typer.Argument(help="where everything is kept")],
    of: Annotated[Known, typer.Option(help="what to learn to draw")] = Known.SCENES,
    size: Annotated[str, typer.Option(help="small, large or toy")] = "small",
    images: Annotated[int, typer.Option(help="pictures to learn from, at most")] = PaintingRecipe.images,
    batch: Annotated[int, typer.Option(help="pictures a step")] = PaintingRecipe.batch,
    lr: Annotated[float, typer.Option(help="learning rate of the denoiser")] = PaintingRecipe.lr,
    words: Annotated[int, typer.Option(help="steps for the text encoder alone")] = PaintingRecipe.words,
    seed: Annotated[int, typer.Option(help="of weights, pictures and noise")] = 0,
    goal: Annotated[float, typer.Option(help="share of every factor drawn right at which to stop")] = 0.97,
    look_every: Annotated[int, typer.Option(help="pictures between looks")] = 20_000,
    save_every: Annotated[int, typer.Option(help="steps between checkpoints")] = 400,
    look_at: Annotated[int, typer.Option(help="pictures drawn for a look")] = 64,
    precision: Annotated[str, typer.Option(help="no or bf16")] = "no",
    threads: Annotated[int, typer.Option(help="processor cores of each process")] = 1,
    check: Annotated[int, typer.Option(help="captions of the last check, 0 for none")] = 1000,
) -> None:
    """Train, and say how much is drawn as asked."""
    torch.set_num_threads(threads)
    accelerator, given = Accelerator(mixed_precision=precision), locals()
    recipe = PaintingRecipe(**{field.name: given[field.name] for field in fields(PaintingRecipe) if field.name in given})
    subject = of.subject
    pipe: Any = pipeline(size, seed=seed, known=subject.words)
    if accelerator.device.type == "cpu":
        # backwards in half precision, torch's own attention takes ten times as long
        pipe.unet.set_attn_processor(AttnProcessor())
        pipe.text_encoder.set_attn_implementation("eager")
    looks: dict[str, Any] = {
        "look_every": look_every,
        "save_every": save_every,
        "look_at": look_at,
        "looked": partial(plot, bold=subject.asked),
    }
    paint(pipe, subject, recipe, folder, accelerator=accelerator, goal=goal, **looks)
    if accelerator.is_main_process:
        trained = type(pipe).from_pretrained(folder / "pipeline")
        found = subject.look(trained.to(accelerator.device), check, (0, APART + 1)).figures if check else {}
        (folder / "examined.json").write_text(json.dumps({"captions": check, "as asked": found}, indent=1) + "\n")
        for name, share in found.items():
            print(f"{name:11} {share:.2%}")


if __name__ == "__main__":
    typer.run(main)
