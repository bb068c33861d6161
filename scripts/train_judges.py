"""Train the readers of factors: `python scripts/train_judges.py [--images 200000] [--out judges.safetensors]`.

A few minutes on one core. Prints how much of 10,000 held-out renders is read right, factor by factor.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from scenes import faces, judges, world
from tqdm.auto import tqdm

DRAW = {"scenes": world.draw, "faces": faces.draw}
HELD_OUT, APART = 10_000, 10**9
"""How many renders, and a step that training never reaches."""


def trained(kind: str, images: int, batch: int, seed: int) -> judges.PictureJudge:
    """A judge that has seen so many renders, none of them twice."""
    torch.manual_seed(seed)
    generator, judge, steps = torch.Generator().manual_seed(seed), judges.PictureJudge(kind), images // batch
    adam = torch.optim.AdamW(judge.parameters(), lr=2e-3, fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(adam, 2e-3, total_steps=steps, pct_start=0.1)
    with tqdm(total=steps * batch, desc=f"judge of {kind}", unit="img") as bar:
        for step in range(steps):
            drawn = DRAW[kind](batch, seed=(seed, step))
            loss = judges.loss(judge, drawn.pixels, judges.truth(kind, drawn.factors), generator)
            loss.backward()
            adam.step()
            adam.zero_grad()
            rate.step()
            bar.update(batch)
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.4f}")
    return judge.eval()


def held_out(judge: judges.PictureJudge, kind: str, seed: int) -> dict[str, float]:
    """Accuracy on renders whose seed was never drawn from."""
    drawn = DRAW[kind](HELD_OUT, seed=(seed, APART))
    return judges.accuracy(judge.read(drawn.pixels), judges.truth(kind, drawn.factors))


def main(
    images: Annotated[int, typer.Option(help="renders of scenes to learn from")] = 200_000,
    batch: Annotated[int, typer.Option(help="renders a step")] = 128,
    seed: Annotated[int, typer.Option(help="of renders and first weights")] = 0,
    threads: Annotated[int, typer.Option(help="processor cores")] = 1,
    out: Annotated[Path | None, typer.Option(help="where to write; default: where the library looks")] = None,
) -> None:
    """Train both judges, say how good they are, and save them."""
    torch.set_num_threads(threads)
    found = {"scenes": trained("scenes", images, batch, seed), "faces": trained("faces", images // 4, batch, seed)}
    path = out or judges.shipped()
    path.parent.mkdir(parents=True, exist_ok=True)
    judges.save(found, path)
    for kind in found:
        for name, share in held_out(judges.load(kind, path), kind, seed).items():
            print(f"{kind:7} {name:11} {share:.2%}")


if __name__ == "__main__":
    typer.run(main)
